"""The mixed precision of the commands."""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def default_mixed_precision(device: torch.device | None = None) -> str:
    """`bf16` if the device has fast bf16, else `no`, in accelerate's names.

    `accelerate launch` and the variable `ACCELERATE_MIXED_PRECISION` have priority. On a CPU with AMX, bf16 matrix
    products are much faster than fp32; on a CPU that emulates them they are slower. With AVX512-BF16 alone,
    on a virtual Emerald Rapids that hides its AMX, a step of the demo's stage 2 took 1.6 times as long as in fp32.

    Args:
        device: by default the accelerator, or the CPU.
    """
    if device is None:
        has_accelerator = torch.accelerator.is_available()
        device = torch.accelerator.current_accelerator() if has_accelerator else torch.device("cpu")
    return launched_mixed_precision() or ("bf16" if has_bf16_hardware(device) else "no")


def launched_mixed_precision() -> str | None:
    """The setting of `accelerate launch` (`no` by default) or of the variable; else None."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION")


def autocast(mixed_precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast for accelerate's name of a mixed precision.

    `Accelerator.autocast` has one setting for the process, and ignores fp16 on a CPU; this one does not.

    Raises:
        ValueError: neither `no`, `bf16` nor `fp16`.
    """
    if mixed_precision == "no":
        return nullcontext()
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if mixed_precision not in dtypes:
        raise ValueError(f"mixed_precision is {mixed_precision!r}; this command takes no, bf16 and fp16")
    return torch.autocast(device.type, dtypes[mixed_precision])


def has_bf16_hardware(device: torch.device) -> bool:
    """Whether the GPU has bf16, or the CPU AMX."""
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported()
    # mps and others: Trainer decides, unless a recipe sets bf16
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
