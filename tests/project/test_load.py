"""`make load` in small: its own judgement, and a run of some seconds."""

import json

import pytest

from robustness.load import BOUND, Outcome, main


def test_what_counts_as_holding():
    sizes = [100, 200, 200, 150]
    good = Outcome(2.0, [0.1, 0.3], resident=sizes)
    good.counts.update(right=2, told=1, busy=5, **{"hung up": 1})
    assert good.holds
    assert good.figures()["requests_per_second"] == 1.0
    for name in ("wrong", "lost", "mistold"):
        bad = Outcome(2.0, resident=sizes)
        bad.counts.update(right=2, **{name: 1})
        assert not bad.holds
    grown = Outcome(2.0, resident=[100, 100, 100, 101 + BOUND])
    grown.counts.update(right=2)
    assert not grown.holds
    assert not Outcome(2.0, resident=sizes).holds  # nothing was answered


@pytest.mark.slow
def test_a_short_run(tmp_path):
    assert main(["--callers", "12", "--seconds", "6", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "load.json").read_text())
    assert list(report["workers"]) == ["1", "8"]
    for figures in report["workers"].values():
        assert figures["right"] > 0
        assert figures["wrong"] == figures["lost"] == figures["mistold"] == 0
    assert "| questions at a time |" in (tmp_path / "load.md").read_text()
