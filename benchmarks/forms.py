"""Measure the size and loading time of a saved model in each save format.

    python -m benchmarks.forms --model MODEL --vision VIT --text LM

MODEL is a saved model with LoRA; VIT and LM are the folders of its backbones, which go into a temporary Hub cache. The
formats are loaded alternately, from files in the page cache, and all must give the same logits.
"""

import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, HfArgumentParser

from examples.demo.report import machine
from examples.quality.steps import say
from lorgnette.configuration.configuration_lorgnette import SAVE_FORMATS
from lorgnette.modeling.modeling_saving import BACKBONES
from lorgnette.publishing.export import draw, load
from lorgnette.publishing.verify_export import reference_outputs


COMMIT = "0" * 40  # commit of the backbones in the temporary Hub cache
# the largest allowed difference of a logit: only merging changes numbers
TOLERANCE = {"thin": 0.0, "full": 0.0, "merged": 1e-3}


@dataclass
class Options:
    model: str = field(metadata={"help": "A saved model with LoRA: a folder."})
    vision: Path = field(metadata={"help": "Folder of its ViT."})
    text: Path = field(metadata={"help": "Folder of its LM."})
    repeats: int = field(default=5, metadata={"help": "Timed loads of each form."})
    output: Path = field(default=Path("out/benchmarks/forms.json"))


def main(argv: list[str]) -> int:
    (options,) = HfArgumentParser(Options).parse_args_into_dataclasses(argv)
    with tempfile.TemporaryDirectory() as scratch:
        report = measure(options, Path(scratch).resolve())
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
    say("| form | bytes | of the full form | seconds to load (median, least to most) |")
    say("|---|---|---|---|")
    for form, found in report["forms"].items():
        times, share = found["seconds"], found["bytes"] / report["forms"]["full"]["bytes"]
        spread = f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})"
        say(f"| `{form}` | {found['bytes']:,} | {share:.1%} | {spread} |")
    wrong = [
        f"{form} by {found['logits_apart']:.2g}"
        for form, found in report["forms"].items()
        if not found["logits_apart"] <= TOLERANCE[form]
    ]
    if wrong:
        say(f"FAILED: logits are off, {', '.join(wrong)}; allowed is {TOLERANCE}")
    return 1 if wrong else 0


def measure(options: Options, scratch: Path) -> dict:
    """Save all formats, then load them alternately; returns bytes, seconds and differences of logits."""
    model, processor = load(options.model)
    for part in model.backbones:
        _, prefix = BACKBONES[part]
        setattr(
            model.config,
            f"{prefix}_backbone",
            add_to_hub_cache(scratch / "hub", f"demo/{prefix}", getattr(options, prefix)),
        )
        setattr(model.config, f"{prefix}_backbone_revision", COMMIT)
    for form in SAVE_FORMATS:
        model.save_pretrained(scratch / form, save_format=form)
        processor.save_pretrained(scratch / form)
    picture = str(draw(scratch / "picture.png"))
    expected = reference_outputs(model, processor, picture)["logits"]
    del model

    seconds: dict[str, list[float]] = {form: [] for form in SAVE_FORMATS}
    apart = {}
    for number in range(options.repeats + 1):  # the first load reads files from disk
        for form in SAVE_FORMATS:
            start = time.perf_counter()
            loaded = AutoModelForImageTextToText.from_pretrained(
                scratch / form, cache_dir=scratch / "hub", local_files_only=True
            )
            took = time.perf_counter() - start
            if number:
                seconds[form].append(took)
                say(f"{form}, load {number} of {options.repeats}: {took:.2f} s")
            else:
                apart[form] = (
                    (reference_outputs(loaded.eval(), processor, picture)["logits"] - expected).abs().max().item()
                )
            del loaded
    return {
        "forms": {
            form: {
                "bytes": sum(path.stat().st_size for path in (scratch / form).rglob("*") if path.is_file()),
                "seconds": seconds[form],
                "logits_apart": apart[form],
            }
            for form in SAVE_FORMATS
        },
        "machine": machine(),
        "torch": torch.__version__,
    }


def add_to_hub_cache(cache: Path, repo_id: str, folder: Path) -> str:
    """Add a backbone's folder to a Hub cache as the only commit of `repo_id`."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "snapshots" / COMMIT).symlink_to(folder.resolve(), target_is_directory=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return repo_id


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
