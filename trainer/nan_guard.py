"""A loss that is not finite stops the run before the optimizer makes anything of it."""

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
    """Look at every training loss of the model while the context lasts; evaluation moves no weight and is let be.

    A hook on the model, since Trainer's callbacks see the mean over the logging steps alone.

    Raises:
        FloatingPointError: a loss is NaN or infinite, with the global step and the rows of the batch (`row_index`). It
            is raised in all processes, also where only another one's loss is.
    """
    handle = trainer.model.register_forward_hook(partial(_check, trainer), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.compiler.disable  # hooks are called outside a compiled forward: it stays one graph
def _check(trainer: Trainer, model: torch.nn.Module, _args: tuple, inputs: dict[str, Any], outputs: Any) -> None:
    if not model.training:
        return
    loss = outputs["loss"].detach()
    broken = (~loss.isfinite()).any().float()
    if in_process_group():
        dist.all_reduce(broken, dist.ReduceOp.MAX)  # a process that stopped alone would leave the others waiting
    if broken:
        rows = inputs.get("row_index")
        where = "" if rows is None else f" on rows {', '.join(map(str, rows.tolist()))}"
        raise FloatingPointError(
            f"the loss is {loss.item()} in global step {trainer.state.global_step + 1}{where}"
            + (", and not finite in another process" if loss.isfinite() else "")
            + "; the weights are still those of the step before"
        )
