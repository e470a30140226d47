"""Benchmark scaling: a training step over its sizes, and a feature cache over rows.

    python -m benchmarks.growth [--shapes tiny smollm2] [--batch_sizes 1 2 4 …] [--cache_rows 1000 10000 100000]

Measures pairs a second and peak memory of a step of stage 2 with random weights, from pictures and from cached
features, varying one size at a time: pictures in a batch, image tokens, tokens of a caption, or captions of a picture,
which follow one another in a row. And random reads of a cache. Writes
`results/benchmarks/growth.json`, `.md` and `.png`. Skips and reports what does not fit into
memory or on the disk, or would start after `--minutes`. Prints the minimum minutes and disk space before measuring; one
cache exists at a time (100,000 rows of `smollm2` are 30.3 GB, of `tiny` 0.1 GB).
"""

import itertools
import json
import math
import random
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from datasets import Dataset
from matplotlib.figure import Figure  # without pyplot: no window, whatever the machine
from matplotlib.lines import Line2D
from transformers import Blip2ForConditionalGeneration, HfArgumentParser

from benchmarks import floor, memory
from benchmarks import rows as data
from benchmarks.operations import padded_positions, stage2_step
from benchmarks.shapes import PRESETS, Preset
from benchmarks.sides import LORA
from examples.demo.report import machine, versions
from examples.quality.steps import say
from lorgnette import LorgnetteForConditionalGeneration
from lorgnette.modeling.modeling_checks import IGNORED
from lorgnette.trainer.feature_cache import COLUMN, METADATA, feature_opener, load_cache, planned_shards


SUPER_LINEAR = 1.1  # report costs that grow with a larger power of the size
DASHES = {"pictures": ("o", "-"), "features": ("s", "--"), "cache": ("^", ":")}  # marker and line
AXES = {
    "batch": "pairs in a batch",
    "image": "image tokens",
    "caption": "tokens of a caption",
    "texts": "texts a picture",
    "cache": "rows cached",
}


@dataclass
class Options:
    shapes: list[str] = field(default_factory=lambda: ["tiny", "smollm2"], metadata={"help": ", ".join(PRESETS)})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])
    image_tokens: list[int] = field(default_factory=lambda: [8, 16, 32, 64, 128, 256])
    caption_tokens: list[int] = field(default_factory=lambda: [8, 16, 32, 64, 128, 256])
    texts_per_image: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    cache_rows: list[int] = field(default_factory=lambda: [10**3, 10**4, 10**5])
    usual: list[int] = field(default_factory=lambda: [8, 32, 16], metadata={"help": "Batch, image, caption otherwise."})
    repeats: int = field(default=3, metadata={"help": "Timed steps, after two that are not."})
    minutes: float = field(default=60, metadata={"help": "Nothing is begun after so many; reports are written then."})
    scratch: Path | None = field(
        default=None, metadata={"help": "Where caches lie while they are read; the system's temporary folder."}
    )
    seed: int = field(default=0)
    output: Path = field(default=Path("results/benchmarks"))


UNTIMED = 2  # steps before timing: the first counts operations, the second memory


class Size(NamedTuple):
    """A step's sizes: pictures, image tokens, tokens of a caption and captions of a picture; `axis` is varied."""

    axis: str
    pictures: int
    image: int
    words: int
    texts: int = 1

    @property
    def length(self) -> int:
        """Tokens of a row: each text begins with the prompt's last token."""
        return self.image - 1 + self.texts * (1 + self.words)

    @property
    def varied(self) -> int:
        return {"batch": self.pictures, "image": self.image, "caption": self.words, "texts": self.texts}[self.axis]


@dataclass
class Point:
    """Args: kind: pictures, features or cache; operations: of a step's matrix products; left_out: why, if it was."""

    shape: str
    axis: str
    kind: str
    size: int
    pairs_per_s: float | None = None
    bytes: int | None = None
    operations: int | None = None
    left_out: str | None = None


def main(argv: list[str]) -> int:
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses(argv)
    points: list[Point] = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        say(needed(options, Path(scratch)))
        until = time.monotonic() + 60 * options.minutes
        for shape in options.shapes:
            for point in itertools.chain(
                steps(shape, options, until), caches(shape, options, Path(scratch).resolve(), until)
            ):
                points.append(point)
                say(_line(point))
    save(points, options, shlex.join(["python", "-m", "benchmarks.growth", *argv]))
    return 0


def needed(options: Options, scratch: Path) -> str:
    """The minimum requirements: minutes for the operations, and bytes on the disk."""
    operations = 0.0
    for shape in options.shapes:
        for size in sizes(options):
            preset = replace(PRESETS[shape], num_query_tokens=size.image)
            rows, labels = size.pictures, size.pictures * size.texts * size.words
            parts = stage2_step(preset, pictures=rows, rows=rows, length=size.length, logits=padded_positions(labels))
            steps_of_both = 2 * sum(parts.values()) - parts["ViT"]
            operations += (UNTIMED + options.repeats) * steps_of_both
    rate = floor.matrix_rate("cpu", torch.float32, 1024)
    largest = max((cache_bytes(shape, rows) for shape in options.shapes for rows in options.cache_rows), default=0)
    return (
        f"{operations / 1e12:,.3g} · 10¹² operations: {operations / rate / 60:.3g} minutes at least, with this "
        f"machine's {rate / 1e9:,.3g} · 10⁹ a second; nothing is begun after {options.minutes:g} minutes. The largest "
        f"cache is {largest / 1e9:.1f} GB; {scratch} has {shutil.disk_usage(scratch).free / 1e9:.1f} GB free"
    )


def sizes(options: Options) -> list[Size]:
    """Grouped by the number of image tokens."""
    batch, image, caption = options.usual
    found = [Size("batch", size, image, caption) for size in options.batch_sizes]
    found += [Size("caption", batch, image, size) for size in options.caption_tokens]
    found += [Size("texts", batch, image, caption, size) for size in options.texts_per_image]
    return found + [Size("image", batch, size, caption) for size in options.image_tokens]


def steps(shape: str, options: Options, until: float = math.inf) -> Iterator[Point]:
    """Forward and backward passes of stage 2, none started after `until` of `time.monotonic`."""
    for tokens, grouped in itertools.groupby(sizes(options), key=lambda size: size.image):  # one model for each
        group = list(grouped)
        room = max(tokens + size.words + 1 for size in group)
        preset, model = with_room(replace(PRESETS[shape], num_query_tokens=tokens), room), None
        for size in group:
            try:
                floor.check_memory(replace(preset, num_query_tokens=size.length), shape, size.pictures, "cpu")
                left_out = None
            except ValueError as error:
                left_out = str(error)
            for kind in ("pictures", "features"):
                point = Point(shape, size.axis, kind, size.varied)
                point.left_out = left_out or time_limit_reason(options, until)
                if point.left_out is None:
                    model = build(preset, options.seed) if model is None else model
                    measure(model, point, size, options.repeats)
                yield point


def time_limit_reason(options: Options, until: float) -> str | None:
    return f"the {options.minutes:g} minutes were over" if time.monotonic() > until else None


def with_room(preset: Preset, tokens: int) -> Preset:
    """The preset with an LM that has positions for so many tokens; with RoPE they are no weights."""
    fields = preset.text.to_dict()
    room = max(tokens, fields["max_position_embeddings"])
    return replace(preset, text=type(preset.text).from_dict(fields | {"max_position_embeddings": room}))


def build(preset: Preset, seed: int) -> LorgnetteForConditionalGeneration:
    torch.manual_seed(seed)
    processor = data.processor(preset)
    blip2 = Blip2ForConditionalGeneration(preset.config(image_token_index=processor.image_token_id))
    lora = LORA | {"target_modules": list(preset.lora_targets)}
    return LorgnetteForConditionalGeneration.from_blip2(blip2, processor=processor, lora=lora).train()


def measure(model: LorgnetteForConditionalGeneration, point: Point, size: Size, repeats: int) -> None:
    """Fills in a point's figures."""
    batch = batch_of(model, size, point.kind)

    def step() -> None:
        model(**batch).loss.backward()

    point.operations = floor.operations(step)  # allocates gradients; later steps add to them
    point.bytes = memory.step_bytes(step, "cpu")
    point.pairs_per_s = size.pictures * size.texts / statistics.median(floor.seconds(step, "cpu", repeats))
    model.zero_grad()


def batch_of(model: LorgnetteForConditionalGeneration, size: Size, kind: str) -> dict[str, torch.Tensor]:
    """Pictures or features of noise, with captions of random tokens: none is padded."""
    vision, placeholder = model.config.vision_config, model.config.image_token_id
    image = torch.full((size.pictures, size.image - 1), placeholder)
    captions = torch.randint(3, model.config.text_config.vocab_size - 1, (size.pictures, size.texts, 1 + size.words))
    captions[:, 0, 0] = placeholder  # as the collator has it, each text begins with the prompt's last token
    ids = torch.cat([image, captions.flatten(1)], dim=1)
    captions[:, :, 0] = IGNORED
    batch = {"input_ids": ids, "labels": torch.cat([torch.full_like(image, IGNORED), captions.flatten(1)], dim=1)}
    if size.texts == 1:
        batch["attention_mask"] = torch.ones_like(ids)
    else:
        batch["sequence_ids"] = torch.arange(size.pictures)[:, None].expand_as(ids)
        texts = torch.arange(1, size.texts + 1).repeat_interleave(1 + size.words).expand(size.pictures, -1)
        batch["text_ids"] = torch.cat([torch.zeros_like(image), texts], dim=1)
    if kind == "features":
        return batch | {"vision_features": torch.randn(size.pictures, *feature_shape(vision))}
    return batch | {"pixel_values": torch.randn(size.pictures, 3, vision.image_size, vision.image_size)}


def feature_shape(vision: Any) -> tuple[int, int]:
    """Tokens, CLS among them, and width."""
    return (vision.image_size // vision.patch_size) ** 2 + 1, vision.hidden_size


def caches(shape: str, options: Options, scratch: Path, until: float = math.inf) -> Iterator[Point]:
    """Feature caches in float16, as `lorgnette.trainer cache` writes them; `pairs_per_s` counts random reads."""
    for rows in options.cache_rows:
        point, folder = (
            Point(shape, "cache", "cache", rows, left_out=time_limit_reason(options, until)),
            scratch / f"{shape}-{rows}",
        )
        size, free = cache_bytes(shape, rows), shutil.disk_usage(scratch).free
        if 1.1 * size > free:
            point.left_out = f"{rows:,} rows take {size / 1e9:.1f} GB, and {scratch} has {free / 1e9:.1f} GB free"
        if point.left_out is None:
            write_cache(folder, rows, feature_shape(PRESETS[shape].config().vision_config))
            point.pairs_per_s, point.bytes = read(folder, rows, options)
            shutil.rmtree(folder)
        yield point


def cache_bytes(shape: str, rows: int) -> int:
    return rows * 2 * math.prod(feature_shape(PRESETS[shape].config().vision_config))


def read(folder: Path, rows: int, options: Options) -> tuple[float, int]:
    """Rows a second, and the memory that opening and reading the cache takes."""
    before = anonymous_bytes()
    dataset, opened = load_cache(folder, "train"), feature_opener(folder)
    generator, count = random.Random(options.seed), 64 * options.usual[0]

    def some() -> None:  # other rows each time: earlier ones are in memory
        for place in generator.choices(range(rows), k=count):
            opened(dataset[place][COLUMN], place)

    taken = floor.seconds(some, "cpu", options.repeats)
    return count / statistics.median(taken), max(0, anonymous_bytes() - before)


def write_cache(folder: Path, rows: int, shape: tuple[int, int]) -> None:
    """A feature cache of noise, the same in all shards."""
    metadata = {"splits": {"train": rows}, "unreadable": {}, "shard_size": min(rows, 1000), "complete": True}
    metadata |= {"dtype": "float16", "feature_shape": list(shape)}
    folder.mkdir()
    (folder / METADATA).write_text(json.dumps(metadata), encoding="utf-8")
    noise = np.random.default_rng(0).standard_normal((metadata["shard_size"], *shape), np.float32).astype(np.float16)
    features = [one.tobytes() for one in noise]
    for path, numbers in planned_shards(folder, metadata, "train"):
        Dataset.from_dict({"index": numbers, COLUMN: features[: len(numbers)]}).save_to_disk(path)


def anonymous_bytes() -> int:
    """This process's memory without mapped files."""
    found = psutil.Process().memory_info()
    return found.rss - found.shared


def turns(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Sizes between which time or memory grows by more than `SUPER_LINEAR`, with the power of the operations."""
    found = []

    def line(point: Point) -> tuple[str, str, str]:
        return point.shape, point.axis, point.kind

    measured = [point for point in points if point.left_out is None]
    for _, group in itertools.groupby(sorted(measured, key=lambda point: (*line(point), point.size)), key=line):
        for small, large in itertools.pairwise(group):
            pairs = (small.size, large.size) if small.axis in ("batch", "texts") else (1, 1)
            costs = {"seconds": [n / point.pairs_per_s for n, point in zip(pairs, (small, large), strict=True)]}
            costs |= {"bytes": [small.bytes, large.bytes], "operations": [small.operations, large.operations]}
            powers = {
                name: math.log(after / before) / math.log(large.size / small.size)
                for name, (before, after) in costs.items()
                if before and after
            }
            if small.axis != "cache" and max(powers["seconds"], powers.get("bytes", 0)) > SUPER_LINEAR:
                about = {"shape": small.shape, "axis": small.axis, "kind": small.kind}
                found.append(about | {"from": small.size, "to": large.size, "powers": powers})
    return found


def save(points: Sequence[Point], options: Options, command: str) -> None:
    """`growth.json`, `growth.md` and `growth.png`."""
    options.output.mkdir(parents=True, exist_ok=True)
    found = turns(points)
    report = {"command": command, "machine": machine(), "versions": versions(), "options": asdict(options)}
    report |= {"points": [asdict(point) for point in points], "super_linear": found}
    path = options.output / "growth.json"
    path.write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
    lines = [f"# How it grows, {machine()}", "", f"`{command}`", ""]
    lines += ["| shape | from | what grows | to | pairs/s | MiB | 10⁹ operations |", "|---|---|---|---|---|---|---|"]
    lines += [_line(point) for point in points]
    lines += [
        "",
        f"Grows by a power above {SUPER_LINEAR} of the size (operations: what the arithmetic alone asks for):",
        "",
    ]
    for turn in found:
        powers = ", ".join(f"{name} {power:.2f}" for name, power in turn["powers"].items())
        lines.append(
            f"- {turn['shape']}, {turn['kind']}, {AXES[turn['axis']]} {turn['from']} to {turn['to']}: {powers}"
        )
    (options.output / "growth.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    chart(points, options.output / "growth.png")


def chart(points: Sequence[Point], path: Path) -> None:
    """Writes a PNG: a column for each size, speed above memory; a color for each shape, a dash for each kind."""
    figure = Figure(figsize=(4 * len(AXES), 7.5))
    grid, shapes = figure.subplots(2, len(AXES)), list(dict.fromkeys(point.shape for point in points))
    legend: dict[str, Line2D] = {}
    for column, (axis, label) in enumerate(AXES.items()):
        lines: dict[tuple[str, str], list[Point]] = {}
        for point in points:
            if point.axis == axis and point.left_out is None:
                lines.setdefault((point.shape, point.kind), []).append(point)
        for (shape, kind), line in lines.items():
            at, look = [point.size for point in line], {"color": f"C{shapes.index(shape)}", "marker": DASHES[kind][0]}
            look |= {"linestyle": DASHES[kind][1], "markersize": 5}
            (legend[f"{shape}, {kind}"],) = grid[0, column].plot(at, [point.pairs_per_s for point in line], **look)
            grid[1, column].plot(at, [point.bytes / 2**20 for point in line], **look)
        ticks = sorted({point.size for line in lines.values() for point in line})
        grid[0, column].set(yscale="log", ylabel="rows/s" if axis == "cache" else "pairs/s", title=label)
        grid[1, column].set(yscale="linear" if axis == "cache" else "log", ylabel="MiB", xlabel=label)
        if axis == "cache":
            grid[1, column].set_ylim(bottom=0)
        for one in grid[:, column]:
            one.set_xscale("log")
            one.set_xticks(ticks, [f"{size:,}" for size in ticks])
            one.minorticks_off()
            one.grid(alpha=0.3)
    figure.legend(legend.values(), legend.keys(), loc="lower center", ncols=max(1, len(legend)))
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=110)


def _line(point: Point) -> str:
    cells = [point.shape, point.kind, AXES[point.axis], f"{point.size:,}"]
    if point.left_out is not None:
        return f"| {' | '.join(cells)} | left out: {point.left_out} | | |"
    operations = "" if point.operations is None else f"{point.operations / 1e9:.3g}"
    return f"| {' | '.join(cells)} | {point.pairs_per_s:.4g} | {point.bytes / 2**20:.4g} | {operations} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
