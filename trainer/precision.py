"""Which mixed precision the commands run in."""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def default_mixed_precision(device: torch.device | None = None) -> str:
    """`bf16` where the device is fast at it, `no` elsewhere; as accelerate's settings name it.

    What `accelerate launch` or the variable `ACCELERATE_MIXED_PRECISION` says goes first. On a CPU with AMX a bf16
    product takes a small part of the time of one in fp32, on one that has to emulate it longer. With AVX512-BF16 alone,
    on a virtual Emerald Rapids that hides its AMX, a step of the demo's stage 2 took 1.6 times as long as in fp32.

    Args:
        device: the accelerator that is there, or the CPU, if None.
    """
    if device is None:
        there = torch.accelerator.is_available()
        device = torch.accelerator.current_accelerator() if there else torch.device("cpu")
    return launched_mixed_precision() or ("bf16" if has_bf16_hardware(device) else "no")


def launched_mixed_precision() -> str | None:
    """What `accelerate launch` says (`no` unless its options or its config say more), or the variable; else None."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION")


def autocast(mixed_precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Mixed precision by accelerate's name of it.

    `Accelerator.autocast` has one for the whole process, and leaves fp16 off on a CPU, which this does not.

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
    # mps and others: Trainer decides, unless a recipe says bf16
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
