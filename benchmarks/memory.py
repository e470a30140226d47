"""What a training step takes beside weights, gradients and the optimizer's state: activations and what is passing."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def step_bytes(step: Callable[[], object], device: str) -> int:
    """The most that is allocated at once during a forward and backward pass, above what there was before it.

    `step` has been called before: its gradients are there and are added to, so that they do not count. On a CPU the
    profiler's record of torch's allocations is what is read: resident memory would tell what malloc keeps as well,
    whoever asked for it.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        found.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return peak([event["args"]["Bytes"] for event in allocations(events)])


def allocations(events: list[dict]) -> list[dict]:
    """What a trace says of the CPU's memory, in the order of time."""
    found = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    return sorted(found, key=lambda event: event["ts"])


def peak(changes: list[int]) -> int:
    """The largest sum of a beginning of these, 0 at least: bytes allocated (above 0) and freed (below)."""
    most = now = 0
    for change in changes:
        now += change
        most = max(most, now)
    return most
