"""Measure the machine's peak rates of matrix products and copies, and count a path's operations."""

import time
from collections.abc import Callable

import psutil
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.shapes import Preset, bytes_needed


GIB = 2**30


def check_memory(preset: Preset, name: str, batch_size: int, device: str) -> int:
    """Refuse a preset that does not fit.

    Returns:
        the estimate, in bytes.

    Raises:
        ValueError: the estimate exceeds the free memory; with both numbers.
    """
    needed = bytes_needed(preset, batch_size)
    free = psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info()[0]
    total = sum(needed.values())
    if total > free:
        parts = ", ".join(f"{what} {size / GIB:.1f}" for what, size in needed.items())
        raise ValueError(
            f"preset {name} with batches of {batch_size} takes about {total / GIB:.1f} GiB ({parts}), and {device} has "
            f"{free / GIB:.1f} GiB free: take a smaller preset or machine of more memory"
        )
    return total


def seconds(work: Callable[[], object], device: str, repeats: int = 1) -> list[float]:
    """Seconds of each call, including the device's work."""
    taken = []
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        taken.append(time.perf_counter() - start)
    return taken


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def matrix_rate(device: str, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations a second of a product of square matrices: the best of several."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    torch.mm(a, b)
    return 2 * size**3 / min(seconds(lambda: torch.mm(a, b), device, 15))


def bandwidth(device: str, size: int) -> float:
    """Bytes a second, read and written, of a copy of `size` bytes: the best of several."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / min(seconds(lambda: target.copy_(source), device, 15))


def operations(work: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products in a call, backward passes included."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # the counter does not see the CPU's fused attention
        work()
    return counter.get_total_flops()
