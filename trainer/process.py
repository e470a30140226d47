"""What each process of a command begins with: those that were started beside it, and where its messages go."""

import logging
from typing import Any

import torch
from accelerate import PartialState


def start_process(**settings: Any) -> PartialState:
    """accelerate's view of the processes that a launcher started; messages are set up for that of them that speaks.

    Args:
        settings: `torch.distributed.init_process_group`'s.
    """
    # without `cpu`, those that torchrun starts on a machine without an accelerator do not know of each other
    state = PartialState(cpu=not torch.accelerator.is_available(), **settings)
    set_up_logging(state.is_main_process)
    return state


def set_up_logging(speaks: bool) -> None:
    """Send the messages of `lorgnette` to stderr: all of those of the process that speaks, warnings of the others."""
    ours = logging.getLogger("lorgnette")
    ours.setLevel(logging.INFO if speaks else logging.WARNING)
    if not ours.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"))
        ours.addHandler(handler)
