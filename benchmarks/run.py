"""Benchmark speed and memory: transformers' BLIP-2 and ours on the same weights and rows, alternately in one process.

    python -m benchmarks.run [--device cpu|cuda] [--preset tiny|smollm2|blip2-opt-2.7b] [--compile]

Writes a table, a chart and all raw figures into `results/benchmarks`. Before any timing, both must give equal batches
and logits. The modules here define the figures and the setup of both sides: `sides.py`, `training.py`, `fast_paths.py`,
`plain_stage1.py`, `memory.py`, `generation.py`, `files.py`; goals in `goals.py`. `--compile` writes a separate table
with `torch.compile` for both sides: `compiled.py`.
"""

import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

from benchmarks import (
    compiled,
    fast_paths,
    files,
    floor,
    generation,
    memory,
    operations,
    several_texts,
    sides,
    stage1,
    training,
)
from benchmarks.forms import SAVE_FORMATS
from benchmarks.goals import GOALS, SHARES
from benchmarks.rows import PICTURES, TEXTS
from benchmarks.rows import rows as make_rows
from benchmarks.shapes import PRESETS
from benchmarks.table import Row, chart, cost, markdown, speed
from examples.demo.report import machine, versions
from examples.quality.steps import say
from lorgnette.trainer.precision import has_bf16_hardware


NOTES = (
    "theirs: `transformers.Blip2ForConditionalGeneration`, LoRA of peft, stock Trainer, a collator that pads; the "
    "same weights, rows, batches and dtypes, sdpa on both sides",
    "cached: ours reads the frozen ViT's features from disk; theirs has no cache and looks at the pictures each time. "
    "The first epoch of a cache costs one ViT pass a picture",
    "chat prompts: our own order, `<SYSTEM> <QUERY> <IMAGE> <OUTPUT>` in ChatML, with some 30 tokens before the "
    "picture that are the same in all rows: ours runs them once; theirs is given the very same tokens, and runs them "
    "in each row",
    "mixed lengths: captions of 3 to 100 words, drawn log-normally around 10.5, made up; ours is packed into rows of "
    "256 tokens, theirs padded",
    "what sharing and packing bring by themselves is in the rows against ours without them, cached on both sides",
    "chat prompts, mixed lengths: forward and backward passes alone, over a batch a round; other rows of training are "
    "whole steps of the stock Trainer, loading and optimizer included",
    "5 captions a picture: a step has 10 pairs in 2 pictures; ours gets a row for each picture, theirs, in stage 1 "
    "plain and separate, one for each pair with a picture of its own, and knows which pictures are the same",
    "training: each batch is run once before it is timed, on all sides, for kernels of its shapes are compiled then",
    "against …: what stands under theirs is that",
    "least to most: of the ratios within a round; of three, but of two where these take longer than half a minute; of "
    "captions and first token with BLIP-2's prompts always of five",
    "bound by operations: the ratio if both sides reached the same share of the machine, from shapes alone: "
    "`python -m benchmarks.operations`; of memory what our layers, Q-Former and projector save for backward, over all "
    "that a step of theirs takes. Reached of it: above 100% where ours has a better share of the machine",
    "first token, chat prompts: batches of a data set, as `evaluate` runs them: ours keeps what its prompts begin with",
    "stage 1 plain: one ViT pass, and the queries' keys and values used again for ITG; separate: three passes",
    "memory: the most that a forward and backward pass allocates at once; gradients were there before",
    "of the machine's best: operations of our path over the rate of one large matrix product here; of captions the "
    "larger of that and the LM's weights, once a token, over the bandwidth of a copy",
    "from_pretrained: theirs is the whole model with LoRA merged into it, since nothing else comes back by itself; its "
    "bytes are those of the checkpoint, too. All have been read before, and come from the disk's pages in memory",
    "torch.compile and static caches: `python -m benchmarks.run --compile`, in a table of its own",
)
COMPILED_NOTES = (
    "theirs: `transformers.Blip2ForConditionalGeneration` with LoRA of peft, on the same weights, rows and dtypes, "
    "sdpa on both sides; no dropout, so that a compiled step has to give the loss of the one as it is",
    "compiled: `torch.compile(model)` with inductor's defaults, forward and backward passes over one batch padded to a "
    "multiple of 16 tokens; as is: the same without",
    "captions: `generate(cache_implementation='static')`, whose steps transformers compiles; on a CPU with a flag of "
    "its own tests, given to both. The picture and the prompt are not compiled there, on either side",
    "the first compiled …: compiling included; theirs is compiled first, and what both have in common with it",
    "against …: what stands under theirs is that",
)


@dataclass
class Options:
    device: Literal["cpu", "cuda"] = field(default="cpu")
    preset: str = field(default="smollm2", metadata={"choices": list(PRESETS)})
    batch_size: int = field(default=8, metadata={"help": "Pairs in a batch of training."})
    steps: int = field(default=1, metadata={"help": "Timed steps of a run; on a GPU after one that is not."})
    rounds: int = field(default=3, metadata={"help": "Runs of each side, in turn; 2 of what takes long."})
    sizes: list[int] = field(default_factory=lambda: [1, 8, 64], metadata={"help": "Pictures captioned at once."})
    caption_rounds: int = field(default=5, metadata={"help": "Runs of captions, however long they take."})
    tokens: int = field(default=12, metadata={"help": "Length of each caption that is generated."})
    compile: bool = field(default=False, metadata={"help": "torch.compile and static caches, and nothing else."})
    seed: int = field(default=0)
    output: Path = field(default=Path("results/benchmarks"))


class Bench:
    """The settings of all parts of the benchmark, and their figures."""

    def __init__(self, options: Options, scratch: Path, argv: Sequence[str] = ()):
        self.options, self.scratch, self.device, self.argv = options, scratch, options.device, argv
        self.preset = PRESETS[options.preset].without_dropout() if options.compile else PRESETS[options.preset]
        self.goals: dict[str, float] = GOALS.get((options.preset, options.device), {})
        self.shares: dict[str, float] = SHARES.get((options.preset, options.device), {})
        self.raw: dict[str, Any] = {}
        self.table: list[Row] = []
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, and torch sees no CUDA GPU here")
        largest = max(options.batch_size, PICTURES * TEXTS, *options.sizes)
        trained = options.batch_size * max(options.steps + 1, options.rounds)
        self.raw["bytes_estimated"] = floor.check_memory(self.preset, options.preset, largest, self.device)
        self.bf16 = has_bf16_hardware(torch.device(self.device))
        size = {"cuda": 8192, "cpu": 2048}[self.device] if options.preset != "tiny" else 256
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        self.rate = floor.matrix_rate(self.device, dtype, size)
        self.bandwidth = floor.bandwidth(
            self.device, 2**28 if options.preset != "tiny" else 2**20
        )  # larger than any cache
        self.raw["machine"] = {"operations_per_s": self.rate, "bytes_per_s": self.bandwidth, "bf16": self.bf16}
        self.rows = make_rows(max(largest, trained, PICTURES * options.rounds), options.seed)
        self.pairs = self.rows[:trained]  # those that are trained on
        self.cached: training.CachedRows | None = None

    def add(self, row: Row, **raw: Any) -> None:
        row.goal = self.goals.get(row.path)
        if row.path in self.shares:
            row.goal = self.shares[row.path] * row.bound
        self.table.append(row)
        self.raw[row.path] = raw
        say(markdown([row], ()).splitlines()[2])
        write_raw(self)  # a run that is stopped leaves its rows

    def train(self, side: sides.Side, number: int, rows: Any = None, batch_size: int | None = None) -> list[float]:
        return training.train(
            side,
            self.pairs if rows is None else rows,
            batch_size=batch_size or self.options.batch_size,
            steps=self.options.steps,
            seed=self.options.seed + number,
            device=self.device,
            bf16=self.bf16,
            folder=self.scratch / "trainer",
        )

    def use_fast_dtype(self, side: sides.Side, trained: bool = False) -> None:
        """Cast frozen weights to bf16 if the machine has fast bf16; autocast handles trained ones."""
        if self.bf16:
            sides.to_bf16(side.model, trained)

    def reached(self, operations: int, taken: list[float], moved: int = 0) -> float:
        """The fraction of the machine's peak that so many operations, or bytes read, in the median time are."""
        return max(operations / self.rate, moved / self.bandwidth) / statistics.median(taken)


def main(argv: list[str]) -> int:
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses(argv)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options, Path(scratch).resolve(), argv)
        theirs, ours = sides.build(bench.preset, options.seed, options.device)
        for side in (theirs, ours):
            side.model.to(options.device)
        bench.raw["logits_apart"] = sides.check_equal(theirs, ours, bench.rows[: options.batch_size])
        bench.raw["parameters"] = {
            "all": sum(parameter.numel() for parameter in ours.model.parameters()),
            "trained": sides.trained_parameters(ours.model),
        }
        if options.compile:
            compiled.measure(bench, theirs, ours)
        else:
            compare(bench, theirs, ours)
            del theirs, ours, side
            stage1.measure(bench)
            taken = files.import_seconds(options.rounds)
            bench.add(cost("import, s", taken["ours"], taken["theirs"]), **taken)
    save(bench)
    return 0


def compare(bench: Bench, theirs: sides.Side, ours: sides.Side) -> None:
    """All parts except stage 1 and imports."""
    cases = fast_paths.cases(bench.preset, theirs, ours, bench.pairs, bench.options.seed)
    for case in cases:
        bench.raw[f"{case.name}_apart"] = fast_paths.check_equal(case, case.rows[:2])
    pictures = bench.rows[: PICTURES * bench.options.rounds]
    of_several = several_texts.cases(bench.preset, theirs, ours, pictures, bench.options.seed)
    for case in of_several:
        bench.raw[f"{case.name}_apart"] = several_texts.check_equal(case, case.rows[:PICTURES])
    chat = generation.inputs_of(cases[0].ours.collator, bench.rows[:2], ours.model.device)
    bench.raw["captions, chat prompts_apart"] = generation.check_equal({"theirs": theirs, "ours": ours}, chat)
    for side in (theirs, ours):
        bench.use_fast_dtype(side)
    stage2(bench, theirs, ours)
    for case in cases:
        fast_paths.measure(bench, case)
    several_texts.measure(bench, of_several)
    loading(bench, theirs, ours)
    generation.measure(bench, theirs, ours)
    measure_checkpoints(bench, theirs, ours)


def stage2(bench: Bench, theirs: sides.Side, ours: sides.Side) -> None:
    """Training: pairs a second, and the memory of a step."""
    count = bench.options.batch_size
    taken = training.in_turn(stage2_runs(bench, theirs, ours), bench.options.rounds, warm=True)
    cached = bench.cached
    counted, needed = {}, {}
    for name, side, rows in (
        ("theirs", theirs, bench.rows[:count]),
        ("uncached", ours, bench.rows[:count]),
        ("cached", ours, [cached[number] for number in range(count)]),
    ):
        step = training.step_of(side, rows, bench.device, bench.bf16)
        counted[name] = floor.operations(step)
        needed[name] = memory.step_bytes(step, bench.device)
        side.model.zero_grad()
    parts = operations.stage2(bench.preset, bench.rows[:count])
    mfu = {name: bench.reached(counted[name], taken[name]) for name in counted}
    for name in ("uncached", "cached"):
        fields = {"bound": operations.bound(parts, name), "reached": mfu[name]}
        row = speed(f"stage 2, {name}, pairs/s", count, taken[name], taken["theirs"], **fields)
        bench.add(row, seconds_a_step=taken, operations_a_step=counted)
    bench.add(Row("stage 2, uncached, MFU", mfu["uncached"], mfu["theirs"]), mfu=mfu)
    least = memory.least(ours, bench.rows[:count], bench.device, bench.bf16)
    for name in ("uncached", "cached"):
        in_mib = [needed[name] / 2**20], [needed["theirs"] / 2**20]
        row = cost(f"stage 2, {name}, memory of a step, MiB", *in_mib, bound=least / needed["theirs"])
        bench.add(row, bytes=needed | {"least": least})


def stage2_runs(bench: Bench, theirs: sides.Side, ours: sides.Side) -> dict[str, Callable[[int], list[float]]]:
    """A round's steps of `theirs`, `uncached` and `cached`, as `training.in_turn` calls them; writes the features."""
    bench.cached = training.CachedRows(ours, bench.pairs, bench.scratch / "features")
    return {
        "theirs": partial(bench.train, theirs),
        "uncached": partial(bench.train, ours),
        "cached": partial(bench.train, ours, rows=bench.cached),
    }


def loading(bench: Bench, theirs: sides.Side, ours: sides.Side) -> None:
    """Rows to batches, in this process."""

    def epoch(side: sides.Side, _number: int) -> list[float]:
        loader = DataLoader(bench.rows, bench.options.batch_size, collate_fn=side.collator)
        return floor.seconds(lambda: list(loader), bench.device)

    runs = {"theirs": partial(epoch, theirs), "ours": partial(epoch, ours)}
    taken = training.in_turn(runs, bench.options.rounds)
    bench.add(speed("data loader, pairs/s", len(bench.rows), taken["ours"], taken["theirs"]), seconds=taken)


def measure_checkpoints(bench: Bench, theirs: sides.Side, ours: sides.Side) -> None:
    """Sizes of checkpoints, and the time from one to a caption."""
    options = bench.options
    load, inputs, found = checkpoints(bench, theirs, ours)
    bench.add(cost("checkpoint weights, MB", [found["ours"] / 1e6], [found["theirs"] / 1e6]), bytes=found)
    taken = files.first_caption(load, inputs, options.tokens, options.rounds, bench.device)
    in_ms = {name: [1000 * time for time in times] for name, times in taken.items()}
    for form in SAVE_FORMATS:
        row = cost(f"from_pretrained to first caption, {form}, ms", in_ms[form], in_ms["theirs"])
        bench.add(row, seconds=taken)


def checkpoints(
    bench: Bench, theirs: sides.Side, ours: sides.Side
) -> tuple[dict[str, files.Load], sides.Batch, dict[str, int]]:
    """Save both sides; returns what loads each form, the inputs of one picture, and bytes of the weights."""
    inputs = sides.prompts(ours.collator.processor, bench.rows[:1], ours.model.device)
    expected = {name: files.logits_of(side.model, inputs) for name, side in (("theirs", theirs), ("ours", ours))}
    files.name_backbones(ours, theirs, bench.scratch)
    files.merge(theirs)
    found = files.checkpoint_bytes(theirs, ours, bench.scratch)
    return files.saved(ours, expected, inputs, bench.scratch, bench.device), inputs, found


def write_raw(bench: Bench) -> tuple[Path, str]:
    """All figures so far, as `PRESET-DEVICE.json`; that path, and the command."""
    options, command = bench.options, shlex.join(["python", "-m", "benchmarks.run", *bench.argv])
    report = {"command": command, "machine": machine(), "versions": versions(), "options": asdict(options)}
    report |= {
        "rows": [asdict(row) | {"ratio": row.ratio, "share": row.share, "met": row.met} for row in bench.table],
        "raw": bench.raw,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / (f"{options.preset}-{options.device}" + ("-compiled" if options.compile else "") + ".json")
    path.write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
    return path, command


def save(bench: Bench) -> None:
    """The report, and beside it a table, `.md`, and a chart, `.png`."""
    options, (path, command) = bench.options, write_raw(bench)
    title = f"{options.preset}{', compiled' if options.compile else ''}, {machine()}"
    text = f"# {title}\n\n`{command}`, seed {options.seed}; " + ", ".join(f"{k} {v}" for k, v in versions().items())
    text += f"\n\n{markdown(bench.table, COMPILED_NOTES if options.compile else NOTES)}"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    chart(bench.table, title, path.with_suffix(".png"))
    say(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
