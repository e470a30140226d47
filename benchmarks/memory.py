"""Measure a training step's memory besides weights, gradients and optimizer state: activations and temporaries.

`python -m benchmarks.memory` prints it for the parts of both models.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import HfArgumentParser

from benchmarks import rows as data
from benchmarks import sides
from benchmarks.operations import Options
from benchmarks.shapes import PRESETS


HEAD = "LM's head, and between the parts"


def step_bytes(step: Callable[[], object], device: str, model: nn.Module | None = None) -> int:
    """The peak of additional memory during a forward and backward pass.

    On a CPU it reads torch's allocations from the profiler, since resident memory includes what malloc keeps.

    Args:
        model: its gradients are allocated before, so that they do not count; without it call `step` once before.
    """
    for parameter in () if model is None else model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
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
    """A trace's CPU memory events, in order of time."""
    found = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    return sorted(found, key=lambda event: event["ts"])


def peak(changes: list[int]) -> int:
    """The largest prefix sum, at least 0, of bytes allocated (positive) and freed (negative)."""
    most = now = 0
    for change in changes:
        now += change
        most = max(most, now)
    return most


def least(side: sides.Side, rows: Sequence[dict[str, Any]], device: str, bf16: bool) -> int:
    """Bytes that layers, Q-Former and projector save for backward: a step takes these, whatever its head does."""
    return sum(size for part, size in kept(side, rows, device, bf16).items() if part != HEAD)


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The parts of either model of stage 2, by their names in the tables."""
    return {
        "ViT": model.vision_model,
        "Q-Former": model.qformer,
        "projector": getattr(model, "projector", None) or model.language_projection,
        "LM's layers": model.language_model.base_model,
    }


def kept(side: sides.Side, rows: Sequence[dict[str, Any]], device: str = "cpu", bf16: bool = False) -> dict[str, int]:
    """Bytes that a forward pass saves for backward, by part, without parameters."""
    model = side.model.train()
    batch = {name: tensor.to(device) for name, tensor in side.collator(list(rows)).items()}
    parts = parts_of(model)
    running, found = [HEAD], dict.fromkeys(parts, 0)
    counted = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    held = []  # keeps their addresses unique

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            held.append(storage)
            found[running[-1]] = found.get(running[-1], 0) + storage.nbytes()
        return tensor

    def ends(*_: Any) -> None:
        running.pop()

    hooks = [part.register_forward_hook(ends) for part in parts.values()]
    for name, part in parts.items():
        hooks.append(part.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast(device, torch.bfloat16, enabled=bf16),
    ):
        model(**batch)
    for hook in hooks:
        hook.remove()
    return found


def main(argv: list[str]) -> int:
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses(argv)
    preset, rows = PRESETS[options.preset], data.rows(options.batch_size, options.seed)
    several = data.with_texts(data.rows(options.pictures, options.seed), options.texts, options.seed)
    theirs, ours = sides.build(preset, options.seed)
    for title, of_theirs, of_ours in (
        (f"{len(rows)} pairs", rows, rows),
        (f"{len(data.pairs(several))} pairs, {options.texts} texts a picture", data.pairs(several), several),
    ):
        found = kept(theirs, of_theirs), kept(ours, of_ours)
        lines = [f"| MiB saved for backward, {title} | theirs | ours |", "|---|---|---|"]
        lines += [f"| {part} | {found[0][part] / 2**20:.1f} | {found[1][part] / 2**20:.1f} |" for part in found[0]]
        lines.append(f"| all | {' | '.join(f'{sum(parts.values()) / 2**20:.1f}' for parts in found)} |")
        sys.stdout.write("\n".join(lines) + "\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
