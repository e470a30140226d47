"""`python -m benchmarks.gpu`: limits, the results of each part, and what Python lacks."""

import json
import os
import sys
import time
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest

import lorgnette
from benchmarks import gpu
from benchmarks.gpu import Options, Part, environment_of, parts, run
from benchmarks.wheels import unpack_missing


@pytest.fixture
def part(tmp_path):
    """Runs a part that is a script, `SECONDS` at most."""

    def run_script(text: str, limit: float = 60) -> dict:
        (tmp_path / "script.py").write_text(text)
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return run(Part("one", "a script", 60, ["script"]), limit, environment, tmp_path, tmp_path)

    return run_script


def test_a_part_passes_with_its_log(part):
    result = part("print('a figure: 1')")
    assert (result["status"], result["log"]) == ("passed", ["a figure: 1"])
    assert result["command"] == "python -m script"


def test_a_part_fails(part):
    result = part("raise SystemExit('no memory')")
    assert (result["status"], result["log"]) == ("failed", ["no memory"])


def test_a_part_is_cut_with_its_processes_and_keeps_its_log(part, tmp_path):
    script = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
print("half", flush=True)
time.sleep(60)
"""
    start = time.monotonic()
    result = part(script, limit=3)
    assert (result["status"], result["log"]) == ("cut", ["half"])
    assert time.monotonic() - start < 30
    child = Path("/proc") / (tmp_path / "pid").read_text()
    end = time.monotonic() + 10
    while child.exists() and "Z" not in (child / "stat").read_text().split(")")[1][:3]:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_tests_are_reported_one_by_one(tmp_path):
    (tmp_path / "test_made.py").write_text(
        "import pytest\ndef test_right(): pass\ndef test_wrong(): assert False\n"
        "@pytest.mark.skip(reason='-')\ndef test_no(): pass\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    made = Part("tests", "tests", 60, ["pytest", "-q", "-c", str(tmp_path / "pytest.ini"), str(tmp_path)])
    result = run(made, 60, dict(os.environ), tmp_path, tmp_path)
    assert result["status"] == "failed"
    assert result["tests"] == {"test_right": "passed", "test_wrong": "failed", "test_no": "skipped"}


def test_each_part_runs_within_eight_minutes_on_a_gpu():
    chosen = parts(Options())
    assert [one.name for one in chosen] == ["tests", "placement", "speed", "compiled", "learning", "sharding"]
    assert sum(one.limit for one in chosen) <= 60 * Options().minutes - 20  # for what comes before the first
    assert all("cuda" in one.command for one in chosen if one.command[0] == "benchmarks.run")


def test_parts_that_cannot_run_say_why(tmp_path, capsys):
    options = ["--device", "cpu", "--preset", "tiny", "--parts", "tests", "learning", "--output", str(tmp_path)]
    assert gpu.main(options) == 0
    result = json.loads((tmp_path / "tests.json").read_text())
    assert result["status"] == "not run: needs a CUDA device"
    assert result["versions"]["torch"]
    assert "| learning | not run:" in (tmp_path / "summary.md").read_text()
    assert "learning: not run:" in capsys.readouterr().out
    with pytest.raises(ValueError, match="parts: other are not among"):
        gpu.main(["--parts", "other", "--output", str(tmp_path)])


def test_backbones_that_are_missing_are_named(tmp_path):
    (tmp_path / "vision-made").mkdir()
    learning = {one.name: one for one in parts(Options(cache=tmp_path))}["learning"]
    assert learning.unless == f"{tmp_path} has no qformer-*, text-*: make demo"
    for name in ("qformer-made", "text-made"):
        (tmp_path / name).mkdir()
    assert {one.name: one for one in parts(Options(cache=tmp_path))}["learning"].unless is None


def test_parts_find_the_package_without_installation_and_the_wheels(tmp_path):
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "of_no_registry-9-py3-none-any.whl", "w") as wheel:
        wheel.writestr("of_no_registry/__init__.py", "VALUE = 9")
    environment = environment_of(Options(wheels=tmp_path / "wheels"), tmp_path)
    package, _, site, *_ = environment["PYTHONPATH"].split(os.pathsep)
    assert (Path(site) / "of_no_registry").is_dir()
    (made,) = distributions(name="lorgnette", path=[package])
    assert made.version == lorgnette.__version__
    assert any(needed.startswith("transformers") for needed in made.requires)


def test_what_python_lacks_is_unpacked_and_nothing_else(tmp_path, monkeypatch):
    for name in ("pytest", "of_no_registry"):
        with zipfile.ZipFile(tmp_path / f"{name}-9-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", "VALUE = 9")
    assert unpack_missing(tmp_path / "none", tmp_path / "site") == []
    (site,) = unpack_missing(tmp_path, tmp_path / "site")
    assert [path.name for path in site.iterdir()] == ["of_no_registry"]
    monkeypatch.setattr(sys, "path", [*sys.path, str(site)])
    assert __import__("of_no_registry").VALUE == 9
