"""Assemble, train, evaluate, export, caption without lorgnette: `python -m examples.demo`, from the repository.

Exits with status 1 unless the answers depend on the pictures (see `evaluation.py`).
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets import Dataset, disable_progress_bars

from lorgnette.trainer.messages import set_up_logging

from ..sources import backbones
from ..sources.cifar import PICTURES
from ..sources.registry import Archive
from . import data, report
from .evaluation import permutation_test, share_right


HERE = Path(__file__).parent
RECIPES = {"stage1": "recipes/demo-stage1.yaml", "stage2": "recipes/demo-stage2.yaml"}
SHEET = 40  # held-out pictures that a process without lorgnette captions: the first eight of each class
REPO_ID = "me/lorgnette-demo"  # for the export's card; nothing is uploaded
LICENSE = "other"  # of the export; the report lists the parts' licences
BACKBONES = {
    "vision": (backbones.VISION, backbones.vision_folder),
    "text": (backbones.TEXT, backbones.text_folder),
    "qformer": (backbones.QFORMER, backbones.qformer_folder),
}


class Stopwatch:
    """Prints phases and records their times in `seconds`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        say(f"=== {phase}")
        start = time.monotonic()
        yield
        self.seconds[phase] = time.monotonic() - start


def main(argv: list[str]) -> int:
    args, training_options = parse(argv)
    names = ("pictures", "features", "stage1", "model", "evaluation", "export", "report")
    folders = {name: args.output / name for name in names}
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier run
    folders["report"].mkdir(parents=True)
    phase = Stopwatch()
    set_up_logging(True)
    disable_progress_bars()  # a few thousand rows are saved at once

    with phase("backbones: downloaded once, then from the cache"):
        sources, pieces = resolve_backbones(args)
    with phase("pictures: CIFAR-10, downloaded once, then from the cache"):
        test = data.build(args.cache, folders["pictures"])["test"]
        pieces.append(piece("pictures", PICTURES))

    vision, pictures, trainer = ["--vision", sources["vision"]], ["--dataset", folders["pictures"]], "lorgnette.trainer"
    features, model = ["--dataset", folders["features"]], folders["model"]
    figures = folders["evaluation"] / "metrics.json"
    commands = {
        "cache: what the frozen ViT sees": [
            "-m", trainer, "cache", *vision, *pictures, "--splits", "train", "validation",
            "--output_dir", folders["features"],
        ],
        "stage 1: the Q-Former learns to see": [
            "-m", trainer, "stage1", "--config", RECIPES["stage1"], *vision, "--qformer", sources["qformer"], *features,
            "--output_dir", folders["stage1"],
        ],
        "stage 2: the language model learns to say it": [
            "-m", trainer, "stage2", "--config", RECIPES["stage2"], *vision, "--text", sources["text"],
            "--qformer", folders["stage1"], *features, *training_options, "--output_dir", model,
        ],
        f"evaluation: {len(test)} held-out pictures": [
            "-m", trainer, "evaluate", "--model", model, *pictures, "--metrics", "exact_match", "--decoding", "greedy",
            "--max_new_tokens", "8", "--batch_size", "32", "--output_dir", folders["evaluation"],
        ],
        "export: a clean folder, checked by a process without lorgnette, with a card": [
            "-m", "lorgnette.cli", "export", model, folders["export"], "--repo-id", REPO_ID, "--license", LICENSE,
            "--metrics", figures,
        ],
    }  # fmt: skip
    for title, command in commands.items():
        with phase(title):
            status = subprocess.run([sys.executable, *map(str, command)], check=False).returncode
        if status:  # it has said why
            say(f"FAILED: {title}")
            return status

    lines = (folders["evaluation"] / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    answers, truths = [json.loads(line)["prediction"] for line in lines], test["text"][:]
    verdict, per_class = permutation_test(answers, truths), share_right(answers, truths)
    with phase(f"a process without lorgnette captions {SHEET} of them"):
        shown = test.select(range(SHEET))
        captions = caption_without_lorgnette(folders["export"], shown)
        agree = sum(a.strip() == b.strip() for a, b in zip(captions, answers, strict=False))

    runs = {"stage1": folders["stage1"], "stage2": model}
    logs = {name: json.loads((run / "trainer_state.json").read_text(encoding="utf-8")) for name, run in runs.items()}
    report.curves({name: log["log_history"] for name, log in logs.items()}, folders["report"] / "loss_curve.png")
    report.contact_sheet(shown["image"][:], shown["text"][:], captions, folders["report"] / "contact_sheet.png")
    settings = {
        "classes": ", ".join(data.CLASSES),
        "pictures trained on": data.TRAIN * len(data.CLASSES),
        "steps": " and ".join(f"{name}: {log['global_step']}" for name, log in logs.items()),
        "recipes, seeds included": ", ".join(RECIPES.values()),
        "answers without lorgnette that equal the evaluation's": f"{agree} of {SHEET}",
        "the contact sheet shows": f"the first {SHEET // len(data.CLASSES)} held-out pictures of each class",
    }
    run = [["-m", "examples.demo", *argv], *commands.values()]
    text = report.markdown(
        verdict,
        per_class,
        pieces,
        [shlex.join(["python", *map(str, command)]) for command in run],
        phase.seconds,
        settings,
    )
    (folders["report"] / "report.md").write_text(text, encoding="utf-8")

    say(f"=== {sum(phase.seconds.values()):.0f} s in all; model: {model}; report: {folders['report'] / 'report.md'}")
    say(f"the answers without lorgnette equal the evaluation's on {agree} of {SHEET} pictures")
    say(str(verdict))
    if agree < SHEET:
        say("FAILED: the saved folder answers differently where lorgnette is not installed")
        return 1
    if not verdict.depends_on_picture:
        say("FAILED: at least twice the shuffled exact match on 200 pictures or more, and p < 0.001, were expected")
        return 1
    return 0


def parse(argv: list[str]) -> tuple[Namespace, list[str]]:
    """The demo's options, and all others for `lorgnette.trainer stage2`."""
    parser = ArgumentParser(
        prog="python -m examples.demo",
        description=__doc__,
        epilog="Any other option goes to `python -m lorgnette.trainer stage2`, over its recipe: --max_steps 500, say.",
        allow_abbrev=False,
    )
    for name, (archive, _) in BACKBONES.items():
        parser.add_argument(f"--{name}", help=f"a Hub id or a folder, in place of {archive.content}")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where downloads are kept")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("out/demo"),
        help="for model, pictures and report; an earlier run's are replaced",
    )
    return parser.parse_known_args(argv)


def resolve_backbones(args: Namespace) -> tuple[dict[str, str], list[tuple[str, str, str]]]:
    """Hub id or folder of each backbone, and the report's lines on them."""
    sources, pieces = {}, []
    for name, (archive, make_folder) in BACKBONES.items():
        given = getattr(args, name)
        sources[name] = given or str(make_folder(args.cache))
        pieces.append((name, given, "see there") if given else piece(name, archive))
    for line in pieces:
        say(" | ".join(line))
    return sources, pieces


def piece(name: str, archive: Archive) -> tuple[str, str, str]:
    """A line of the report's table of sources."""
    registry = {"pypi": "PyPI", "npm": "npm"}[archive.registry]
    return f"{name}: {archive.content}", f"{registry}, {archive.name} {archive.version}", archive.licence


def caption_without_lorgnette(model_folder: Path, rows: Dataset) -> list[str]:
    """The pipeline's answers in a process that cannot import lorgnette, in another folder."""
    with tempfile.TemporaryDirectory() as elsewhere:
        pictures = Path(elsewhere, "pictures")
        pictures.mkdir()
        for number, image in enumerate(rows["image"]):
            image.save(pictures / f"{number:03}.png")
        script, answers = shutil.copy(HERE / "caption_without_lorgnette.py", elsewhere), Path(elsewhere, "answers.json")
        command = [sys.executable, "-I", script, str(model_folder.resolve()), str(pictures), str(answers)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(elsewhere, "modules"))}
        environment["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        subprocess.run(command, check=True, cwd=elsewhere, env=environment)
        return json.loads(answers.read_text(encoding="utf-8"))


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
