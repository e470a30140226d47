"""Measure rows: `python -m examples.quality ROW …`, from the repository; `python -m examples.quality.table` shows them.

A row trains on real backbones and pictures, evaluates on held-out data, and writes `results/quality/ROW.json` and a PNG
of the losses. A row with a result is not measured again.
"""

import json
import platform
import shlex
import sys
import time
from argparse import ArgumentParser
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from datasets import load_from_disk

from lorgnette.trainer.precision import default_mixed_precision

from ..demo.report import PACKAGES as SHOWN
from ..demo.report import curves, losses, machine
from ..sources import backbones
from .measure import measure, model_figures
from .plain_text import compare
from .rows import FEWER, ROWS, TASKS, Row, layer_option, options, recipe_of
from .steps import Steps, say


PACKAGES = (*SHOWN, "scikit-learn")
BACKBONES = {
    "vision": (backbones.VISION, backbones.vision_folder),
    "text": (backbones.TEXT, backbones.text_folder),
    "qformer": (backbones.QFORMER, backbones.qformer_folder),
}


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="python -m examples.quality", description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="+", choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where downloads are kept")
    parser.add_argument("--work", type=Path, default=Path("out/quality"), help="data, features, models and answers")
    parser.add_argument("--results", type=Path, default=Path("results/quality"), help="where the figures go")
    args = parser.parse_args(argv)
    for name in args.rows:
        result = args.results / f"{name}.json"
        if result.exists():
            say(f"{name}: measured already, see {result}; delete it to measure again")
        else:
            run(name, args.cache, args.work, args.results)


def run(name: str, cache: Path, work: Path, results: Path) -> None:
    """Train and measure a row; writes `NAME.json` and `NAME.png` into `results`."""
    row, steps = ROWS[name], Steps(work)
    sources = {part: str(folder(cache)) for part, (_, folder) in BACKBONES.items()}
    folders = take_steps(row, steps, sources, cache)
    stages = {stage: folders[stage] for stage in ("stage1", "stage2") if stage in folders}
    logs = {stage: json.loads((folder / "trainer_state.json").read_text("utf-8")) for stage, folder in stages.items()}

    say("=== baselines, and what the language model still knows")
    start, task = time.monotonic(), TASKS[row.dataset]
    evaluations = {split: folders[f"evaluate-{split}"] for split in task.tests}
    figures = {
        "tests": measure(task, folders["features"], evaluations),
        "plain_text": compare(folders["stage2"], sources["text"]),
    }
    if row.elastic:  # the model's figures alone: baselines are the same
        fewer = {m: {split: folders[f"evaluate-{split}-{m}"] for split in task.tests} for m in FEWER}
        figures["fewer"] = {str(m): model_figures(task, folders["features"], found) for m, found in fewer.items()}
    seconds = {step: done["seconds"] for step, done in steps.done.items()}
    seconds["baselines and plain text"] = round(time.monotonic() - start, 1)
    result = {
        "command": shlex.join(["python", "-m", "examples.quality", name]),
        "row": asdict(row),
        **figures,
        "seconds": seconds,
        "data": {split: len(rows) for split, rows in load_from_disk(folders.get("synthetic", folders["data"])).items()},
        "training": {stage: {"steps": log["global_step"], "epochs": log["epoch"]} for stage, log in logs.items()},
        "losses": {stage: losses(log["log_history"]) for stage, log in logs.items()},
        "commands": {step: done["command"] for step, done in steps.done.items()},
        # the recipes' text, since a recipe may change later
        "recipes": {stage: recipe_of(row, stage).read_text(encoding="utf-8") for stage in stages},
        "backbones": {part: f"{a.content}: {a.registry}, {a.requirement}" for part, (a, _) in BACKBONES.items()},
        "mixed_precision": default_mixed_precision(),
        "machine": machine(),
        "versions": {"python": platform.python_version()} | {part: version(part) for part in PACKAGES},
    }
    results.mkdir(parents=True, exist_ok=True)
    curves({stage: log["log_history"] for stage, log in logs.items()}, results / f"{name}.png")
    text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
    (results / f"{name}.json").write_text(text, encoding="utf-8")
    say(f"{name}: {sum(seconds.values()) / 60:.0f} minutes in all; see {results / f'{name}.json'}")


def take_steps(row: Row, steps: Steps, sources: Mapping[str, str], cache: Path) -> dict[str, Path]:
    """Run all steps from the data to the answers; returns each step's folder."""
    task, stage_options = TASKS[row.dataset], options(row)
    folders = {}

    def step(name: str, command: list[str]) -> str:
        folders[name] = steps.run(name, ["-m", *command])
        return str(folders[name])

    downloads = ["--cache", str(cache)]
    data = step("data", ["examples.quality.data", row.dataset, *downloads])
    if row.synthetic:
        made_up = ["--pairs", str(task.pairs), "--templates", "{name}", *downloads]
        data = step("synthetic", ["examples.quality.synthetic", data, *made_up])

    vision = ["--vision", sources["vision"]]
    features = step("features", ["lorgnette.trainer", "cache", *vision, "--dataset", data, *layer_option(row)])
    qformer = sources["qformer"]
    for stage, text in (("stage1", []), ("stage2", ["--text", sources["text"]])):
        if stage == "stage2" or row.has_stage1:
            command = ["lorgnette.trainer", stage, "--config", str(recipe_of(row, stage))]
            command += [*vision, *text, "--qformer", qformer, "--dataset", features, *stage_options[stage]]
            qformer = step(stage, command)

    for split in task.tests:
        answered = ["--model", folders["stage2"], "--dataset", features, "--split", split]
        asked = ["--metrics", *task.metrics, "--decoding", "greedy", "--batch_size", "32"]
        command = ["lorgnette.trainer", "evaluate", *map(str, answered), *asked]
        step(f"evaluate-{split}", command)
        for m in FEWER if row.elastic else ():
            step(f"evaluate-{split}-{m}", [*command, "--num_query_tokens", str(m)])
    return folders


if __name__ == "__main__":
    main(sys.argv[1:])
