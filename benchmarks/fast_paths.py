"""Benchmark stage 2's fast paths on rows that suit them: BLIP-2, ours, and ours without the fast path.

    chat prompts    `<SYSTEM> <QUERY> <IMAGE> <OUTPUT>` in ChatML: the prefix before the picture is the same in
                    all rows of a batch, and ours computes it once. Blip2Processor cannot write such prompts, so
                    BLIP-2 gets our collator's batches: the same tokens
    mixed lengths   captions of 3 to 100 words, many short and few long: ours packs them, theirs pads

Seconds are those of forward and backward passes over prepared batches, one per round.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import floor, operations, sides, training
from benchmarks import rows as data
from benchmarks.shapes import Preset
from benchmarks.sides import RowByRow, Side
from benchmarks.table import speed
from lorgnette import LorgnetteCollator


PACK_TO = 256  # tokens


@dataclass
class Case:
    """Rows of one kind, and the sides that train on them.

    Args:
        plain: ours without the fast path that `against` names.
    """

    name: str
    against: str
    rows: list[dict[str, Any]]
    theirs: Side
    ours: Side
    plain: Side


def cases(preset: Preset, theirs: Side, ours: Side, rows: Sequence[dict[str, Any]], seed: int) -> list[Case]:
    """The two cases, with the pictures of these rows."""
    chat = LorgnetteCollator(data.processor(preset, chat=True))
    in_each = RowByRow(chat)
    mixed = [row | {"text": text} for row, text in zip(rows, data.captions(len(rows), seed, mixed=True), strict=True)]
    return [
        Case(
            "chat prompts",
            "ours with the beginning run in each row",
            list(rows),
            Side(theirs.model, in_each),
            Side(ours.model, chat),
            Side(ours.model, in_each),
        ),
        Case(
            "mixed lengths, packed",
            "ours padded",
            mixed,
            theirs,
            Side(ours.model, replace(ours.collator, pack_to=PACK_TO)),
            ours,
        ),
    ]


def check_equal(case: Case, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The largest differences of our logits and losses from theirs.

    Raises:
        ValueError: a difference exceeds `sides.TOLERANCE`, or batches differ.
    """
    apart = sides.check_equal(case.theirs, case.plain, rows)
    losses = {}
    for name in ("theirs", "ours", "plain"):
        side: Side = getattr(case, name)
        side.model.eval()
        side.model.training = True  # the training path, without dropout
        batch = {key: tensor.to(next(side.model.parameters()).device) for key, tensor in side.collator(rows).items()}
        with torch.no_grad():
            losses[name] = side.model(**batch)["loss"].item()
    apart |= {f"loss, {name}": abs(loss - losses["theirs"]) for name, loss in losses.items() if name != "theirs"}
    if not max(apart.values()) <= sides.TOLERANCE:
        raise ValueError(f"{case.name}: losses are apart by {apart}; allowed is {sides.TOLERANCE}: {losses}")
    return apart


def measure(bench: Any, case: Case) -> None:
    """Add a case's rows to a `benchmarks.run.Bench`, which has features of the same pictures."""
    count, device = bench.options.batch_size, bench.device
    steps, parts = steps_of(bench, case)
    counted = {name: floor.operations(by_round[0]) for name, by_round in steps.items()}  # allocates gradients
    runs = {
        name: lambda number, by_round=by_round: floor.seconds(by_round[number], device)
        for name, by_round in steps.items()
    }
    taken = training.in_turn(runs, bench.options.rounds, warm=True)
    for side in (case.theirs, case.ours):
        side.model.zero_grad()
    for name, against, path in (
        ("uncached", "theirs", f"stage 2, {case.name}, uncached, pairs/s"),
        ("cached", "theirs", f"stage 2, {case.name}, cached, pairs/s"),
        ("cached", "plain", f"stage 2, {case.name}, cached, against {case.against}, pairs/s"),
    ):
        fields = {"bound": operations.bound(parts, name, against), "reached": bench.reached(counted[name], taken[name])}
        row = speed(path, count, taken[name], taken[against], **fields)
        bench.add(row, seconds_a_step=taken, operations_a_step=counted)


def steps_of(bench: Any, case: Case) -> tuple[dict[str, list[Callable[[], torch.Tensor]]], operations.Parts]:
    """Each way's forward and backward passes, one a round, and the operations of the first by part."""
    count = bench.options.batch_size
    features = [bench.cached[number] | {"text": row["text"]} for number, row in enumerate(case.rows)]
    ways = {
        "theirs": (case.theirs, case.rows),
        "uncached": (case.ours, case.rows),
        "cached": (case.ours, features),
        "plain": (case.plain, features),
    }
    steps = {
        name: [
            training.step_of(side, rows[number * count :][:count], bench.device, bench.bf16)
            for number in range(bench.options.rounds)
        ]
        for name, (side, rows) in ways.items()
    }
    parts = {
        name: operations.stage2_of(bench.preset, side.collator(list(rows[:count])), all_logits=name == "theirs")
        for name, (side, rows) in ways.items()
    }
    return steps, parts
