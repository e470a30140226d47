"""Run what only a GPU can show, in parts, the most important first: `make gpu`, or without pip and network

    python -m benchmarks.gpu [--device cpu --preset tiny] [--minutes 8]

Each part is a process with a time limit. Its result is written when it ends, so that a run that is cut leaves the
results of the parts before. The package is used from this checkout, installed or not; what Python lacks is taken from
the wheels that `make gpu-wheels` has downloaded. A part that cannot run says why, and is no failure.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []

from benchmarks.wheels import WHEELS, unpack_missing  # noqa: E402 (may run before anything else is importable)


TESTS = "tests/trainer/test_gpu.py"
SHARDED = "fsdp or offloaded or flash or liger or quantised"
ROWS = ("scenes-pooling", "scenes", "emoji", "cifar")  # rows of examples/quality that are trained at full size
BACKBONES = ("vision-*", "qformer-*", "text-*")  # folders that the rows train on; nothing is downloaded there
LOG_LINES = 40  # of a part's log that are kept in its result


@dataclass
class Options:
    device: Literal["cuda", "cpu"] = field(default="cuda")
    preset: str = field(default="blip2-opt-2.7b", metadata={"help": "Shapes of the speed part: benchmarks/shapes.py."})
    minutes: float = field(default=8.0, metadata={"help": "Limit of all parts together."})
    parts: list[str] = field(default_factory=list, metadata={"help": "Only these parts; by default all."})
    output: Path = field(default=Path("results/gpu"))
    cache: Path = field(default=Path(".cache"), metadata={"help": "Backbones and pictures of the learning part."})
    work: Path = field(default=Path("out/quality"), metadata={"help": "Data and feature caches of the learning part."})
    wheels: Path = field(default=WHEELS)


@dataclass(frozen=True)
class Part:
    """A command, its limit in seconds, and what it is for."""

    name: str
    what: str
    limit: int
    command: Sequence[str]
    unless: str | None = None  # why it cannot run here


def parts(options: Options) -> list[Part]:
    """All parts, in their order."""
    tiny = options.preset == "tiny"
    tests, report = (
        ["pytest", "-v", "--tb=short", "-p", "no:cacheprovider"],
        ["--output", str(options.output / "speed")],
    )
    no_gpu = "needs a CUDA device" if options.device == "cpu" else None
    speed = ["benchmarks.run", "--device", options.device, "--preset", options.preset, *report]
    speed += ["--batch_size", "2", "--rounds", "1", "--caption_rounds", "1", "--sizes", "1", "2"] if tiny else []
    learning = ["examples.quality", *ROWS, "--cache", str(options.cache), "--work", str(options.work)]
    learning += ["--results", str(options.output / "quality")]
    missing = [name for name in BACKBONES if not any(options.cache.glob(name))]
    no_data = f"{options.cache} has no {', '.join(missing)}: make demo" if missing else None
    if tiny:
        no_data = "the preset tiny has nothing to learn from"
    return [
        Part("tests", "training in bf16, resumes, caches", 90, [*tests, TESTS, "-k", f"not ({SHARDED})"], no_gpu),
        Part("placement", "every public path, on the device", 60, [*tests, "tests/project/test_device_paths.py"]),
        Part("speed", "against transformers' BLIP-2", 160, speed),
        Part("compiled", "torch.compile, static caches", 50, [*speed, "--compile"], "slow" if tiny else None),
        Part("learning", "rows of docs/quality.md, at full size", 45, learning, no_data),
        Part("sharding", "FSDP, offload, FlashAttention", 50, [*tests, TESTS, "-k", SHARDED], no_gpu),
    ]


def run(part: Part, limit: float, environment: Mapping[str, str], scratch: Path, output: Path) -> dict[str, Any]:
    """Run a part for `limit` seconds at most; its result. All that it prints is in `PART.log` in `output`."""
    report, log = scratch / f"{part.name}.xml", output / f"{part.name}.log"
    command = [sys.executable, "-m", *part.command]
    if part.command[0] == "pytest":
        command += ["--junitxml", str(report)]
    start, status = time.monotonic(), "passed"
    with log.open("w") as written:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=written, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            if process.wait(limit):
                status = "failed"
        except subprocess.TimeoutExpired:
            status = "cut"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
            process.wait()
    result = {
        "part": part.name,
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "limit": round(limit, 1),
        "command": shlex.join(["python", "-m", *part.command]),
    }
    if report.exists():
        result["tests"] = outcomes(report)
        if status == "passed" and set(result["tests"].values()) <= {"skipped"}:
            result["status"] = "not run: all of its tests were skipped"
    return result | {"log": log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]}


def outcomes(report: Path) -> dict[str, str]:
    """What pytest says of each test: `passed`, `failed`, `error` or `skipped`, in a JUnit report."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        found[case.get("name")] = {"failure": "failed"}.get(kind := next(iter(kinds), "passed"), kind)
    return found


def environment_of(options: Options, scratch: Path) -> dict[str, str]:
    """Variables for the parts: where `lorgnette` is, and that nothing is asked of a network."""
    package = scratch / "package"
    package.mkdir()
    (package / "lorgnette").symlink_to(ROOT, target_is_directory=True)
    write_metadata(package)
    paths = [str(package), str(ROOT), *map(str, unpack_missing(options.wheels, scratch / "site"))]
    more = {"LORGNETTE_DEVICE": options.device, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    earlier = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    return {**os.environ, **more, "PYTHONPATH": os.pathsep.join(paths + earlier)}


def write_metadata(folder: Path) -> None:
    """What an installation would say of the package: its version, and what it needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (info := folder / f"lorgnette-{project['version']}.dist-info").mkdir()
    lines = ["Metadata-Version: 2.1", "Name: lorgnette", f"Version: {project['version']}"]
    lines += [f"Requires-Dist: {needed}" for needed in project["dependencies"]]
    (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")


def about_the_machine(environment: Mapping[str, str]) -> dict[str, Any]:
    """The machine's class and versions, asked in a process that sees what the parts see."""
    asked = (
        "import json; from examples.demo.report import machine, versions; print(json.dumps([machine(), versions()]))"
    )
    out = subprocess.run([sys.executable, "-c", asked], env=environment, cwd=ROOT, capture_output=True, text=True)
    if out.returncode:
        raise RuntimeError(f"Python cannot import what all parts need:\n{out.stderr[-2000:]}")
    machine, versions = json.loads(out.stdout.splitlines()[-1])
    return {"machine": machine, "versions": versions}


def summary(results: Sequence[Mapping[str, Any]], about: Mapping[str, Any], command: str) -> str:
    """A table of the parts, in Markdown."""
    lines = [
        f"# {about['machine']}",
        "",
        f"`{command}`; " + ", ".join(f"{k} {v}" for k, v in about["versions"].items()),
    ]
    lines += ["", "| part | status | tests passed | seconds |", "| --- | --- | --- | --- |"]
    for result in results:
        tests = result.get("tests", {})
        passed = f"{list(tests.values()).count('passed')} of {len(tests)}" if tests else ""
        lines.append(f"| {result['part']} | {result['status']} | {passed} | {result.get('seconds', '')} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    start = time.monotonic()
    from transformers import HfArgumentParser

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a part does not outlive this process
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder).resolve()
        (options,) = HfArgumentParser(Options).parse_args_into_dataclasses(argv)
        for name in ("output", "cache", "work", "wheels"):  # parts run in the checkout
            setattr(options, name, getattr(options, name).resolve())
        chosen = [part for part in parts(options) if not options.parts or part.name in options.parts]
        if unknown := set(options.parts) - {part.name for part in parts(options)}:
            raise ValueError(f"parts: {', '.join(sorted(unknown))} are not among {[p.name for p in parts(options)]}")
        environment = environment_of(options, scratch)
        about, command = about_the_machine(environment), shlex.join(["python", "-m", "benchmarks.gpu", *argv])
        options.output.mkdir(parents=True, exist_ok=True)
        end, results = start + 60 * options.minutes, []
        for part in chosen:
            left = end - time.monotonic()
            if part.unless or left <= 0:
                result = {"part": part.name, "status": f"not run: {part.unless or 'no time was left'}"}
            else:
                result = run(part, min(part.limit, left), environment, scratch, options.output)
            results.append(result)
            text = json.dumps(
                {"command": command, "options": asdict(options), **about, **result}, indent=2, default=str
            )
            (options.output / f"{part.name}.json").write_text(text + "\n", encoding="utf-8")
            (options.output / "summary.md").write_text(summary(results, about, command), encoding="utf-8")
            sys.stdout.write(f"{part.name}: {result['status']}, {result.get('seconds', 0)} s ({part.what})\n")
            if result["status"] == "failed":
                sys.stdout.write("\n".join(result["log"]) + "\n")
            sys.stdout.flush()
    return int(any(result["status"] == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
