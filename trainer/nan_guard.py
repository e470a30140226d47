"""Stop the run at a non-finite loss, before the optimizer step."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer

from ..modeling.modeling_loss import in_process_group


@contextmanager
def nan_guard(trainer: Trainer) -> Iterator[None]:
    """Check every training loss within the context; evaluation losses are not checked.

    A forward hook checks them, since Trainer's callbacks see only means over logging steps.

    Raises:
        FloatingPointError: a loss is NaN or infinite, with the global step and the rows of the batch (`row_index`). All
            processes raise it, even if only one has such a loss.
    """
    handle = trainer.model.register_forward_hook(partial(_check, trainer), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.compiler.disable  # keeps the hook out of the compiled graph
def _check(trainer: Trainer, model: torch.nn.Module, _args: tuple, inputs: dict[str, Any], outputs: Any) -> None:
    if not model.training:
        return
    loss = outputs["loss"].detach()
    broken = (~loss.isfinite()).any().float()
    if in_process_group():
        dist.all_reduce(broken, dist.ReduceOp.MAX)  # all processes must stop together
    if broken:
        rows = inputs.get("row_index")
        where = "" if rows is None else f" on rows {', '.join(map(str, rows.tolist()))}"
        raise FloatingPointError(
            f"the loss is {loss.item()} in global step {trainer.state.global_step + 1}{where}"
            + (", and not finite in another process" if loss.isfinite() else "")
            + "; the weights are those of the previous step"
        )
