"""Greedy captions of two models in turn: how long the first token takes, and all of them."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import StoppingCriteria, StoppingCriteriaList

from benchmarks.floor import wait
from benchmarks.sides import Batch, Side, prompts
from benchmarks.training import in_turn


class _FirstToken(StoppingCriteria):
    """Ends nothing; notes when it was first asked, which is after the first token."""

    def __init__(self, device: str):
        self.device, self.at = device, None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.at is None:
            wait(self.device)
            self.at = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def caption(model: nn.Module, inputs: Batch, tokens: int, **keywords: Any) -> torch.Tensor:
    """`(B, S + tokens)` ids, none shorter: random weights would end when they like."""
    return model.generate(
        **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, use_cache=True, **keywords
    )


def captions(
    theirs: Side, ours: Side, rows: Sequence[dict[str, Any]], tokens: int, rounds: int, device: str
) -> dict[str, dict[str, list[float]]]:
    """Seconds to the `first` token and to `all`, of theirs and ours, for the rows as one batch."""
    inputs = prompts(ours.collator.processor, rows, ours.model.device)
    first: dict[str, list[float]] = {"theirs": [], "ours": []}

    def timed(name: str, model: nn.Module) -> list[float]:
        clock = _FirstToken(device)
        wait(device)
        start = time.perf_counter()
        ids = caption(model, inputs, tokens, stopping_criteria=StoppingCriteriaList([clock]))
        wait(device)
        took = time.perf_counter() - start
        if ids.shape[1] != inputs["input_ids"].shape[1] + tokens:
            raise ValueError(f"{name}: {ids.shape[1] - inputs['input_ids'].shape[1]} tokens instead of {tokens}")
        first[name].append(clock.at - start)
        return [took]

    runs = {name: side.model.eval() for name, side in (("theirs", theirs), ("ours", ours))}
    everything = in_turn({name: lambda _, n=name, m=model: timed(n, m) for name, model in runs.items()}, rounds)
    return {"first": first, "all": everything}
