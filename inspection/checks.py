"""What a check is, and what all of them have in common."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..modeling.modeling_lorgnette import LorgnetteForConditionalGeneration


@dataclass(frozen=True)
class Check:
    """One thing about a model that is right, wrong, or could not be looked at.

    Args:
        name: a short name, the same in all reports: `frozen`, `gradients` …
        title: the same as a statement, which is true where the check passes.
        passed: None where it was not run.
        finding: what was seen, with the numbers.
        advice: what to do where it failed; what it needs where it was not run.
        figures: numbers, lists of them and texts that JSON can hold.
    """

    name: str
    title: str
    passed: bool | None
    finding: str
    advice: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)


@contextmanager
def undisturbed(model: LorgnetteForConditionalGeneration) -> Iterator[None]:
    """Eval mode and random numbers of one's own; afterwards the mode and the random state are what they were.

    Gradients are cleared at the end.
    """
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


def belongs_to_training(name: str) -> bool:
    """Whether a parameter of that name is to train: of the Q-Former, the projector, or LoRA in the language model."""
    return name.startswith(("qformer.", "projector.")) or (name.startswith("language_model.") and "lora_" in name)


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to, as reports call it."""
    if name == "qformer.query_tokens.weight":
        return "queries"
    top = name.split(".", 1)[0]
    return "LoRA" if top == "language_model" and "lora_" in name else PARTS.get(top, top)


PARTS = {"vision_model": "ViT", "qformer": "Q-Former", "projector": "projector", "language_model": "language model"}


def some(names: list[str], count: int = 3) -> str:
    """The first few of a list of names, for a message."""
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")
