"""Kill, restart, compare: `python -m robustness`, from the repository.

Each case is a command. It runs once without interruption, and then it is SIGKILLed at random moments and restarted
until it finishes. Prints the tables and writes them to `results/robustness.md`, and the raw figures to
`robustness.json` beside it. Exits with status 1 if a bit differs from the uninterrupted run, or a file is left over.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from argparse import ArgumentParser
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

from examples.quality.steps import say

from .cases import CASES, Case, write_parts
from .comparing import differences
from .killing import Moment, run_and_kill, run_to_its_end


ATTEMPTS = 5  # for a moment that passes before the kill


def main(argv: list[str]) -> int:
    parser = ArgumentParser(prog="python -m robustness", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where table and outcomes go")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="robustness-") as scratch:
        work = Path(scratch).resolve()
        write_parts(work)
        random = Random(args.seed)
        outcomes = [measure(kind(work), number, random) for number, kind in enumerate(CASES)]
    report = {"versions": {name: version(name) for name in ("transformers", "torch", "datasets")}, "seed": args.seed}
    text = table(report, outcomes)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "robustness.json").write_text(json.dumps(report | {"cases": outcomes}, indent=1) + "\n")
    (args.results / "robustness.md").write_text(text, encoding="utf-8")
    say(text)
    return 0 if all(passed(outcome) for outcome in outcomes) else 1


def measure(case: Case, number: int, random: Random) -> dict[str, Any]:
    """Run a case without interruption, then with all its kills, and compare."""
    reference, output = case.work / f"reference-{number}", case.work / f"killed-{number}"
    for folder in (reference, output):
        folder.mkdir()
    log, environment = case.work / "log.txt", environment_in(case.work)
    seen = run_to_its_end(case.arguments(reference, reference=True), log, environment, reference)
    kills: list[dict[str, Any]] = []
    for moment in case.moments(random, seen):
        say(f"{case.name}: {moment.name}")
        started_at = kill_at(moment, case, kills, log, environment, output)
        left = case.state_after_kill(output, reference, started_at)
        kills.append({"what": case.name, "moment": moment.name, **asdict(left)})
    run_to_its_end(case.arguments(output), log, environment, output)
    record_resumption(kills, case, log)
    left_over = [path.relative_to(output).as_posix() for path in output.rglob("*unfinished*")]
    return {"case": case.title, "kills": kills, "unlike": differences(output, reference), "left_over": left_over}


def kill_at(
    moment: Moment, case: Case, kills: list[dict[str, Any]], log: Path, environment: dict[str, str], output: Path
) -> int:
    """Restart after the last kill, and kill; if the process ends first, start from scratch and kill earlier.

    Returns:
        the start of the killed process, in nanoseconds since the epoch.
    """
    for attempt in range(ATTEMPTS):
        started_at = time.time_ns()
        # the uninterrupted run, which gave the moments' times, may have been slower
        sooner = replace(moment, seconds=moment.seconds / 2**attempt)
        killed = run_and_kill(case.arguments(output), log, environment, output, sooner)
        if attempt == 0:
            record_resumption(kills, case, log)
        if killed:
            return started_at
        shutil.rmtree(output)
        output.mkdir()
    raise RuntimeError(f"{moment.name}: it finished {ATTEMPTS} times before it could be killed")


def record_resumption(kills: list[dict[str, Any]], case: Case, log: Path) -> None:
    """Record what the process after the last kill resumed from."""
    if kills:
        kills[-1]["went_on_from"] = case.resumed_from(log.read_text(errors="replace"))
        if kills[-1]["went_on_from"] != kills[-1]["whole"]:
            kills[-1]["unlike"].append(f"resumed from {kills[-1]['went_on_from']}, not {kills[-1]['whole']}")


def environment_in(work: Path) -> dict[str, str]:
    """Environment variables: no Hub, one thread, all files in the folder."""
    (work / "tmp").mkdir(exist_ok=True)
    settings = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(work / "hf"),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TMPDIR": str(work / "tmp"),
    }
    return os.environ | settings


def passed(outcome: dict[str, Any]) -> bool:
    return not (outcome["unlike"] or outcome["left_over"] or any(kill["unlike"] for kill in outcome["kills"]))


def table(report: dict[str, Any], outcomes: list[dict[str, Any]]) -> str:
    """The Markdown tables: a line for each case, and for each kill."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [f"{versions}, seed {report['seed']}", ""]
    lines += ["| killed | times | the end equals the uninterrupted run's | left over |", "|---|---|---|---|"]
    for outcome in outcomes:
        end, left = verdict(outcome["unlike"]), ", ".join(outcome["left_over"]) or "nothing"
        lines.append(f"| {outcome['case']} | {len(outcome['kills'])} | {end} | {left} |")
    lines += ["", "| killed | when | the next run resumed from | which is equal |", "|---|---|---|---|"]
    for kill in (kill for outcome in outcomes for kill in outcome["kills"]):
        what = f"{kill['what']}, {kill['moment']}"
        lines.append(f"| {what} | {kill['fell']} | {kill['went_on_from']} | {verdict(kill['unlike'])} |")
    return "\n".join(lines) + "\n"


def verdict(unlike: list[str]) -> str:
    return "yes" if not unlike else f"**no**: {', '.join(unlike[:3])}" + (" …" if len(unlike) > 3 else "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
