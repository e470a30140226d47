"""Which mixed precision the commands run in."""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def default_mixed_precision() -> str:
    """`bf16` where the machine is fast at it, `no` elsewhere; as accelerate's settings name it.

    What `accelerate launch --mixed_precision` or the variable `ACCELERATE_MIXED_PRECISION` says goes first. On a CPU
    with AMX a bf16 product takes a small part of the time of one in fp32; on one that has to emulate it, or that has
    AVX512-BF16 alone, longer: of the demo's stage 2 on Emerald Rapids without AMX 1.6 times as long.
    """
    return launched_mixed_precision() or ("bf16" if has_bf16_hardware() else "no")


def launched_mixed_precision() -> str | None:
    """What `accelerate launch --mixed_precision` or the variable says; None where nobody does."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION")


def autocast(mixed_precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Mixed precision by accelerate's name of it, as `Accelerator.autocast`, which has one for the whole process.

    Raises:
        ValueError: neither `no`, `bf16` nor `fp16`.
    """
    if mixed_precision == "no":
        return nullcontext()
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if mixed_precision not in dtypes:
        raise ValueError(f"mixed_precision is {mixed_precision!r}; this command takes no, bf16 and fp16")
    return torch.autocast(device.type, dtypes[mixed_precision])


def has_bf16_hardware() -> bool:
    """Whether the accelerator, or where there is none the CPU, multiplies bf16 matrices as such (AMX)."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.accelerator.is_available():  # mps and others: Trainer decides, unless a recipe says bf16
        return False
    return torch.cpu._is_amx_tile_supported()
