"""Benchmark stage 1 against both plain variants, after checking that all three give equal losses."""

import copy
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Blip2ForImageTextRetrieval

from benchmarks import floor, sides, training
from benchmarks.plain_stage1 import PlainStage1
from benchmarks.rows import stage1_processor
from benchmarks.shapes import Preset
from benchmarks.sides import Side
from benchmarks.table import speed
from lorgnette import LorgnetteCollator, LorgnetteForImageTextRetrieval


def build(preset: Preset, seed: int) -> dict[str, Side]:
    """Ours, `plain` and `separate`, with equal weights, on the CPU; they share the frozen ViT."""
    torch.manual_seed(seed)
    config, processor = preset.config(), stage1_processor(preset)
    config.qformer_config.use_qformer_text_input = True
    theirs = Blip2ForImageTextRetrieval(config).eval()
    nn.init.normal_(theirs.query_tokens, std=0.02)  # zeros would make all queries equal
    ours = LorgnetteForImageTextRetrieval.from_blip2(theirs, processor=processor)
    models = {"ours": ours}
    for name in ("plain", "separate"):
        own = copy.deepcopy(theirs, {id(theirs.vision_model): theirs.vision_model})
        models[name] = PlainStage1(own, ours, separate=name == "separate")
    collator = LorgnetteCollator(processor)
    return {name: Side(model, collator) for name, model in models.items()}


def check_equal(built: dict[str, Side], rows: list[dict[str, Any]]) -> dict[str, float]:
    """The largest difference of each loss from ours, in eval mode, which draws the same negatives.

    Raises:
        ValueError: a difference exceeds `sides.TOLERANCE`, or the numbers of trained parameters differ.
    """
    losses, trained = {}, {}
    for name, side in built.items():
        batch = {key: value.to(next(side.model.parameters()).device) for key, value in side.collator(rows).items()}
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
    count = bench.options.batch_size
    built = build(bench.preset, bench.options.seed)
    for side in built.values():
        side.model.to(bench.device)
    bench.raw["stage1_losses_apart"] = check_equal(built, bench.rows[:count])
    for side in built.values():
        bench.use_fast_dtype(side)
    taken = training.in_turn({name: partial(bench.train, side) for name, side in built.items()}, bench.options.rounds)
    operations = {}
    for name, side in built.items():
        operations[name] = floor.operations(training.step_of(side, bench.rows[:count], bench.device, bench.bf16))
        side.model.zero_grad()
    for name in ("plain", "separate"):
        reached = bench.reached(operations["ours"], taken["ours"])
        row = speed(f"stage 1 against {name}, pairs/s", count, taken["ours"], taken[name], reached=reached)
        bench.add(row, seconds_a_step=taken, operations_a_step=operations)
