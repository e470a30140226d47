"""`python -m benchmarks.profile`: parts of a step and of a load, and what takes their time."""

import json

import pytest
import torch

from benchmarks import operators, profile, sides, stage1, step_parts, training
from benchmarks.rows import rows
from benchmarks.shapes import PRESETS


TINY = "--preset tiny --batch_size 2 --rounds 2 --tokens 2"
FORWARD = [f"forward: {part}" for part in ("ViT", "Q-Former", "projector", "LM's layers")]
BACKWARD = ["backward: head and loss", "backward: LM's layers and projector", "backward: what is left"]


def profiled(row, folder):
    assert profile.main([*f"--row {row} {TINY}".split(), "--output", str(folder)]) == 0
    return json.loads((folder / f"{row}.json").read_text()), (folder / f"{row}.md").read_text()


def test_a_step_is_taken_apart_on_both_sides(tmp_path, capsys):
    report, text = profiled("stage2-captions-chat", tmp_path)
    assert text.strip() in capsys.readouterr().out
    assert report["command"].startswith("python -m benchmarks.profile --row stage2-captions-chat")
    assert report["parts"].keys() == report["seconds"].keys() == {"theirs", "uncached", "cached"}
    for way, rounds in report["parts"].items():
        assert len(rounds) == len(report["seconds"][way]) == 2  # batches that ran before are left out
        for parts in rounds:
            read = [part for part in FORWARD if part != "forward: ViT" or way != "cached"]
            assert parts.keys() == {*read, step_parts.HEAD, *BACKWARD, "clipping", "optimizer"}
            assert all(seconds > 0 for seconds in parts.values())
    products = [report["operators"][way]["kinds"][operators.PRODUCTS]["gflop"] for way in report["parts"]]
    counted = [sum(report["operations"][way].values()) for way in report["parts"]]
    assert products == sorted(products, reverse=True)
    assert counted == sorted(counted, reverse=True)
    for way in ("uncached", "cached"):
        kinds = report["operators"][way]["kinds"].values()
        assert sum(kind["ms"] for kind in kinds) == pytest.approx(report["operators"][way]["ms"])
    assert "| theirs over this | 1.00 | " in text
    assert "| `aten::mm` | " in text


def test_a_load_is_taken_apart(tmp_path):
    report, text = profiled("loading", tmp_path)
    assert report["parts"].keys() == {"theirs", "thin", "full", "merged"}
    for rounds in report["parts"].values():
        assert [parts.keys() for parts in rounds] == [{"from_pretrained", "first caption"}] * 2
    named = {way: [row["name"].split()[-1] for row in found["ours"]] for way, found in report["functions"].items()}
    assert set(named["theirs"]) <= {"_passing_bar"}  # with which a command that ran before in this process shows bars
    assert "attach_lora" in named["full"]
    assert "attach_lora" not in named["merged"]
    assert all(row["name"].count("/") <= 1 for found in report["functions"].values() for row in found["own"])
    assert "## Functions, merged, of the package, with what they call" in text


def test_hooks_are_gone_afterwards_and_a_shared_vit_counts_once():
    built = stage1.build(PRESETS["tiny"], seed=0)
    models = [side.model for side in built.values()]
    with step_parts.StepParts(models) as parts:
        step = training.step_of(built["separate"], rows(2, seed=0), "cpu", bf16=False)
        seconds, found = parts.timed(lambda: [step().item()])
    assert len(seconds) == 1
    assert found.keys() == {"forward: ViT", step_parts.READING, "backward: what is left"}
    assert all(value > 0 for value in found.values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for model in models for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("row", ["stage2", "stage2-mixed", "stage1-captions"])
def test_other_rows_have_all_their_ways(row, tmp_path):
    bench = profile.run.Bench(profile.run.Options(preset="tiny", batch_size=2, rounds=1, sizes=[1]), tmp_path)
    runs, models, counted = profile.case_of(bench, row)
    assert runs.keys() == counted.keys()
    assert all(isinstance(model, torch.nn.Module) for model in models)
    assert max(sides.trained_parameters(model) for model in models) > 0
    assert all(taken[0] > 0 for taken in (one(0) for one in runs.values()))


def test_a_bound_by_parts_scales_each_part_by_its_operations():
    theirs = {"forward: ViT": 2.0, "forward: LM's layers": 3.0, step_parts.HEAD: 4.0, "optimizer": 1.0}
    names = ("ViT", "Q-Former, keys and values of pictures", "Q-Former, queries", "projector", "LM's layers", "LoRA")
    counted = dict.fromkeys((*names, "LM's head"), 10.0)
    own = counted | {"ViT": 0.0, "LM's layers": 4.0, "LoRA": 5.0, "projector": 6.0, "LM's head": 5.0}
    assert step_parts.bound_by_parts(theirs, counted, counted) == pytest.approx(1)
    assert step_parts.bound_by_parts(theirs, counted, own) == pytest.approx(10 / (0 + 3 / 2 + 4 / 2 + 1))
    stage1_parts = {"forward: ViT": 2.0, step_parts.READING: 3.0, "backward: what is left": 4.0, "clipping": 1.0}
    names = ("ViT", "Q-Former, keys and values of pictures", "Q-Former, queries and texts", "head of ITG")
    own = dict(zip(names, (1.0, 3.0, 4.0, 5.0), strict=True))
    counted = dict(zip(names, (2.0, 8.0, 8.0, 8.0), strict=True))
    assert step_parts.bound_by_parts(stage1_parts, counted, own) == pytest.approx(10 / (1 + 7 / 2 + 1))
