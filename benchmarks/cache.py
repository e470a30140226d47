"""Measure the speed-up of an epoch by the feature cache, and compare the losses.

    python -m benchmarks.cache --vision VIT --text LM --qformer BERT --dataset PICTURES [--image_size 224]

Trains both stages with the package's commands on the same rows, alternately from pictures and from the cache. Counts
Trainer's time of an epoch, without building and saving the model. Writing the cache is reported separately.
"""

import json
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from datasets import load_from_disk
from transformers import HfArgumentParser

from examples.quality.steps import say
from lorgnette.trainer import cache, run, stage1, stage2
from lorgnette.trainer.arguments import SourceArguments, Stage1Arguments, Stage2Arguments, VisionArguments
from lorgnette.trainer.feature_cache import read_metadata


# stage -> its module, its arguments, and for each dtype the largest allowed difference of losses
STAGES = {"stage2": (stage2, Stage2Arguments), "stage1": (stage1, Stage1Arguments)}
TOLERANCE = {"float32": 1e-5, "float16": 2e-2}
TIMED = "float16"  # the default dtype of a cache
# no dropout, as in the demo's recipes: fast attention on a CPU has none
QFORMER = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# a small learning rate: large steps from random weights would amplify differences
RECIPE = {"num_train_epochs": 1, "learning_rate": 1e-5, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}


@dataclass
class Options:
    vision: str = field(metadata={"help": "ViT: Hub id or folder."})
    text: str = field(metadata={"help": "Causal LM of stage 2."})
    qformer: str = field(metadata={"help": "BERT that the Q-Former of stage 1 starts from."})
    dataset: str = field(metadata={"help": "Pictures and texts, as save_to_disk wrote them, with a split `train`."})
    text_column: str = field(default="text")
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    rows: int = field(default=128, metadata={"help": "Of the training split: an epoch."})
    batch_size: int = field(default=8)
    num_query_tokens: int = field(default=8)
    repeats: int = field(default=3, metadata={"help": "Timed epochs of each kind."})
    image_size: int | None = field(default=None, metadata={"help": "Side of the ViT's input; its own by default."})
    output: Path = field(default=Path("out/benchmarks/cache.json"))


def main(argv: list[str]) -> int:
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses(argv)
    with tempfile.TemporaryDirectory() as scratch:
        report = measure(options, Path(scratch))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2, default=str), encoding="utf-8")
    unequal = []
    for stage, result in report["stages"].items():
        seconds = "; ".join(
            f"{kind} {statistics.median(times):.1f} s ({min(times):.1f} to {max(times):.1f})"
            for kind, times in result["seconds"].items()
        )
        apart = ", ".join(f"{dtype} {value:.2g}" for dtype, value in result["losses_apart"].items())
        say(f"{stage}: {result['ratio']:.2f} x as fast; {options.rows} rows: {seconds}; losses apart: {apart}")
        unequal += [f"{stage} {dtype}" for dtype, value in result["losses_apart"].items() if value > TOLERANCE[dtype]]
    for dtype, written in report["caches"].items():
        say(f"{dtype}: {written['bytes_per_image']:,} bytes per image, written at {written['pictures_per_s']:.1f}/s")
    if unequal:
        say(f"FAILED: losses further apart than {TOLERANCE}: {', '.join(unequal)}")
    return 1 if unequal else 0


def measure(options: Options, scratch: Path) -> dict:
    """Write the caches, then train alternately on pictures and caches."""
    pictures, vision = scratch / "pictures", options.vision
    load_from_disk(options.dataset)["train"].select(range(options.rows)).save_to_disk(pictures)
    if options.image_size is not None:
        vision = resized(Path(options.vision), options.image_size, scratch / "vision")
    caches = {dtype: write(str(vision), pictures, scratch / dtype, dtype, options.batch_size) for dtype in TOLERANCE}
    stages = {}
    for stage in options.stages:
        seconds, losses = {"pictures": [], "cache": []}, {}
        for number in range(options.repeats):
            for kind, source in (("pictures", pictures), ("cache", scratch / TIMED)):
                took, losses[kind] = epoch(stage, options, vision, source, scratch / "out")
                seconds[kind].append(took)
                say(f"{stage}, {kind}, epoch {number + 1} of {options.repeats}: {took:.1f} s")
        _, losses["float32"] = epoch(stage, options, vision, scratch / "float32", scratch / "out")
        losses["float16"] = losses["cache"]
        stages[stage] = {
            "ratio": statistics.median(seconds["pictures"]) / statistics.median(seconds["cache"]),
            "seconds": seconds,
            "losses_apart": {
                dtype: max(abs(a - b) for a, b in zip(losses[dtype], losses["pictures"], strict=True))
                for dtype in TOLERANCE
            },
            "losses": losses["pictures"],
        }
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "gpu": torch.cuda.is_available()}
    return {"stages": stages, "caches": caches, "options": asdict(options), "machine": machine}


def write(vision: str, pictures: Path, folder: Path, dtype: str, batch_size: int) -> dict:
    arguments = cache.CacheArguments(output_dir=str(folder), dtype=dtype, batch_size=batch_size)
    start = time.monotonic()
    cache.write_cache(VisionArguments(vision=vision), SourceArguments(dataset=str(pictures)), arguments)
    length, width = read_metadata(folder)["feature_shape"]
    rows = read_metadata(folder)["splits"]["train"]
    size = getattr(torch, dtype).itemsize
    return {"bytes_per_image": length * width * size, "pictures_per_s": rows / (time.monotonic() - start)}


def epoch(stage: str, options: Options, vision: Path | str, source: Path, output: Path) -> tuple[float, list[float]]:
    """Seconds of an epoch, and the loss of each of its steps."""
    module, arguments = STAGES[stage]
    given = {name: getattr(options, name) for name in ("num_query_tokens", "text_column", "qformer")}
    given |= {"vision": vision, "dataset": source, "output_dir": output, "qformer_config": json.dumps(QFORMER)}
    given |= {"per_device_train_batch_size": options.batch_size}
    own = {"stage1": {}, "stage2": {"text": options.text, "lora": '{"r": 8}'}}[stage]
    argv = [part for name, value in (RECIPE | given | own).items() for part in (f"--{name}", str(value))]
    model_args, data_args, training_args = run.parse(stage, arguments, argv, None, run.check_arguments)
    trainer = run.train(lambda: module.build(model_args), data_args, training_args)
    shutil.rmtree(output)
    history = trainer.state.log_history
    return history[-1]["train_runtime"], [entry["loss"] for entry in history if "loss" in entry]


def resized(vision: Path, side: int, folder: Path) -> Path:
    """A copy of a ViT's folder whose image processor makes pictures of `side` pixels."""
    shutil.copytree(vision, folder)
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    for name in ("size", "crop_size"):
        if settings.get(name) is not None:
            settings[name] = dict.fromkeys(settings[name], side)
    path.write_text(json.dumps(settings))
    return folder


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
