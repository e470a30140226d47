"""Which mixed precision the commands run in, where nobody says."""

import os

import torch


def default_mixed_precision() -> str:
    """`bf16` where the machine multiplies bf16 matrices in hardware, `no` elsewhere; as accelerate's settings name it.

    What `accelerate launch --mixed_precision` or the variable `ACCELERATE_MIXED_PRECISION` says goes first. On a CPU
    with AMX a bf16 product takes a small part of the time of one in fp32; on a CPU that has to emulate it, longer.
    """
    return os.environ.get("ACCELERATE_MIXED_PRECISION") or ("bf16" if has_bf16_hardware() else "no")


def has_bf16_hardware() -> bool:
    """Whether the accelerator, or where there is none the CPU, has instructions for bf16 matrices."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.accelerator.is_available():  # mps and others: Trainer decides, unless a recipe says bf16
        return False
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
