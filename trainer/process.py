"""What each process of a command begins with: those that were started beside it; and how it ends."""

import gc
import logging
import os
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from ..modeling.modeling_loss import in_process_group
from .messages import set_up_logging


logger = logging.getLogger(__name__)

# accelerate looks for them in PartialState
_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


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
    warn_of_missing_processes()
    return state


def warn_of_missing_processes() -> None:
    """Say that `accelerate launch` was asked for several processes, and has started one.

    It does so with `--cpu` and no hostfile of MPI's (accelerate 1.15), and says nothing. Its address for them to meet
    at is then there, and none of the variables by which a launcher tells a process how many there are.
    """
    launched = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys()
    if launched and not any(name in os.environ for name in _WORLD_SIZES):
        logger.warning(
            "accelerate launch was asked for several processes, or found MASTER_ADDR in the environment, and has "
            "started this one alone: with --cpu it starts no more. torchrun --nproc_per_node 2 -m lorgnette.trainer … "
            "starts 2"
        )


def end_process_group() -> None:
    """Where there is one. Whoever calls this holds no DDP model any more."""
    if in_process_group():
        gc.collect()  # DDP that is still there would hold the GIL and wait for threads of gloo that wait for the GIL
        torch.distributed.destroy_process_group()
