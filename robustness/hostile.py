"""Load every picture of Pillow's own tests, many of them broken, by processor, collator and pipeline.

    python -m robustness.hostile

Each file is loaded in its own process, forked from one with a tiny random model. Each of the three has to answer, or to
raise an exception that `load_image` documents, within 5 seconds and 1 GB of additional memory. Prints the counts and
writes them to `results/hostile.md`, and the outcome of each file to `hostile.json` beside it. Exits with status 1 if a
file gives anything else, if the three disagree on a file, or if no file is answered.
"""

import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import warnings
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tiny_training import joined, write_backbones

from examples.quality.steps import say
from examples.sources.registry import Archive, fetch, read_members, scratch_directory
from lorgnette import LorgnetteCollator, LorgnetteImageToTextPipeline
from lorgnette.processing.image_loading import FORMATS


PICTURES = Archive(
    registry="pypi",
    name="pillow",
    version="13.0.0",
    filename="pillow-13.0.0.tar.gz",
    sha256="cdcd1ba258178f7356d74170c9a81ba4eab6a5d55748bc402a5a2a6fe6be3510",
    licence="MIT-CMU",
    content="Pillow's source distribution, with the pictures of its tests",
)
INSIDE = "Tests/images/"
SECONDS, BYTES = 5.0, 2**30
TIMEOUT_S = 4 * SECONDS  # then the process is killed
DOCUMENTED = ("ValueError", "FileNotFoundError", "OSError", "TypeError")
ANSWERED, SLOW, LARGE, CRASHED = "answered", "too slow", "too large", "crashed"

Way = Callable[[str], Any]


def main(argv: list[str]) -> int:
    parser = ArgumentParser(prog="python -m robustness.hostile", description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where downloads are kept")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where table and outcomes go")
    args = parser.parse_args(argv)
    folder = pictures(args.cache).resolve()
    results = args.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a forked process has none of its parent's threads
    with tempfile.TemporaryDirectory() as scratch:
        ways = make_ways(Path(scratch))
        home = Path.cwd()
        os.chdir(folder)  # messages then name the same paths on any machine
        try:
            outcomes = {}
            for number, file in enumerate(files, 1):
                outcomes[file] = load_in_process(ways, file)
                if number % 100 == 0:
                    say(f"{number} of {len(files)} files")
        finally:
            os.chdir(home)
    text = table(outcomes)
    (results / "hostile.json").write_text(json.dumps(outcomes, indent=1) + "\n", encoding="utf-8")
    (results / "hostile.md").write_text(text, encoding="utf-8")
    say(text)
    wrong = failures(outcomes)
    for line in wrong:
        say(f"FAILED: {line}")
    return 1 if wrong else 0


def pictures(cache: Path) -> Path:
    """The folder in `cache` with all files of Pillow's `Tests/images`, after downloading them once."""
    target = cache / f"{PICTURES.name}-{PICTURES.version}-images"
    if not target.exists():
        archive = fetch(PICTURES, cache)
        with scratch_directory(target) as folder:
            for name, content in read_members(archive, lambda name: INSIDE in name):
                path = folder / name.partition(INSIDE)[2]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            os.replace(folder, target)
    return target


def make_ways(scratch: Path) -> dict[str, Way]:
    """The three ways to load a file, with one tiny random model."""
    model, processor = joined(write_backbones(scratch))
    collator = LorgnetteCollator(processor)
    pipe = LorgnetteImageToTextPipeline(model=model.eval(), processor=processor, device="cpu")
    return {
        "processor": lambda file: processor(images=file, return_tensors="pt"),
        "collator": lambda file: collator([{"image": file, "text": "a cat"}]),
        "pipeline": lambda file: pipe(file, max_new_tokens=2),
    }


def load_in_process(ways: dict[str, Way], file: str) -> dict[str, dict[str, Any]]:
    """Load a file in all ways, one after another, in a new process.

    Returns:
        by the way's name: `outcome`, "answered", the name of an exception, "too slow", "too large" or "crashed"; the
        exception's `message`; `seconds`; `bytes`, the peak of additional memory.
    """
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=_load_all_ways, args=(ways, file, sender))
    child.start()
    sender.close()
    found = {}
    try:
        for name in ways:
            if not receiver.poll(TIMEOUT_S):
                lost = {"outcome": SLOW, "message": f"killed after {TIMEOUT_S:g} s"}
                break
            found[name] = _apply_limits(receiver.recv())
    except EOFError:
        child.join()
        lost = {"outcome": CRASHED, "message": f"status {child.exitcode}"}
    finally:
        child.kill()
        child.join()
    return found | {name: {**lost, "seconds": 0.0, "bytes": 0} for name in ways if name not in found}


def _load_all_ways(ways: dict[str, Way], file: str, sender: Any) -> None:
    warnings.simplefilter("ignore")
    # above the allowed memory, so that the peak can be measured and the machine stays safe
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2 * BYTES,) * 2)
    before = _peak()
    for way in ways.values():
        start, outcome, message = time.monotonic(), ANSWERED, ""
        try:
            way(file)
        except Exception as error:
            outcome, message = type(error).__name__, str(error)
        seconds = round(time.monotonic() - start, 3)
        sender.send({"outcome": outcome, "message": message, "seconds": seconds, "bytes": _peak() - before})


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _apply_limits(found: dict[str, Any]) -> dict[str, Any]:
    if found["bytes"] > BYTES or found["outcome"] == "MemoryError":
        return found | {"outcome": LARGE}
    return found | {"outcome": SLOW} if found["seconds"] > SECONDS else found


def failures(outcomes: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """The failures, a line each."""
    ways = dict.fromkeys(way for found in outcomes.values() for way in found)
    wrong = [
        f"{way}: no file is answered"  # refusing everything is a failure too
        for way in ways
        if not any(found[way]["outcome"] == ANSWERED for found in outcomes.values())
    ]
    for file, ways in outcomes.items():
        for way, found in ways.items():
            if found["outcome"] not in (ANSWERED, *DOCUMENTED):
                wrong.append(f"{file}, {way}: {found['outcome']} ({found['message']})")
        by_way = {way: found["outcome"] for way, found in ways.items()}
        if len(set(by_way.values())) > 1:
            wrong.append(f"{file}: not the same in all ways, {by_way}")
    return wrong


def table(outcomes: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The Markdown tables of counts, of reasons to refuse, and of the slowest and largest files."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("pillow", "transformers", "torch"))
    lines = [f"The {len(outcomes)} files of `{INSIDE}` in Pillow {PICTURES.version}; read with {packages}", ""]
    ways = list(next(iter(outcomes.values())))
    counts = {way: Counter(found[way]["outcome"] for found in outcomes.values()) for way in ways}
    others = sorted(set().union(*counts.values()) - {ANSWERED, *DOCUMENTED, SLOW, LARGE, CRASHED})
    columns = [ANSWERED, *DOCUMENTED, *others, SLOW, LARGE, CRASHED]
    lines += [f"| | {' | '.join(columns)} | slowest | most memory |", f"|{'---|' * (len(columns) + 3)}"]
    for way in ways:
        slowest = max(outcomes, key=lambda file: outcomes[file][way]["seconds"])
        largest = max(outcomes, key=lambda file: outcomes[file][way]["bytes"])
        cells = [str(counts[way][column]) for column in columns]
        cells.append(f"{outcomes[slowest][way]['seconds']:.2f} s (`{slowest}`)")
        cells.append(f"{outcomes[largest][way]['bytes'] / 2**20:.0f} MiB (`{largest}`)")
        lines.append(f"| {way} | {' | '.join(cells)} |")
    reasons = Counter(reason(found[ways[0]]["message"]) for found in outcomes.values())
    lines += ["", f"| why the {ways[0]} refuses | files |", "|---|---|"]
    lines += [f"| {why} | {count} |" for why, count in reasons.most_common() if why]
    return "\n".join(lines) + "\n"


def reason(message: str) -> str:
    """A message without the file's name and numbers."""
    if not message:
        return ""
    if "is no picture that is read here" in message:
        return f"no picture, or none of {', '.join(FORMATS)}"
    if "that are allowed" in message:
        return "too many pixels"
    return "a picture that is broken, or of a kind that Pillow does not decode"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
