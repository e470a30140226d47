"""Benchmark stage 1 against both plain variants, after checking that all three give equal losses.

One caption a picture, and several: ours gets a row for each picture, theirs one for each pair.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Blip2ForImageTextRetrieval

from benchmarks import operations, sides, training
from benchmarks import rows as data
from benchmarks.plain_stage1 import PlainStage1
from benchmarks.rows import PICTURES, TEXTS
from benchmarks.shapes import Preset
from benchmarks.sides import RowByRow, Side
from benchmarks.table import speed
from lorgnette import LorgnetteCollator, LorgnetteForImageTextRetrieval


def build(preset: Preset, seed: int) -> dict[str, Side]:
    """Ours, `plain` and `separate`, with equal weights, on the CPU; they share the frozen ViT."""
    torch.manual_seed(seed)
    config, processor = preset.config(), data.stage1_processor(preset)
    config.qformer_config.use_qformer_text_input = True
    theirs = Blip2ForImageTextRetrieval(config).eval()
    nn.init.normal_(theirs.query_tokens, std=0.02)  # zeros would make all queries equal
    ours = LorgnetteForImageTextRetrieval.from_blip2(theirs, processor=processor)
    collator = LorgnetteCollator(processor)
    built = {"ours": Side(ours, collator)}
    for name in ("plain", "separate"):
        own = copy.deepcopy(theirs, {id(theirs.vision_model): theirs.vision_model})
        built[name] = Side(PlainStage1(own, ours, separate=name == "separate"), RowByRow(collator))
    return built


def rows_of(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A side's rows: of theirs one for each pair."""
    return rows if name == "ours" else data.pairs(rows)


def check_equal(built: dict[str, Side], rows: list[dict[str, Any]]) -> dict[str, float]:
    """The largest difference of each loss from ours, in eval mode, which draws the same negatives.

    Raises:
        ValueError: a difference exceeds `sides.TOLERANCE`, or the numbers of trained parameters differ.
    """
    losses, trained = {}, {}
    for name, side in built.items():
        device = next(side.model.parameters()).device
        batch = {key: value.to(device) for key, value in side.collator(rows_of(name, rows)).items()}
        with torch.no_grad():
            output = side.model.eval()(**batch)
        losses[name] = {part: output[part].item() for part in ("loss_itc", "loss_itm", "loss_itg")}
        trained[name] = sides.trained_parameters(side.model)
    apart = {
        name: max(abs(found[part] - losses["ours"][part]) for part in found)
        for name, found in losses.items()
        if name != "ours"
    }
    if not max(apart.values()) <= sides.TOLERANCE:
        raise ValueError(f"losses of stage 1 are apart by {apart}; allowed is {sides.TOLERANCE}: {losses}")
    if len(set(trained.values())) > 1:
        raise ValueError(f"not as many parameters train in stage 1: {trained}")
    return apart


def measure(bench: Any) -> None:
    """Add the rows of stage 1 to a `benchmarks.run.Bench`."""
    built = build(bench.preset, bench.options.seed)
    for side in built.values():
        side.model.to(bench.device)
    one, several = rows_of_batches(bench)
    bench.raw["stage1_losses_apart"] = check_equal(built, one)
    bench.raw["stage1_several_losses_apart"] = check_equal(built, several[:PICTURES])
    for side in built.values():
        bench.use_fast_dtype(side)
    compare(bench, "stage 1", one, runs(bench, built))
    title = f"stage 1, {TEXTS} captions a picture,"
    compare(bench, title, several[:PICTURES], runs(bench, built, several))


def rows_of_batches(bench: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The first batch of one caption a picture, and the pictures of all rounds with several captions each."""
    pictures = bench.rows[: PICTURES * bench.options.rounds]
    return bench.rows[: bench.options.batch_size], data.with_texts(pictures, TEXTS, bench.options.seed)


def runs(
    bench: Any, built: dict[str, Side], several: list[dict[str, Any]] | None = None
) -> dict[str, Callable[[int], list[float]]]:
    """A round's steps of each side, as `training.in_turn` calls them; with `several`, on these pictures."""

    def of_several(name: str, number: int) -> list[float]:
        """The round's data set is one batch, so that all sides have the same pairs."""
        rows = rows_of(name, several[number * PICTURES :][:PICTURES])
        return bench.train(built[name], number, rows, len(rows))

    if several is not None:
        return {name: partial(of_several, name) for name in built}
    return {name: partial(bench.train, side) for name, side in built.items()}


def compare(bench: Any, title: str, rows: list[dict[str, Any]], runs: dict[str, Callable[[int], list[float]]]) -> None:
    """Time the runs in turn, and add a row against each of theirs.

    Args:
        rows: of a batch.
    """
    taken = training.in_turn(runs, bench.options.rounds, warm=True)
    parts = operations.stage1(bench.preset, rows)
    for name in ("plain", "separate"):
        row = speed(
            f"{title} against {name}, pairs/s",
            len(data.pairs(rows)),
            taken["ours"],
            taken[name],
            bound=operations.bound(parts, "ours", name),
            reached=bench.reached(sum(parts["ours"].values()), taken["ours"]),
        )
        bench.add(row, seconds_a_step=taken, operations_a_step=parts)
