"""The result of a check, and helpers of all checks."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..modeling.modeling_lorgnette import LorgnetteForConditionalGeneration


@dataclass(frozen=True)
class Check:
    """The result of one check: passed, failed, or not run.

    Args:
        name: a short name, the same in all reports: `frozen`, `gradients` …
        title: a statement that is true if the check passes.
        passed: None if it was not run.
        finding: the result, with the numbers.
        advice: what to do if it failed; what it needs if it was not run.
        figures: JSON-serialisable numbers, lists and texts.
    """

    name: str
    title: str
    passed: bool | None
    finding: str
    advice: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)


@contextmanager
def preserved_state(model: LorgnetteForConditionalGeneration) -> Iterator[None]:
    """Run the block in eval mode with a fixed seed; at the end restore mode and random state, and clear gradients."""
    mode = model.training
    device = model.device
    with torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type):
        torch.manual_seed(0)
        model.eval()
        try:
            yield
        finally:
            model.train(mode)
            model.zero_grad(set_to_none=True)


def should_train(name: str) -> bool:
    """Whether a parameter should train: those of the Q-Former, the projector, and LoRA in the language model."""
    return name.startswith(("qformer.", "projector.")) or (name.startswith("language_model.") and "lora_" in name)


def part_of(name: str) -> str:
    """The part that a parameter belongs to, by its name in reports."""
    if name == "qformer.query_tokens.weight":
        return "queries"
    top = name.split(".", 1)[0]
    return "LoRA" if top == "language_model" and "lora_" in name else PARTS.get(top, top)


PARTS = {"vision_model": "ViT", "qformer": "Q-Former", "projector": "projector", "language_model": "language model"}


def first_few(names: list[str], count: int = 3) -> str:
    """The first few of a list of names, for a message."""
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")
