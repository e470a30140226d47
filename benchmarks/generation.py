"""Benchmark greedy captions, models alternately: time to the first token, and to all."""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from benchmarks import operations
from benchmarks import rows as data
from benchmarks.floor import wait
from benchmarks.sides import TOLERANCE, Batch, Side
from benchmarks.table import cost, speed
from benchmarks.training import in_turn
from lorgnette import LorgnetteCollator
from lorgnette.assembly import lora_folding
from lorgnette.assembly.prompt_cache import kept_prompts


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
    built: Mapping[str, Side],
    inputs: Mapping[str, Batch],
    tokens: int,
    rounds: int,
    device: str,
    least: int = 2,
    **keywords: Any,
) -> dict[str, dict[str, list[float]]]:
    """Seconds to the `first` token and to `all`, by side.

    Args:
        inputs: of each side.
        least: rounds that are run however long they take.
        keywords: for `generate`.
    """
    first: dict[str, list[float]] = {name: [] for name in built}

    def timed(name: str, model: nn.Module) -> list[float]:
        clock = _FirstToken(device)
        wait(device)
        start = time.perf_counter()
        ids = caption(model, inputs[name], tokens, stopping_criteria=StoppingCriteriaList([clock]), **keywords)
        wait(device)
        took = time.perf_counter() - start
        made = ids.shape[1] - inputs[name]["input_ids"].shape[1]
        if made != tokens:
            raise ValueError(f"{name}: {made} tokens instead of {tokens}")
        first[name].append(clock.at - start)
        return [took]

    runs = {name: side.model.eval() for name, side in built.items()}
    by_side = {name: lambda _, n=name, m=model: timed(n, m) for name, model in runs.items()}
    everything = in_turn(by_side, rounds, least)
    return {"first": first, "all": everything}


def weights_read(model: PreTrainedModel, tokens: int) -> int:
    """Bytes of the LM's weights, which each token of a batch reads."""
    return tokens * sum(value.numel() * value.element_size() for value in model.language_model.parameters())


def inputs_of(collator: LorgnetteCollator, rows: Sequence[dict[str, Any]], device: torch.device) -> dict[str, Batch]:
    """Each side's inputs of `generate`: the same prompts and pictures; ours has what else its collator says."""
    ours = {name: tensor.to(device) for name, tensor in collator.prompts(list(rows)).items()}
    common = {"input_ids", "attention_mask", "pixel_values"}
    return {"theirs": {name: tensor for name, tensor in ours.items() if name in common}, "ours": ours}


def check_equal(built: Mapping[str, Side], inputs: Mapping[str, Batch], tokens: int = 2) -> dict[str, float]:
    """The largest difference of logits from theirs, of each of some tokens.

    Raises:
        ValueError: it exceeds `sides.TOLERANCE`.
    """
    logits = {}
    for name, side in built.items():
        keywords = {"return_dict_in_generate": True, "output_logits": True}
        logits[name] = caption(side.model.eval(), inputs[name], tokens, **keywords).logits
    pairs = zip(logits["theirs"], logits["ours"], strict=True)
    apart = {f"token {n}": (ours - theirs).abs().max().item() for n, (theirs, ours) in enumerate(pairs)}
    if not max(apart.values()) <= TOLERANCE:
        raise ValueError(f"logits of captions are apart by {apart}; allowed is {TOLERANCE}")
    return apart


def measure(bench: Any, theirs: Side, ours: Side) -> None:
    """Add rows for captions a second and the time to the first token, with BLIP-2's and with chat prompts."""
    options, built, device = bench.options, {"theirs": theirs, "ours": ours}, ours.model.device
    for side in built.values():
        bench.use_fast_dtype(side, trained=True)
        caption(side.model.eval(), inputs_of(ours.collator, bench.rows[:1], device)["theirs"], 2)
    for size in options.sizes:
        inputs = inputs_of(ours.collator, bench.rows[:size], device)
        rounds = options.caption_rounds
        taken = captions(built, inputs, options.tokens, rounds, bench.device, least=rounds)
        every, first, prompt = taken["all"], taken["first"], inputs["ours"]["input_ids"].shape[1]
        fields = partial(_fields, bench, ours, size, prompt, 0)
        row = speed(f"captions/s, batch {size}", size, every["ours"], every["theirs"], **fields(options.tokens, every))
        bench.add(row, seconds=every)
        row = cost(f"first token, batch {size}, s", first["ours"], first["theirs"], **fields(1, first))
        bench.add(row, seconds=first)
        if device.type == "cuda":  # where LoRA is folded
            with mock.patch.object(lora_folding, "pays", return_value=False):
                plain = captions(built, inputs, options.tokens, rounds, bench.device, least=rounds)["all"]
            name = f"captions/s, LoRA not folded, batch {size}"
            bench.add(speed(name, size, plain["ours"], plain["theirs"]), seconds=plain)
    _first_tokens(bench, built)


def _first_tokens(bench: Any, built: Mapping[str, Side]) -> None:
    """Rows for batches of a data set with chat prompts; ours keeps what they begin with."""
    chat = LorgnetteCollator(data.processor(bench.preset, chat=True))
    ours, (prompt, shared) = built["ours"], data.chat_prompt(bench.preset)
    with kept_prompts(ours.model):  # as `evaluate` does
        for _ in range(2):  # what a prompt begins with is kept from its second call on
            caption(ours.model, inputs_of(chat, bench.rows[:1], ours.model.device)["ours"], 1)
        for size in [size for size in bench.options.sizes if size > 1]:
            inputs = inputs_of(chat, bench.rows[:size], ours.model.device)
            taken = captions(built, inputs, 1, bench.options.rounds, bench.device)["first"]
            fields = _fields(bench, ours, size, prompt, shared, 1, taken)
            row = cost(f"first token, chat prompts, batch {size}, s", taken["ours"], taken["theirs"], **fields)
            bench.add(row, seconds=taken)


def _fields(
    bench: Any, ours: Side, size: int, prompt: int, shared: int, tokens: int, taken: Mapping[str, list[float]]
) -> dict[str, float]:
    """Of a row for so many tokens: the bound, for seconds under one, and the share of the machine's best."""
    parts = operations.captions(bench.preset, size, prompt, tokens, shared)
    reached = bench.reached(sum(parts["ours"].values()), taken["ours"], weights_read(ours.model, tokens))
    return {"bound": operations.bound(parts, "theirs", "ours"), "reached": reached}
