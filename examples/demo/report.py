"""The demo's results: a contact sheet, the loss curve, and a short report in Markdown."""

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure  # without pyplot: no window, whatever the machine
from PIL import Image

from .evaluation import Verdict


RIGHT, WRONG, TRUTH = "#1a7f37", "#c4320a", "#57606a"
PACKAGES = ("lorgnette", "torch", "transformers", "peft", "accelerate", "datasets")


def contact_sheet(
    pictures: Sequence[Image.Image], truths: Sequence[str], answers: Sequence[str], path: Path, columns: int = 5
) -> None:
    """Write a PNG: each picture with the truth and the answer below it, green if right and red if wrong.

    Raises ValueError, with the three numbers, if the numbers of pictures, truths and answers differ.
    """
    if not len(pictures) == len(truths) == len(answers):
        raise ValueError(f"{len(pictures)} pictures, {len(truths)} truths and {len(answers)} answers do not match up")
    rows = -(-len(pictures) // columns)
    height = 1.85 * rows + 0.45  # inches: a line of text above all, two below each picture
    figure = Figure(figsize=(2.1 * columns, height))
    edges = {"left": 0.01, "right": 0.99, "top": 1 - 0.4 / height, "bottom": 0.45 / height}
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw={**edges, "wspace": 0.08, "hspace": 0.36})
    for axis in axes.flat:
        axis.set_axis_off()
    right = [answer.strip() == truth for truth, answer in zip(truths, answers, strict=True)]
    for axis, picture, truth, answer, is_right in zip(axes.flat, pictures, truths, answers, right, strict=False):
        axis.imshow(picture.convert("RGB"), interpolation="bicubic")
        below = {"transform": axis.transAxes, "ha": "center", "va": "top", "fontsize": 8.5}
        axis.text(0.5, -0.03, f"truth: {shorten(truth)}", color=TRUTH, **below)
        mark, color = ("✓", RIGHT) if is_right else ("✗", WRONG)
        axis.text(0.5, -0.18, f"{mark} {shorten(answer)}", color=color, weight="bold", **below)
    title = f"Held-out photographs and what the model says of them: {sum(right)} of {len(right)} right"
    figure.suptitle(title, y=1 - 0.1 / height, va="top")
    figure.savefig(path, dpi=100)


def shorten(answer: str, length: int = 30) -> str:
    """One line of at most `length` characters; an empty answer gets a mark, and `$` is escaped for TeX."""
    line = " ".join(answer.split()) or "(nothing)"
    return (line if len(line) <= length else f"{line[: length - 1]}…").replace("$", r"\$")


def curves(logs: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Write a PNG with a panel for each run: all losses in its `log_history` over the steps."""
    figure = Figure(figsize=(5 * len(logs), 3.2))
    for axis, (title, log) in zip(figure.subplots(1, len(logs), squeeze=False)[0], logs.items(), strict=True):
        for name, values in losses(log).items():
            axis.plot(*zip(*values.items(), strict=True), label=name, marker="o", markersize=2)
        axis.set(title=title, xlabel="step", ylabel="loss (nats)", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def losses(log: Sequence[Mapping[str, float]]) -> dict[str, dict[int, float]]:
    """Each loss in a run's `log_history`: its name -> step -> value."""
    found: dict[str, dict[int, float]] = {}
    for entry in log:
        for name in entry:
            if name.removeprefix("eval_").startswith("loss"):
                found.setdefault(name, {})[entry["step"]] = entry[name]
    return found


def machine() -> str:
    """The machine without its name: system, cores, and the accelerator or the CPU's instruction set."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        device = f"CPU only ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
    else:
        device = torch.cuda.get_device_name() if accelerator.type == "cuda" else accelerator.type
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {device}"


def versions() -> dict[str, str]:
    """Of Python, and of the packages that results depend on."""
    return {"Python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


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
        settings: anything else worth a line (seed, steps, the agreement without lorgnette …).
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
        [("machine", machine()), *versions().items()],
    )
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    return [_row(header), _row(["---"] * len(header)), *map(_row, rows), ""]


def _row(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"
