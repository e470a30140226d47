"""What `robustness` measures: pictures in processes of their own, bf16 beside fp32, memory over many steps."""

import ctypes
import json
import mmap
import os
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from tiny_training import joined, pairs, write_backbones

from lorgnette import LorgnetteCollator
from lorgnette.assembly.backbones import cast_parameters
from robustness import hostile, memory, numbers
from robustness.__main__ import kill_at
from robustness.killing import Moment


ANSWER = {"outcome": "answered", "message": "", "seconds": 0.1, "bytes": 2**20}


class TestHostile:
    def refused(self, outcome="ValueError", message="image 0: x.png is no picture that is read here (…)"):
        return ANSWER | {"outcome": outcome, "message": message}

    def test_what_counts_as_a_failure(self):
        good = {"a.png": {"processor": ANSWER, "collator": ANSWER}}
        bad = {"b.png": {"processor": self.refused(), "collator": self.refused()}}
        assert hostile.failures(good | bad) == []
        assert hostile.failures(bad) == ["processor: no file is answered", "collator: no file is answered"]
        for outcome in ("KeyError", "too slow", "too large", "crashed"):
            found = self.refused(outcome, "why")
            assert hostile.failures(good | {"c.png": {"processor": found, "collator": found}}) == [
                f"c.png, processor: {outcome} (why)",
                f"c.png, collator: {outcome} (why)",
            ]
        (line,) = hostile.failures(good | {"d.png": {"processor": ANSWER, "collator": self.refused()}})
        assert line.startswith("d.png: not the same in all ways")

    def test_the_table_counts(self):
        rows = {"a.png": {"processor": ANSWER}, "b.png": {"processor": self.refused()}}
        rows["c.png"] = {"processor": self.refused("KeyError", "odd")}
        text = hostile.table(rows)
        assert "| processor | 1 | 1 | 0 | 0 | 0 | 1 | 0 | 0 | 0 | 0.10 s" in text
        assert "| | answered | ValueError | FileNotFoundError | OSError | TypeError | KeyError | too slow |" in text

    @pytest.mark.slow
    def test_a_file_that_hangs_or_kills_harms_no_other(self, monkeypatch):
        monkeypatch.setattr(hostile, "SECONDS", 0.5)
        monkeypatch.setattr(hostile, "TIMEOUT_S", 2.0)
        monkeypatch.setattr(hostile, "BYTES", 2**27)
        kept = []
        taken = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE  # not of what earlier tests have freed
        ways = {
            "good": lambda file: file,
            "refuses": lambda file: int(file),
            "greedy": lambda file: kept.append(mmap.mmap(-1, 2**28, flags=taken)),
            "slow": lambda file: time.sleep(0.7),
            "greedier": lambda file: kept.append(bytearray(2**40)),
        }
        found = hostile.load_in_process(ways, "a file")
        assert {name: way["outcome"] for name, way in found.items()} == {
            "good": "answered",
            "refuses": "ValueError",
            "greedy": "too large",
            "slow": "too large",  # the memory is not given back
            "greedier": "too large",
        }
        assert found["refuses"]["message"].startswith("invalid literal")
        assert hostile.load_in_process({"slow": ways["slow"]}, "a file")["slow"]["outcome"] == "too slow"
        for end, outcome in ((lambda file: time.sleep(60), "too slow"), (lambda file: ctypes.string_at(0), "crashed")):
            found = hostile.load_in_process({"good": ways["good"], "end": end, "after": ways["good"]}, "a file")
            assert [way["outcome"] for way in found.values()] == ["answered", outcome, outcome]


class TestNumbers:
    @pytest.fixture
    def model_and_batches(self, tmp_path):
        model, processor = joined(write_backbones(tmp_path), dropout=0.0)
        return model.eval(), [LorgnetteCollator(processor)(pairs(4))]

    def test_bf16_is_close_to_fp32(self, model_and_batches):
        loss, found = numbers.compare(*model_and_batches)
        model, (batch,) = model_and_batches
        with torch.no_grad():
            assert loss == pytest.approx(model(**batch).loss.item(), rel=1e-5)
        for apart in found.values():
            assert apart.logits > 0
            assert apart <= numbers.TOLERANCE
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}

    def test_a_part_that_suffers_is_found(self, model_and_batches, monkeypatch):
        def badly(model, dtype):
            cast_parameters(model, dtype)
            model.language_model.lm_head.weight.data *= 1.5

        monkeypatch.setattr(numbers, "cast_parameters", badly)
        _, found = numbers.compare(*model_and_batches)
        assert found["mixed"] <= numbers.TOLERANCE
        assert not found["all"] <= numbers.TOLERANCE


class TestMemory:
    def test_the_slope_is_that_after_warming_up(self):
        samples = [10**9 * step for step in range(50)] + [50 * 10**9 + 700 * step for step in range(150)]
        assert memory.measured(samples)["bytes_a_step"] == pytest.approx(700)

    @pytest.mark.parametrize(
        ("outcome", "lines"),
        [
            ({"bytes_a_step": memory.BOUND - 1.0, "finite": True}, 0),
            ({"bytes_a_step": memory.BOUND + 1.0}, 1),
            ({"bytes_a_step": -5.0, "finite": False}, 1),
        ],
    )
    def test_what_counts_as_a_failure(self, outcome, lines):
        assert len(memory.failures({"captions": outcome})) == lines

    @pytest.mark.slow
    def test_each_is_measured_in_a_process_of_its_own(self):
        """In one process what stage 1 has freed would hide what captions take."""
        first, second = (memory.run_in_process(os.getpid) for _ in range(2))
        assert len({first, second, os.getpid()}) == 3

    def test_it_trains_by_the_shipped_recipes(self, tmp_path):
        parts = memory.write_parts(tmp_path)
        for stage in memory.STAGES:
            outcome = memory.trained(stage, 10, tmp_path, parts)
            assert outcome["finite"]
            assert outcome["steps"] == len(outcome["samples"]) == 10
            recipe = yaml.safe_load((memory.RECIPES / f"{stage}.yaml").read_text())
            assert outcome["settings"] == {name: float(recipe[name]) for name in outcome["settings"]}
        outcome = memory.captioned(4, parts)
        assert outcome["warm"] > 0
        json.dumps(outcome)


def test_a_moment_that_a_faster_run_does_not_reach_comes_sooner(tmp_path):
    """It is timed by an uninterrupted run, beside which the machine may have had other things to do."""
    code = "import pathlib, sys, time; pathlib.Path(sys.argv[1], 'started_at').touch(); time.sleep(0.5)"
    starts: list[str] = []
    case = SimpleNamespace(arguments=lambda output: starts.append(output) or ["-c", code, str(output)])
    output = tmp_path / "output"
    output.mkdir()
    kill_at(Moment("late", "started_at", 1.8), case, [], tmp_path / "log.txt", dict(os.environ), output)
    assert 1 < len(starts) < 5  # 1.8 seconds are too late, 0.225 are not
