"""What the demo leaves behind for people: a contact sheet, the loss curve, and a short report in Markdown."""

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure  # without pyplot: no window, whatever the machine
from PIL import Image

from .evaluation import Verdict


RIGHT, WRONG = "#1a7f37", "#c4320a"
PACKAGES = ("lorgnette", "torch", "transformers", "peft", "accelerate", "datasets")


def contact_sheet(
    pictures: Sequence[Image.Image], truths: Sequence[str], answers: Sequence[str], path: Path, columns: int = 8
) -> None:
    """Writes a PNG: each picture, below it the answer, green where right; where wrong red, with the truth beside it.

    Raises ValueError, with the three numbers, where there are not as many truths and answers as pictures.
    """
    if not len(pictures) == len(truths) == len(answers):
        raise ValueError(f"{len(pictures)} pictures, {len(truths)} truths and {len(answers)} answers do not match up")
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(1.35 * columns, 1.62 * rows + 0.5))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, picture, truth, answer in zip(axes.flat, pictures, truths, answers, strict=False):
        axis.imshow(picture.convert("RGB"), interpolation="bicubic")
        right = answer.strip() == truth
        label = f"{shorten(answer)}\n" if right else f"{shorten(answer)}\n(is: {truth})"
        axis.set_title(label, y=-0.04, va="top", fontsize=9, color=RIGHT if right else WRONG, linespacing=1.25)
    count = sum(answer.strip() == truth for answer, truth in zip(answers, truths, strict=True))
    figure.suptitle(f"{count} of {len(pictures)} right: held-out photographs and the answers to them", fontsize=11)
    figure.tight_layout(h_pad=1.6)
    figure.savefig(path, dpi=110)


def shorten(answer: str, length: int = 18) -> str:
    """One line of at most `length` characters; an empty answer is made visible, and `$` is kept from being TeX."""
    line = " ".join(answer.split()) or "(nothing)"
    return (line if len(line) <= length else f"{line[: length - 1]}…").replace("$", r"\$")


def loss_curve(log: Sequence[Mapping[str, float]], path: Path) -> None:
    """Writes a PNG of the training and validation loss over the steps, from Trainer's `log_history`."""
    figure = Figure(figsize=(6, 3.2))
    axis = figure.subplots()
    for key, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(entry["step"], entry[key]) for entry in log if key in entry]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, marker="o", markersize=3)
    axis.set(xlabel="step", ylabel="loss (nats a token)", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def machine() -> str:
    """The class of machine, without its name: system, processor architecture, cores, and the accelerator in use."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        device = f"CPU only, {torch.get_num_threads()} threads"
    else:
        device = torch.cuda.get_device_name() if accelerator.type == "cuda" else accelerator.type
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {device}"


def markdown(
    verdict: Verdict,
    per_class: Mapping[str, float],
    pieces: Sequence[tuple[str, str, str]],
    commands: Sequence[str],
    seconds: Mapping[str, float],
    settings: Mapping[str, Any],
) -> str:
    """The report's text.

    Args:
        verdict: on the held-out pictures.
        per_class: exact match a class.
        pieces: (what it is, where it came from, licence) of each backbone and of the pictures.
        commands: as they were run.
        seconds: each phase's time.
        settings: anything else worth a line (seed, steps, the stranger's agreement …).
    """
    lines = ["# Demo report", "", f"**{verdict}.**", ""]
    lines += ["![contact sheet](contact_sheet.png)", "", "![loss](loss_curve.png)", ""]
    lines += _table(("class", "exact match"), [(name, f"{share:.0%}") for name, share in per_class.items()])
    lines += ["## What it was made of", ""]
    lines += _table(("piece", "from", "licence"), pieces)
    lines += ["## How", "", "```sh", *commands, "```", ""]
    lines += _table(("setting", "value"), list(settings.items()))
    phases = [(phase, f"{time:.0f} s") for phase, time in seconds.items()]
    lines += _table(("phase", "time"), [*phases, ("all", f"{sum(seconds.values()):.0f} s")])
    lines += _table(
        ("machine and versions", ""),
        [("machine", machine()), ("Python", platform.python_version()), *((name, version(name)) for name in PACKAGES)],
    )
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    return [_row(header), _row(["---"] * len(header)), *map(_row, rows), ""]


def _row(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"
