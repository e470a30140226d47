"""Benchmark greedy captions, models alternately: time to the first token, and to all."""

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from benchmarks.floor import operations, wait
from benchmarks.sides import Batch, Side
from benchmarks.training import in_turn


class _FirstToken(StoppingCriteria):
    """Never stops; records the time of its first call, after the first token."""

    def __init__(self, device: str):
        self.device, self.at = device, None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.at is None:
            wait(self.device)
            self.at = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def caption(model: nn.Module, inputs: Batch, tokens: int, **keywords: Any) -> Any:
    """`(B, S + tokens)` ids, all of full length: random weights would stop at random."""
    return model.generate(
        **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, use_cache=True, **keywords
    )


def captions(
    built: Mapping[str, Side], inputs: Batch, tokens: int, rounds: int, device: str, **keywords: Any
) -> dict[str, dict[str, list[float]]]:
    """Seconds to the `first` token and to `all`, by side.

    Args:
        keywords: for `generate`.
    """
    first: dict[str, list[float]] = {name: [] for name in built}

    def timed(name: str, model: nn.Module) -> list[float]:
        clock = _FirstToken(device)
        wait(device)
        start = time.perf_counter()
        ids = caption(model, inputs, tokens, stopping_criteria=StoppingCriteriaList([clock]), **keywords)
        wait(device)
        took = time.perf_counter() - start
        if ids.shape[1] != inputs["input_ids"].shape[1] + tokens:
            raise ValueError(f"{name}: {ids.shape[1] - inputs['input_ids'].shape[1]} tokens instead of {tokens}")
        first[name].append(clock.at - start)
        return [took]

    runs = {name: side.model.eval() for name, side in built.items()}
    everything = in_turn({name: lambda _, n=name, m=model: timed(n, m) for name, model in runs.items()}, rounds)
    return {"first": first, "all": everything}


def needed(model: PreTrainedModel, inputs: Batch, tokens: int) -> tuple[int, int]:
    """Operations of captions with so many tokens, and the bytes of the LM's weights, which each token reads.

    All prompts are equal, so one row is counted.
    """
    alone = {name: tensor[:1] for name, tensor in inputs.items()}
    counted = operations(partial(caption, model, alone, tokens)) * len(inputs["input_ids"])
    weights = sum(value.numel() * value.element_size() for value in model.language_model.parameters())
    return counted, weights * tokens
