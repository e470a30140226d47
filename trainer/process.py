"""What each process of a command begins with: those that were started beside it, and where its messages go."""

import gc
import logging
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from ..modeling.modeling_losses import in_process_group


def start_process(timeout: timedelta | None = None) -> PartialState:
    """accelerate's view of the processes that a launcher started; messages are set up for that of them that speaks.

    Args:
        timeout: how long one may wait for another; torch's own if None. Where a process group is there already, its.
    """
    # without `cpu`, those that torchrun starts on a machine without an accelerator do not know of each other;
    # what `accelerate launch --cpu` says is read by Accelerator and TrainingArguments alone
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, **({} if timeout is None else {"timeout": timeout}))
    set_up_logging(state.is_main_process)
    return state


def end_process_group() -> None:
    """Where there is one. Whoever calls this holds no DDP model any more."""
    if in_process_group():
        gc.collect()  # DDP that is still there would hold the GIL and wait for threads of gloo that wait for the GIL
        torch.distributed.destroy_process_group()


def set_up_logging(speaks: bool) -> None:
    """Send the messages of `lorgnette` to stderr: all of those of the process that speaks, warnings of the others."""
    ours = logging.getLogger("lorgnette")
    ours.setLevel(logging.INFO if speaks else logging.WARNING)
    if not ours.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"))
        ours.addHandler(handler)
