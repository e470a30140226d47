"""Run transformers' common tests on our classes and on BLIP-2: `python -m conformance`, from the repository.

Prints a table and writes it to `results/conformance.md`, and the outcome of each test to `conformance.json` beside it.
Exits with status 1 if a test passes for BLIP-2 and not for us, unless [`NOT_FOR`] has the reason, or if we fail more
than half as many tests as BLIP-2.
"""

import json
import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from .models import NOT_FOR, OVERRIDES
from .source import common_tests


SUITES = Path(__file__).with_name("suites")
PROCESSOR = "ProcessorTest"  # without a BLIP-2 counterpart
# test class -> its name in the table
OURS = {
    "LorgnetteTest": "LorgnetteForConditionalGeneration",
    "LorgnetteWithLoraTest": "… with LoRA",
    "RetrievalTest": "LorgnetteForImageTextRetrieval",
    "QFormerTest": "LorgnetteQFormerModel",
    PROCESSOR: "LorgnetteProcessor",
}
THEIRS = "Blip2Test"
SHOWN = OURS | {THEIRS: "Blip2ForConditionalGeneration (transformers)"}


def main(argv: list[str]) -> int:
    parser = ArgumentParser(prog="python -m conformance", description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where downloads are kept")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where table and outcomes go")
    args, pytest_options = parser.parse_known_args(argv)
    outcomes = run(common_tests(args.cache), pytest_options)
    text = table(outcomes)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "conformance.json").write_text(json.dumps(outcomes, indent=1) + "\n", encoding="utf-8")
    (args.results / "conformance.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    wrong = behind(outcomes)
    for line in wrong:
        sys.stdout.write(f"FAILED: {line}\n")
    return 1 if wrong else 0


def run(tests: Path, pytest_options: list[str]) -> dict[str, dict[str, list[str]]]:
    """Test class -> test -> its outcome (`passed`, `skipped` or `failed`) and the reason of a skip or failure."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.xml")
        paths = [str(tests.resolve()), os.getcwd(), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
        environment |= {"OMP_NUM_THREADS": "1"}  # threads slow tiny models down
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--numprocesses", "auto"]
        command += ["-o", "addopts=--import-mode=importlib"]  # transformers' markers are unknown here
        command += ["--maxprocesses", "4", "--tb", "no", "--junitxml", str(report), *pytest_options, str(SUITES)]
        finished = subprocess.run(command, env=environment, check=False)
        if finished.returncode not in (0, 1):  # 1: some tests failed, as the table shows
            raise RuntimeError(f"pytest ended with status {finished.returncode}")
        return read(report)


def read(report: Path) -> dict[str, dict[str, list[str]]]:
    outcomes: dict[str, dict[str, list[str]]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        found = case.find("skipped"), case.find("failure"), case.find("error")
        element = next((one for one in found if one is not None), None)
        outcome = "passed" if element is None else "skipped" if element.tag == "skipped" else "failed"
        reason = "" if element is None else " ".join(element.get("message", "").split())
        outcomes.setdefault(case.get("classname").rpartition(".")[2], {})[case.get("name")] = [outcome, reason]
    return outcomes


def table(outcomes: dict[str, dict[str, list[str]]]) -> str:
    """The Markdown of counts, of our failures, and of all reasons to skip."""
    lines = [f"transformers {version('transformers')}, torch {version('torch')}", ""]
    lines += ["| class | passed | skipped | failed |", "|---|---|---|---|"]
    for name, title in SHOWN.items():
        count = Counter(outcome for outcome, _ in outcomes.get(name, {}).values())
        lines.append(f"| {title} | {count['passed']} | {count['skipped']} | {count['failed']} |")
    lines += ["", "| what fails | for | why |", "|---|---|---|"]
    for name, title in SHOWN.items():
        for test, (outcome, reason) in sorted(outcomes.get(name, {}).items()):
            if outcome == "failed":
                lines.append(f"| `{test}` | {title} | {cell(reason)} |")
    lines += ["", "| what is another test for us | why |", "|---|---|"]
    lines += [f"| `{test}` | {reason} |" for test, reason in OVERRIDES.items()]
    skips = Counter((reason, name in OURS) for name in SHOWN for _, reason in skipped(outcomes.get(name, {})))
    lines += ["", "| why a test is skipped | ours | BLIP-2's |", "|---|---|---|"]
    for reason in sorted({reason for reason, _ in skips}):
        lines.append(f"| {cell(reason)} | {skips[reason, True]} | {skips[reason, False]} |")
    return "\n".join(lines) + "\n"


def skipped(tests: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(test, reason) for test, (outcome, reason) in tests.items() if outcome == "skipped"]


def behind(outcomes: dict[str, dict[str, list[str]]]) -> list[str]:
    """The failures, a line each; a test that did not run counts as failed."""
    wrong, theirs = [], outcomes.get(THEIRS, {})
    passed = [test for test, (outcome, _) in theirs.items() if outcome == "passed"]
    allowed = sum(outcome == "failed" for outcome, _ in theirs.values()) / 2
    if not passed:
        wrong.append(f"nothing passes for {SHOWN[THEIRS]}")
    for name, title in OURS.items():
        ours = outcomes.get(name, {})
        failed = [test for test, (outcome, _) in ours.items() if outcome == "failed"]
        if name == PROCESSOR:
            wrong += [f"{title}: {test} fails" for test in failed]
            wrong += [] if any(outcome == "passed" for outcome, _ in ours.values()) else [f"{title}: nothing passes"]
            continue
        for test in passed:
            outcome, reason = ours.get(test, ["absent", ""])
            if outcome != "passed" and not (outcome == "skipped" and reason in NOT_FOR[name].values()):
                wrong.append(f"{title}: {test}, which passes for BLIP-2, is {outcome}")
        if len(failed) > allowed:
            wrong.append(f"{title}: {len(failed)} tests fail, more than half of BLIP-2's")
    return wrong


def cell(text: str, length: int = 160) -> str:
    return (text if len(text) <= length else f"{text[: length - 1]}…").replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
