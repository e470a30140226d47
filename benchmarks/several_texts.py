"""Benchmark stage 2 on pictures of several captions each, with BLIP-2's prompts and with chat prompts.

Ours gets a row for each picture, with all its captions; BLIP-2 a row for each pair, with a picture of its own. Both
train on the same pairs in a step, after their losses and logits were found equal.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import Subset

from benchmarks import memory, operations, sides, training
from benchmarks import rows as data
from benchmarks.rows import PICTURES, TEXTS
from benchmarks.shapes import Preset
from benchmarks.sides import Batch, RowByRow, Side
from benchmarks.table import cost, speed
from lorgnette import LorgnetteCollator
from lorgnette.modeling.modeling_checks import IGNORED


NAME = f"{TEXTS} captions a picture"


@dataclass
class Case:
    """Args: rows: of several texts each; theirs: a side that gets pairs; ours: one that gets these rows."""

    name: str
    rows: list[dict[str, Any]]
    theirs: Side
    ours: Side
    chat: bool


def cases(preset: Preset, theirs: Side, ours: Side, rows: Sequence[dict[str, Any]], seed: int) -> list[Case]:
    """The two cases, with the pictures of these rows."""
    several = data.with_texts(rows, TEXTS, seed)
    chat = LorgnetteCollator(data.processor(preset, chat=True))
    return [
        Case(NAME, several, theirs, ours, chat=False),
        Case(f"{NAME}, chat prompts", several, Side(theirs.model, RowByRow(chat)), Side(ours.model, chat), chat=True),
    ]


def check_equal(case: Case, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The largest differences of our losses, from pictures and from features, and logits from theirs.

    Raises:
        ValueError: a difference exceeds `sides.TOLERANCE`, or the labels differ.
    """
    device = next(case.ours.model.parameters()).device
    batches = {
        name: {key: tensor.to(device) for key, tensor in batch.items()}
        for name, batch in {"theirs": case.theirs.collator(data.pairs(rows)), "ours": case.ours.collator(rows)}.items()
    }
    features = dict(batches["ours"])
    with torch.no_grad():
        found = case.ours.model.get_vision_features(features.pop("pixel_values")).last_hidden_state
    batches["ours, cached"] = features | {"vision_features": found}
    labels = {name: batch["labels"][batch["labels"] != IGNORED] for name, batch in batches.items()}
    if not torch.equal(labels["theirs"], labels["ours"]):
        raise ValueError(f"{case.name}: the two learn other labels: { ({k: v.tolist() for k, v in labels.items()}) }")
    losses = {name: _loss(_side(case, name), batch) for name, batch in batches.items()}
    logits = {name: _logits(_side(case, name), batch) for name, batch in batches.items()}
    apart = {f"loss, {name}": abs(loss - losses["theirs"]) for name, loss in losses.items() if name != "theirs"}
    apart |= {
        f"logits, {name}": (found - logits["theirs"]).abs().max().item()
        for name, found in logits.items()
        if name != "theirs"
    }
    if not max(apart.values()) <= sides.TOLERANCE:
        raise ValueError(f"{case.name}: the two are apart by {apart}; allowed is {sides.TOLERANCE}: {losses}")
    return apart


def _side(case: Case, name: str) -> Side:
    return case.theirs if name == "theirs" else case.ours


def _loss(side: Side, batch: Batch) -> float:
    side.model.eval()
    side.model.training = True  # the training path, without dropout
    with torch.no_grad():
        return side.model(**batch)["loss"].item()


def _logits(side: Side, batch: Batch) -> torch.Tensor:
    """`(R, vocabulary)`, in front of each label."""
    with torch.no_grad():
        logits = side.model.eval()(**batch)["logits"]
    return logits[:, :-1][batch["labels"][:, 1:] != IGNORED]


def measure(bench: Any, found: Sequence[Case]) -> None:
    """Add the rows of the cases, which have the same pictures, to a `benchmarks.run.Bench`."""
    cached = training.CachedRows(found[0].ours, found[0].rows, bench.scratch / "features-several")
    for case in found:
        trained(bench, case, cached)
    step_memory(bench, found[0])


def trained(bench: Any, case: Case, cached: training.CachedRows) -> None:
    """Whole steps of the stock Trainer; a round's data set is one batch, so that both sides have the same pairs."""
    pairs = PICTURES * TEXTS
    taken = training.in_turn(runs(bench, case, cached), bench.options.rounds, warm=True)
    parts = operations.stage2(bench.preset, case.rows[:PICTURES], case.chat)
    for name in ("uncached", "cached"):
        row = speed(
            f"stage 2, {case.name}, {name}, pairs/s",
            pairs,
            taken[name],
            taken["theirs"],
            bound=operations.bound(parts, name),
            reached=bench.reached(sum(parts[name].values()), taken[name]),
        )
        bench.add(row, seconds_a_step=taken, operations_a_step=parts)


def runs(bench: Any, case: Case, cached: training.CachedRows) -> dict[str, Callable[[int], list[float]]]:
    """A round's steps of `theirs`, `uncached` and `cached`, as `training.in_turn` calls them."""

    def run(name: str, number: int) -> list[float]:
        at = range(number * PICTURES, (number + 1) * PICTURES)
        if name == "theirs":
            return bench.train(case.theirs, number, data.pairs([case.rows[n] for n in at]), PICTURES * TEXTS)
        rows = Subset(cached, at) if name == "cached" else [case.rows[n] for n in at]
        return bench.train(case.ours, number, rows, PICTURES)

    return {name: partial(run, name) for name in ("theirs", "uncached", "cached")}


def step_memory(bench: Any, case: Case) -> None:
    """Of one step over the same pairs."""
    rows, needed = case.rows[:PICTURES], {}
    for name, side, own in (("theirs", case.theirs, data.pairs(rows)), ("uncached", case.ours, rows)):
        step = training.step_of(side, own, bench.device, bench.bf16)
        needed[name] = memory.step_bytes(step, bench.device, side.model)
        side.model.zero_grad()
    least = memory.least(case.ours, rows, bench.device, bench.bf16)
    ours, theirs = ([needed[name] / 2**20] for name in ("uncached", "theirs"))
    path = f"stage 2, {case.name}, uncached, memory of a step, MiB"
    bench.add(cost(path, ours, theirs, bound=least / needed["theirs"]), bytes=needed | {"least": least})
