"""Profile rows of the benchmark's table: the parts of a step or of a load, and the operators that take its time.

    python -m benchmarks.profile --row stage2-captions [--preset smollm2] [--rounds 3]

Runs what `benchmarks.run` times, ours and theirs in turn on the same batches. Hooks take the time of the parts, on all
cores, `torch.profiler` that of operators, and for loading cProfile that of functions. Writes `ROW.json` and `ROW.md`.
Other processes of the machine are in all that a clock on the wall says: compare shares, and ratios of what ran in turn.
"""

import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from benchmarks import fast_paths, floor, generation, operations, run, several_texts, sides, stage1, training
from benchmarks.operators import functions_of, operators_of
from benchmarks.rows import PICTURES
from benchmarks.shapes import PRESETS
from benchmarks.step_parts import StepParts, bound_by_parts
from examples.demo.report import machine, versions
from examples.quality.steps import say


ROWS = ("stage2", "stage2-chat", "stage2-mixed", "stage2-captions", "stage2-captions-chat", "stage1",
        "stage1-captions", "loading")  # fmt: skip
ENVIRONMENT = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GLIBC_TUNABLES")
THEIRS = {"theirs", "plain", "separate"}
Table = dict[str, dict[str, float]]  # way -> part -> figure


@dataclass
class Options:
    row: str = field(metadata={"choices": ROWS, "help": "Rows of the table: all ways of a case, or all save formats."})
    preset: str = field(default="smollm2", metadata={"choices": list(PRESETS)})
    batch_size: int = field(default=8, metadata={"help": "Pairs in a batch of one caption a picture."})
    rounds: int = field(default=3)
    tokens: int = field(default=12, metadata={"help": "Of the first caption after loading."})
    seed: int = field(default=0)
    output: Path = field(default=Path("results/benchmarks/profiles"))


def main(argv: list[str]) -> int:
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses(argv)
    shared = {name: getattr(options, name) for name in ("preset", "batch_size", "rounds", "tokens", "seed")}
    report: dict[str, Any] = {"command": shlex.join(["python", "-m", "benchmarks.profile", *argv])}
    report |= {"machine": machine(), "versions": versions()}
    report["environment"] = {name: os.environ.get(name) for name in ENVIRONMENT}
    with tempfile.TemporaryDirectory() as scratch:
        bench = run.Bench(run.Options(sizes=[1], **shared), Path(scratch).resolve())
        report["peak"] = bench.raw["machine"]
        report |= loads(bench) if options.row == "loading" else steps(bench, options.row)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{options.row}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    text = markdown(f"{options.row}, {options.preset}", report)
    (options.output / f"{options.row}.md").write_text(text, encoding="utf-8")
    say(text)
    return 0


def steps(bench: run.Bench, row: str) -> dict[str, Any]:
    """A row's training: seconds of the parts of a step by round, and operators of one step."""
    runs, models, counted = case_of(bench, row)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    with StepParts(models) as parts:

        def kept(name: str, number: int) -> list[float]:
            seconds, by_part = parts.timed(lambda: runs[name](number))
            found[name].append(by_part)
            return seconds

        ways = {name: lambda number, name=name: kept(name, number) for name in runs}
        taken = training.in_turn(ways, bench.options.rounds, warm=True)
    found = {name: by_call[1::2] for name, by_call in found.items()}  # each batch ran once before it was timed
    operators = {name: operators_of(lambda one=one: one(0)) for name, one in runs.items()}
    return {"seconds": taken, "parts": found, "operations": counted, "operators": operators}


def case_of(bench: run.Bench, row: str) -> tuple[dict[str, Callable], list[Any], operations.Parts]:
    """What `benchmarks.run` times for these rows: the runs of a round, the models, and operations from shapes."""
    options = bench.options
    if row.startswith("stage1"):
        built = stage1.build(bench.preset, options.seed)
        for side in built.values():
            bench.use_fast_dtype(side)
        one, several = stage1.rows_of_batches(bench)
        runs = stage1.runs(bench, built, several if row == "stage1-captions" else None)
        first = several[:PICTURES] if row == "stage1-captions" else one
        return runs, [side.model for side in built.values()], operations.stage1(bench.preset, first)
    theirs, ours = sides.build(bench.preset, options.seed)
    pictures = bench.rows[: PICTURES * options.rounds]
    chat, mixed = fast_paths.cases(bench.preset, theirs, ours, bench.pairs, options.seed)
    captions, captions_chat = several_texts.cases(bench.preset, theirs, ours, pictures, options.seed)
    for side in (theirs, ours):
        bench.use_fast_dtype(side)
    models = [theirs.model, ours.model]
    if row.startswith("stage2-captions"):
        case = captions if row == "stage2-captions" else captions_chat
        cached = training.CachedRows(ours, case.rows, bench.scratch / "features")
        counted = operations.stage2(bench.preset, case.rows[:PICTURES], case.chat)
        return several_texts.runs(bench, case, cached), models, counted
    runs = run.stage2_runs(bench, theirs, ours)
    if row == "stage2":
        return runs, models, operations.stage2(bench.preset, bench.rows[: options.batch_size])
    by_round, counted = fast_paths.steps_of(bench, chat if row == "stage2-chat" else mixed)
    ways = {name: lambda number, own=own: floor.seconds(own[number], bench.device) for name, own in by_round.items()}
    return ways, models, counted


def loads(bench: run.Bench) -> dict[str, Any]:
    """Seconds of `from_pretrained` and of the caption after it by round, and functions of both."""
    theirs, ours = sides.build(bench.preset, bench.options.seed)
    for side in (theirs, ours):  # as at the end of `benchmarks.run`: captions are made with all weights in bf16
        bench.use_fast_dtype(side, trained=True)
    load, inputs, _ = run.checkpoints(bench, theirs, ours)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in load}

    def timed(name: str) -> list[float]:
        at = [time.process_time()]

        def loaded_and_used() -> None:
            model = load[name]()
            at.append(time.process_time())
            generation.caption(model, inputs, bench.options.tokens)
            at.append(time.process_time())

        seconds = floor.seconds(loaded_and_used, bench.device)
        found[name].append({"from_pretrained": at[1] - at[0], "first caption": at[2] - at[1]})
        return seconds

    ways = {name: lambda _, name=name: timed(name) for name in load}
    taken = training.in_turn(ways, bench.options.rounds)
    return {"seconds": taken, "parts": found, "functions": {name: functions_of(one) for name, one in load.items()}}


def markdown(title: str, report: dict[str, Any]) -> str:
    """The report to read."""
    medians = {name: {part: statistics.median(by.get(part, 0.0) for by in rounds) for part in _names(rounds)}
               for name, rounds in report["parts"].items()}  # fmt: skip
    walls = {name: statistics.median(taken) for name, taken in report["seconds"].items()}
    lines = [f"# {title}, {report['machine']}", "", f"`{report['command']}`, on a machine with other work on it", ""]
    counted = report.get("operations", {})
    lines += table("milliseconds on all cores, medians", medians, 1000)
    for theirs in sorted(THEIRS & counted.keys()):
        for way in sorted(medians.keys() - THEIRS, reverse=True):
            bound = bound_by_parts(medians[theirs], counted[theirs], counted[way])
            lines += [f"{theirs} over {way}, if each part did its operations at the rate of {theirs}: {bound:.2f}", ""]
    lines += [
        f"By the clock on the wall: {', '.join(f'{name} {1000 * wall:,.0f} ms' for name, wall in walls.items())}",
        "",
    ]
    if counted:
        lines += table("10⁹ operations, from shapes", counted, 1e-9)
    for name, found in report.get("operators", {}).items():
        kinds, total = found["kinds"], found["ms"]
        lines += [f"## Operators, {name}", "", "| kind | ms | share | GFLOP | GFLOP/s |", "|---|---|---|---|---|"]
        for kind, sums in kinds.items():
            rate = f"{sums['gflop']:.1f} | {1e3 * sums['gflop'] / sums['ms']:.0f}" if sums["gflop"] else " | "
            lines.append(f"| {kind} | {sums['ms']:.0f} | {sums['ms'] / total:.0%} | {rate} |")
        lines += ["", "| operator | calls | self ms | share |", "|---|---|---|---|"]
        lines += [f"| `{r['name']}` | {r['calls']} | {r['ms']:.0f} | {r['ms'] / total:.0%} |" for r in found["most"]]
        lines.append("")
    for name, found in report.get("functions", {}).items():
        for which, key in (("by their own time", "ms"), ("of the package, with what they call", "all")):
            rows = found["own" if key == "ms" else "ours"]
            lines += [f"## Functions, {name}, {which}", "", "| function | calls | ms |", "|---|---|---|"]
            lines += [*(f"| `{row['name']}` | {row['calls']} | {row[key]:.0f} |" for row in rows), ""]
    return "\n".join(lines)


def table(title: str, found: Table, unit: float) -> list[str]:
    """A column for each way, and of what each of theirs is in sum over it."""
    totals = {name: sum(by.values()) for name, by in found.items()}
    lines = [f"| {title} | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    for part in _names(list(found.values())):
        lines.append(f"| {part} | {' | '.join(f'{by.get(part, 0.0) * unit:,.1f}' for by in found.values())} |")
    lines.append(f"| all | {' | '.join(f'{total * unit:,.1f}' for total in totals.values())} |")
    for reference in [name for name in found if name in THEIRS]:
        ratios = " | ".join(f"{totals[reference] / total:.2f}" for total in totals.values())
        lines.append(f"| {reference} over this | {ratios} |")
    return [*lines, ""]


def _names(rows: Sequence[dict[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
