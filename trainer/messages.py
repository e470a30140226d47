"""What a command shows on stderr: the messages of lorgnette, bars of what takes long, and no small talk of libraries.

A command calls [`quiet_libraries`] before it imports anything heavy, and [`set_up_logging`] once it knows whether its
process speaks. Scripts that import lorgnette set up logging as they like: nothing here runs for them.
"""

import logging
import os
import re
import sys
from collections.abc import Callable
from typing import Any


_EXPECTED_ERRORS = (OSError, ValueError, RuntimeError, TypeError, ImportError)  # their messages need no class name


def one_line(error: Exception, program: str, debugging: str) -> str:
    """An error as one line, printed in place of the traceback.

    Args:
        program: the command that was typed, without its options.
        debugging: the part of it that `--debug` follows.
    """
    message = " ".join(without_worker(str(error)).split())
    message = message if message and isinstance(error, _EXPECTED_ERRORS) else f"{type(error).__name__}: {message}"
    return f"{program}: error: {message} ({debugging} --debug … shows where)"


def without_worker(message: str) -> str:
    """The error's own message, where torch raises an error of a data loader's worker with its whole traceback."""
    worker = re.match(r"Caught (\w+) in \w+ worker process \d+\.\s+Original Traceback", message)
    if worker is None:
        return message
    *_, last = re.split(rf"^(?:\w+\.)*{worker[1]}: ?", message, flags=re.MULTILINE)
    return last


def quiet_libraries() -> None:
    """Leave out what libraries say while they are imported, and draw bars rarely where stderr is a file."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_no_missing_kernel)
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # the error that follows says it
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")  # seconds; tqdm reads it where it is imported
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def set_up_logging(speaks: bool) -> None:
    """Send the messages of `lorgnette` to stderr: all of those of the process that speaks, warnings of the others."""
    from transformers.utils import logging as transformers_logging

    ours = logging.getLogger("lorgnette")
    ours.setLevel(logging.INFO if speaks else logging.WARNING)
    if not ours.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"))
        ours.addHandler(handler)
    transformers_logging.set_tqdm_hook(_passing_bar)


def _is_no_missing_kernel(record: logging.LogRecord) -> bool:
    """bitsandbytes asks for the package `kernels` on every CPU with units for bf16, quantised or not."""
    return "gemm_4bit_forward" not in record.getMessage()


def _passing_bar(factory: Callable[..., Any], args: tuple, settings: dict[str, Any]) -> Any:
    """A bar of transformers', as of weights that are loaded: gone when it is done, and none where stderr is a file."""
    return factory(*args, **{"leave": False, "disable": None} | settings)
