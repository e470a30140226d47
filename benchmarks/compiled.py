"""Benchmark `torch.compile` for both sides: stage 2's step, captions with a static cache: `benchmarks.run --compile`.

Both are compiled with inductor's defaults and without dropout, so that the compiled step must give the eager loss. On
GPUs `generate` with a static cache compiles the decoding step; on a CPU both sides get a flag of transformers' tests
that enables it. The vision encoding and the prefill stay eager.
"""

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

from benchmarks import floor, generation, operations, sides, training
from benchmarks.sides import Side
from benchmarks.table import Row, speed


MULTIPLE = 16  # tokens
STEP = "stage 2, compiled, pairs/s"
AGAINST = {name: f"stage 2, {name} compiled against {name} as is, pairs/s" for name in ("ours", "theirs")}
FIRST_STEP = "stage 2, the first compiled step, s"
CAPTIONS, FIRST_CAPTIONS = "captions/s, static cache and compiled, batch {}", "the first compiled captions, batch {}, s"
Failed = dict[str, str]


def measure(bench: Any, theirs: Side, ours: Side) -> None:
    """Add the rows to a `benchmarks.run.Bench`, with the reason if nothing can be compiled."""
    built = {"theirs": theirs, "ours": ours}
    with mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(bench.scratch / "inductor")):  # forget earlier runs
        reason = reason_not_to_compile(bench.device)
        if reason is not None:
            for path in paths(bench.options.sizes):
                bench.add(Row(path, not_run=reason))
            return
        for side in built.values():
            bench.use_fast_dtype(side)
        steps(bench, built)
        for side in built.values():
            bench.use_fast_dtype(side, trained=True)
        for size in bench.options.sizes:
            torch.compiler.reset()  # a second size would make shapes dynamic
            captions(bench, built, size)


def paths(sizes: Sequence[int]) -> list[str]:
    """The paths of all rows."""
    of_captions = [path.format(size) for size in sizes for path in (CAPTIONS, FIRST_CAPTIONS)]
    return [STEP, *AGAINST.values(), FIRST_STEP, *of_captions]


def reason_not_to_compile(device: str) -> str | None:
    """Why nothing can be compiled here, for example a missing C++ compiler; else None."""
    try:
        torch.compile(_probe, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # any backend error goes into the table
        return error_cell(error)
    return None


def _probe(x: torch.Tensor) -> torch.Tensor:
    return (x * 2 + 1).relu()


def error_cell(error: Exception) -> str:
    """The error's type and main line, for a table cell."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no more is said'}".replace("|", "/")[:300]


def steps(bench: Any, built: Mapping[str, Side]) -> None:
    """Forward and backward passes over one batch, each side eager and compiled, alternately."""
    count, rows = bench.options.batch_size, bench.pairs[: bench.options.batch_size]
    built = {
        name: Side(side.model, replace(side.collator, pad_to_multiple_of=MULTIPLE)) for name, side in built.items()
    }
    runs, counted, first, graphs, failed = {}, {}, {}, {}, Failed()
    for name, side in built.items():
        plain = runs[name] = training.step_of(side, rows, bench.device, bench.bf16)
        counted[name] = floor.operations(plain)
        loss = plain()
        counters.clear()
        optimized = Side(torch.compile(side.model), side.collator)
        compiled = training.step_of(optimized, rows, bench.device, bench.bf16)
        try:
            first[name], found = _timed(compiled, bench.device)
            _check_near("the loss is", found, loss, bench.bf16)
        except Exception as error:  # any error goes into the table
            failed[name] = error_cell(error)
            continue
        runs[f"{name}, compiled"] = compiled
        graphs[name] = {"graphs": counters["stats"]["unique_graphs"], "breaks": dict(counters["graph_break"])}

    taken = training.in_turn(
        {name: lambda _, run=run: floor.seconds(run, bench.device) for name, run in runs.items()}, bench.options.rounds
    )
    for side in built.values():
        side.model.zero_grad()
    found = {name: taken[f"{name}, compiled"] for name in built if name not in failed}
    raw = {"seconds_a_step": taken, "operations_a_step": counted, "graphs": graphs}
    reached = partial(bench.reached, counted["ours"])
    bench.add(_compared(STEP, count, found, failed, reached), **raw)
    for name, path in AGAINST.items():
        if name in failed:
            bench.add(Row(path, not_run=failed[name]))
        else:
            bench.add(speed(path, count, found[name], taken[name]), **raw)
    bench.add(_first(FIRST_STEP, first, failed), seconds=first)


def captions(bench: Any, built: Mapping[str, Side], size: int) -> None:
    """Captions of a batch of pictures."""
    tokens, device = bench.options.tokens, bench.device
    inputs = sides.prompts(built["ours"].collator.processor, bench.rows[:size], built["ours"].model.device)
    how = CompileConfig(mode="reduce-overhead" if device == "cuda" else "default")  # CUDA graphs, the default
    how._compile_all_devices = True  # by default only on GPUs
    static = {"cache_implementation": "static", "compile_config": how}
    first, failed = {}, Failed()
    counters.clear()
    for name, side in built.items():
        with_logits = partial(
            generation.caption,
            side.model.eval(),
            inputs,
            tokens,
            return_dict_in_generate=True,
            output_logits=True,
        )
        expected = with_logits().logits
        try:
            first[name], found = _timed(partial(with_logits, **static), device)
            for place in range(min(2, tokens)):  # the prefill's, and the compiled step's first
                _check_near("logits are", found.logits[place], expected[place], bench.bf16)
        except Exception as error:  # any error goes into the table
            failed[name] = error_cell(error)
    runs = {name: side for name, side in built.items() if name not in failed}
    taken = generation.captions(runs, dict.fromkeys(runs, inputs), tokens, bench.options.rounds, device, **static)[
        "all"
    ]
    needed = sum(operations.captions(bench.preset, size, inputs["input_ids"].shape[1], tokens)["ours"].values())
    reached = partial(bench.reached, needed, moved=generation.weights_read(built["ours"].model, tokens))
    raw = {"seconds": taken, "operations": needed, "graphs": counters["stats"]["unique_graphs"]}
    bench.add(_compared(CAPTIONS.format(size), size, taken, failed, reached), **raw)
    bench.add(_first(FIRST_CAPTIONS.format(size), first, failed), seconds=first)


def _timed(work: Any, device: str) -> tuple[float, Any]:
    """Seconds, and the result."""
    floor.wait(device)
    start = time.perf_counter()
    found = work()
    floor.wait(device)
    return time.perf_counter() - start, found


def _check_near(what: str, found: torch.Tensor, expected: torch.Tensor, bf16: bool) -> None:
    largest = expected.abs().max().item()
    allowed = 2**-4 * largest if bf16 else sides.TOLERANCE * max(1, largest)  # bf16 is rounded at other places
    apart = (found - expected).abs().max().item()
    if not apart <= allowed:
        raise ValueError(f"{what} apart from the plain run's by {apart:.2g}; allowed is {allowed:.2g}")


def _compared(path: str, pairs: int, taken: Mapping[str, list[float]], failed: Failed, reached: Any) -> Row:
    """Ours against theirs; or the existing figures, and why others are missing."""
    if not failed:
        return speed(path, pairs, taken["ours"], taken["theirs"], reached=reached(taken["ours"]))
    speeds = {name: pairs / statistics.median(times) for name, times in taken.items()}
    return Row(path, **speeds, not_run="; ".join(f"{name}, {why}" for name, why in failed.items()))


def _first(path: str, seconds: Mapping[str, float], failed: Failed) -> Row:
    why = "; ".join(f"{name}, {why}" for name, why in failed.items()) or None
    return Row(path, **seconds, more_is_better=False, not_run=why)
