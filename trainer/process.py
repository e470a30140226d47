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

# PartialState of accelerate reads these
_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def start_process(timeout: timedelta | None = None) -> PartialState:
    """accelerate's state of the launched processes; sets up logging on the main process.

    Args:
        timeout: of the process group; torch's default if None. An existing process group keeps its own.
    """
    # without `cpu`, those that torchrun starts on a machine without an accelerator do not know of each other;
    # what `accelerate launch --cpu` says is read by Accelerator and TrainingArguments alone
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, **({} if timeout is None else {"timeout": timeout}))
    set_up_logging(state.is_main_process)
    warn_of_missing_processes()
    return state


def warn_of_missing_processes() -> None:
    """Warn if `accelerate launch` started one process instead of several.

    With `--cpu` and without an MPI hostfile (accelerate 1.15) it does so silently. It then sets the master address, but
    none of the variables for the number of processes.
    """
    launched = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys()
    if launched and not any(name in os.environ for name in _WORLD_SIZES):
        logger.warning(
            "accelerate launch was asked for several processes, or found MASTER_ADDR in the environment, and has "
            "started this one alone: with --cpu it starts no more. torchrun --nproc_per_node 2 -m lorgnette.trainer … "
            "starts 2"
        )


def end_process_group() -> None:
    """Destroy the process group, if any. The caller must hold no DDP model any more."""
    if in_process_group():
        gc.collect()  # a remaining DDP model would hold the GIL and wait for gloo threads, which wait for the GIL
        torch.distributed.destroy_process_group()
