"""How quality is measured: what each row trains, what it is compared with, and that docs/quality.md shows it."""

import importlib
import json
import shlex
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_models
import torch
from datasets import Dataset, DatasetDict
from PIL import Image
from tiny_training import CAPTIONS, joined, pairs, write_backbones
from transformers import TrainingArguments

from examples.demo.report import curves, losses
from examples.quality import __main__ as quality
from examples.quality import baselines, measure, plain_text, steps, table
from examples.quality import rows as quality_rows
from examples.quality.measure import score, score_shuffled
from examples.quality.rows import HEADLINES, ROWS, Row, Task, layer_option, options
from lorgnette.trainer.arguments import TRAINING_DEFAULTS, DataArguments, Stage1Arguments, Stage2Arguments
from lorgnette.trainer.recipe import parse_recipe
from lorgnette.trainer.run import check_arguments


def stage_options(stage: str, row: Row) -> dict:
    """What `lorgnette.trainer` makes of the row's recipe and options."""
    model_arguments = {"stage1": Stage1Arguments, "stage2": Stage2Arguments}[stage]
    argv = ["--config", f"recipes/quality-{row.dataset}-{stage}.yaml", *options(row)[stage]]
    argv += ["--vision", "v", "--qformer", "q", "--dataset", "d", "--output_dir", "o"]
    argv += ["--text", "t"] if stage == "stage2" else []
    model, data, training = parse_recipe(
        (model_arguments, DataArguments, TrainingArguments),
        argv,
        prog="test",
        description="",
        defaults=TRAINING_DEFAULTS | {"use_cpu": True},
        check=check_arguments,
    )
    return vars(model) | vars(data) | training.to_dict()


@pytest.mark.parametrize("name", ROWS)
def test_a_row_trains_what_it_says_and_differs_from_its_headline_in_that_alone(name):
    row = ROWS[name]
    headline = HEADLINES[row.dataset]
    names = {"queries": "num_query_tokens", "layer": "vision_feature_layer", "seed": "seed", "lora": "lora"}
    names |= {"bridge": "qformer_config", "lora_targets": "lora", "elastic": "elastic_queries"}
    for stage in ("stage1", "stage2"):
        ours, theirs = stage_options(stage, row), stage_options(stage, headline)
        assert (ours["num_query_tokens"], ours["vision_feature_layer"], ours["seed"]) == (
            row.queries,
            row.layer,
            row.seed,
        )
        if stage == "stage2":
            assert (ours["lora"] is not None) == row.lora
        expected = {f for n, f in names.items() if getattr(row, n) != getattr(headline, n) and f in ours}
        if stage == "stage1":  # stage 2 alone learns with fewer queries
            expected.discard("elastic_queries")
        if stage == "stage2" and not row.has_stage1:  # a Q-Former that was taught nothing has nothing to forget
            expected.add("qformer_learning_rate")
            highest = max(ours["learning_rate"], ours["projector_learning_rate"] or 0)
            assert theirs["qformer_learning_rate"] < ours["qformer_learning_rate"] <= highest
        assert {n for n in ours if ours[n] != theirs[n]} == expected
    assert layer_option(row)[1] == str(row.layer if row.layer is not None else "null")
    changed = [f.name for f in fields(Row) if getattr(row, f.name) != getattr(headline, f.name)]
    assert len(changed) == (name not in HEADLINES)


WRITES = "import pathlib, sys; folder = pathlib.Path(sys.argv[-1]); folder.mkdir(); (folder / 'made').touch()"


def test_a_step_is_done_once_for_the_same_command_and_recipe(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("a: 1")
    command = ["-c", WRITES, "--config", str(recipe)]
    once = steps.Steps(tmp_path)
    first = once.run("stage1", command)
    again = steps.Steps(tmp_path)
    assert again.run("stage1", command) == first
    assert "done before" in capsys.readouterr().out
    assert again.done == once.done  # the seconds, too, are those of the run
    assert again.done["stage1"]["command"].endswith(f"--output_dir {first}")
    recipe.write_text("a: 2")
    assert steps.Steps(tmp_path).run("stage1", command) != first


def test_a_step_that_failed_starts_anew(tmp_path):
    flag = tmp_path / "second"
    command = ["-c", f"{WRITES}; sys.exit(not pathlib.Path({str(flag)!r}).exists())"]
    with pytest.raises(steps.subprocess.CalledProcessError):
        steps.Steps(tmp_path).run("stage1", command)
    flag.touch()
    assert (steps.Steps(tmp_path).run("stage1", command) / "made").exists()


def features(labels: list[str], seed: int) -> np.ndarray:
    """(N, 5, 6) of noise in which CLS tells each label, and patches tell nothing."""
    found = np.random.default_rng(seed).normal(size=(len(labels), 5, 6)).astype(np.float16)
    found[:, 0, :3] += 8 * np.eye(3, dtype=np.float16)[[["cat", "dog", "owl"].index(label) for label in labels]]
    return found


def test_plain_methods_find_what_is_in_the_features():
    labels = ["cat", "dog", "owl"] * 20
    train, validation, test = ((features(labels, seed), labels) for seed in range(3))
    found = baselines.probe(train, validation, test)
    assert found["CLS"]["exact_match"] == found["both"]["exact_match"] == 1.0
    assert found["patch mean"]["exact_match"] < 0.7
    assert found["CLS"]["C"] == baselines.STRENGTHS[0]  # all do equally well
    texts = baselines.nearest_texts(train, test[0])
    assert texts["CLS"] == labels
    assert np.mean(np.array(texts["patch mean"]) == labels) < 0.7


def test_the_nearest_neighbour_is_that_of_the_smallest_angle():
    keys = np.array([[[3.0, 0.0]] * 2, [[1.0, 1.0]] * 2])
    assert baselines.nearest_texts((keys, ["right", "up"]), np.array([[[9.0, 8.0]] * 2]))["CLS"] == ["up"]


def test_made_up_pairs_are_not_for_the_baselines(monkeypatch):
    columns = {"vision_features": [[[0.0]], [[1.0]], [[2.0]]], "text": ["cat", "dog", "owl"]}
    monkeypatch.setattr(measure, "feature_opener", lambda folder: lambda value, number: torch.tensor(value))
    for marks, left in (({}, [0, 1, 2]), ({"synthetic": [False, True, False]}, [0, 2])):
        monkeypatch.setattr(measure, "load_cache", lambda folder, split, m=marks: Dataset.from_dict(columns | m))
        found, texts = measure.read(Path("features"), "train")
        assert found.flatten().tolist() == left
        assert texts == [columns["text"][n] for n in left]


def test_shuffled_pictures_are_right_by_chance():
    truths = ["cat", "dog"] * 200
    assert score(["exact_match"], [" cat", "dog"] * 200, truths) == {"exact_match": 1.0}
    assert score_shuffled(["exact_match"], truths, truths)["exact_match"] == pytest.approx(0.5, abs=0.05)
    assert score_shuffled(["exact_match"], ["cat"] * 400, truths) == {"exact_match": 0.5}


def test_what_the_language_model_lost_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(plain_text, "WINDOWS", 2)
    monkeypatch.setattr(plain_text, "LENGTH", 64)
    vision, text = write_backbones(tmp_path)
    model, processor = joined((vision, text))
    for part in (model, processor):
        part.save_pretrained(tmp_path / "untrained")
    found = plain_text.compare(tmp_path / "untrained", text)
    assert found["identical_without_adapters"]
    assert found["tokens"] == 128
    assert found["perplexity_trained"] == found["perplexity_original"] > 1  # LoRA starts as nothing
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "trained")
    found = plain_text.compare(tmp_path / "trained", text)
    assert found["identical_without_adapters"]
    assert found["perplexity_trained"] != found["perplexity_original"]


RESULT = {
    "tests": {
        "test": {
            "model": {"exact_match": 0.75},
            "shuffled": {"exact_match": 0.1},
            "probe": {"CLS": {"exact_match": 0.8}, "both": {"exact_match": 0.78}},
        },
        **{
            split: {
                "model": {"exact_match": 0.25, "cider": 1.5},
                "shuffled": {"exact_match": 0.001, "cider": 0.01},
                "nearest": {"CLS": {"exact_match": 0.2, "cider": 1.0}, "both": {"exact_match": 0.1, "cider": 1.25}},
            }
            for split in ("test_style", "test_concept")
        },
    },
    "plain_text": {"perplexity_trained": 12.345, "perplexity_original": 12.0},
    "seconds": {"features": 90.0, "stage2": 1500.0},
}

SCENES = {"exact_match": 0.5, "cider": 4.0, "objects_f1": 0.9, "counts": 0.8, "pairs_named": 0.8, "relations": 0.7}
SCENES_RESULT = RESULT | {
    "tests": {
        split: {
            "model": SCENES,
            "shuffled": {name: value / 10 for name, value in SCENES.items()},
            "nearest": {
                "CLS": {"objects_f1": 0.5, "relations": 0.25, "pairs_named": 0.1},
                "both": {"objects_f1": 0.4, "relations": 0.3, "pairs_named": 0.05},
            },
            "probe": {"objects_f1": 0.95},
        }
        for split in ("test_combination", "test_style", "test_position")
    }
}


def test_the_table_has_every_row_and_the_strictest_baselines():
    lines = table.render({"cifar": RESULT, "emoji": RESULT, "scenes": SCENES_RESULT}).splitlines()
    assert "| `cifar` | 8 queries, the ViT's last layer, seed 0 | 75.0% | 80.0% | **0.938** | 10.0% | " in lines[2]
    assert lines[2].endswith("| 12.35 (was 12.00) | 26 |")
    emoji = next(line for line in lines if line.startswith("| `emoji` |"))
    assert emoji.count(" **1.50 (25.0%)** | 0.01 (0.1%) | 1.25 (20.0%) |") == 2
    assert {name for name in ROWS if f"| `{name}` |" in "\n".join(lines)} == set(ROWS)
    assert sum("| not run |" in line for line in lines) == len(ROWS) - 3
    for dataset in HEADLINES:
        assert len({line.count("|") for line in lines if line.startswith(f"| `{dataset}")}) == 1
    scenes = [line for line in lines if line.startswith("| `scenes` | 16 queries, the ViT's layer -2, seed 0 |")]
    figures = "**0.900** | 80.0% | **70.0% of 80.0%** | 50.0% | 4.00 | 0.090 | 0.500, 25.0% of 10.0% | 0.950"
    assert [line.partition("seed 0 | ")[2] for line in scenes] == [
        f"{unseen} | {figures} | 12.35 (was 12.00) | 26 |" for unseen in ("combinations", "style", "positions")
    ]
    assert any("`cifar-no-lora` | no LoRA |" in line for line in lines)


def test_a_row_of_elastic_queries_shows_fewer_of_them_too():
    figures = {"objects_f1": 0.5, "counts": 0.4, "relations": 0.3, "pairs_named": 0.2, "exact_match": 0.1, "cider": 2.0}
    result = SCENES_RESULT | {"fewer": {"4": dict.fromkeys(table.UNSEEN, figures)}}
    lines = table.scenes_lines(result)
    assert len(lines) == 2 * len(table.UNSEEN)
    assert lines[-1] == ["positions, 4 queries", "**0.500**", "40.0%", "**30.0% of 20.0%**", "10.0%", "2.00", *[""] * 5]
    assert {len(line) for line in lines} == {len(lines[0])}


def test_the_page_shows_what_was_measured():
    assert table.between_markers(table.PAGE.read_text(encoding="utf-8")) == table.render(table.load(table.RESULTS))


@pytest.mark.parametrize("path", sorted(table.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_measured_row_holds_what_it_was_made_from(path):
    """Each step's folder is called after its command and recipe: neither was lost or changed since."""
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["command"] == f"python -m examples.quality {path.stem}"
    assert asdict(Row(**result["row"])) == asdict(ROWS[path.stem])  # a later field has its default
    for step, line in result["commands"].items():
        _, *command, _, folder = shlex.split(line)
        recipes = [result["recipes"][step]] if "--config" in command else []
        assert Path(folder).name == f"{step}-{steps.digest(command, recipes)}"
    assert result["losses"].keys() == result["recipes"].keys() == result["training"].keys()
    for stage, found in result["losses"].items():
        assert {"loss", "eval_loss"} <= found.keys() <= {"loss", "eval_loss", "loss_itc", "loss_itm", "loss_itg"}
        assert list(found["eval_loss"])[-1] == str(result["training"][stage]["steps"])
    assert path.with_suffix(".png").exists()


def test_the_table_is_written_between_its_markers(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(table, "PAGE", tmp_path / "quality.md")
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    (tmp_path / "quality.md").write_text("# A\n")
    with pytest.raises(ValueError, match="quality:begin --> stands 0 times"):
        table.main([])
    (tmp_path / "quality.md").write_text(f"# A\n\n{table.BEGIN}\nold\n{table.END}\n\n## B\n")
    (tmp_path / "cifar.json").write_text(json.dumps(RESULT))
    table.main([])
    table.main([])  # again: the same
    page = (tmp_path / "quality.md").read_text()
    assert page == f"# A\n\n{table.BEGIN}\n{table.render({'cifar': RESULT})}\n{table.END}\n\n## B\n"


def test_losses_are_drawn(tmp_path):
    log = [{"step": 1, "loss": 2.0, "loss_itc": 1.0, "learning_rate": 1.0}, {"step": 2, "eval_loss": 1.5}]
    assert losses(log) == {"loss": {1: 2.0}, "loss_itc": {1: 1.0}, "eval_loss": {2: 1.5}}
    curves({"stage1": log, "stage2": log}, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width > 800


def test_a_row_goes_from_data_to_figures_and_is_not_measured_twice(monkeypatch, tmp_path, capsys):
    vision, text = write_backbones(tmp_path)
    for part in (tiny_models.bert(vocab_size=len(tiny.bert_tokenizer())), tiny.bert_tokenizer()):
        part.save_pretrained(tmp_path / "bert")
    folders = {"vision": vision, "text": text, "qformer": str(tmp_path / "bert")}
    given = {part: (archive, lambda cache, p=part: folders[p]) for part, (archive, _) in quality.BACKBONES.items()}
    monkeypatch.setattr(quality, "BACKBONES", given)
    monkeypatch.setattr(quality_rows, "RECIPES", tmp_path)
    task = Task(tests=("test",), metrics=("exact_match", "cider"), probe=True, pairs=1)
    monkeypatch.setitem(quality.TASKS, "cifar", task)
    small = "num_query_tokens: 4\nmax_steps: 2\nper_device_train_batch_size: 4\n"
    small += "logging_steps: 1\nsave_strategy: 'no'\nreport_to: none\n"
    (tmp_path / "quality-cifar-stage1.yaml").write_text(small)
    (tmp_path / "quality-cifar-stage2.yaml").write_text(small + "lora: {r: 2}\n")

    def run(command: list[str], check: bool) -> None:
        """In this process: the interpreter starts quickly, torch does not."""
        _, _, module, *argv = command
        if module == "examples.quality.data":
            rows = Dataset.from_list([{name: row[name] for name in ("image", "text")} for row in pairs()])
            DatasetDict(dict.fromkeys(("train", "validation", "test"), rows)).save_to_disk(argv[-1])
        else:
            module = module if module.startswith("examples") else f"{module}.__main__"
            importlib.import_module(module).main(argv)

    monkeypatch.setattr(steps.subprocess, "run", run)
    monkeypatch.setattr(plain_text, "WINDOWS", 1)
    monkeypatch.setattr(plain_text, "LENGTH", 64)

    where = ["--cache", str(tmp_path), "--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    quality.main(["cifar", *where])
    result = json.loads((tmp_path / "results" / "cifar.json").read_text())
    assert result["row"] == asdict(ROWS["cifar"])
    assert result["data"] == dict.fromkeys(("train", "validation", "test"), len(CAPTIONS))
    assert set(result["seconds"]) == {
        "data", "features", "stage1", "stage2", "evaluate-test", "baselines and plain text",
    }  # fmt: skip
    assert result["training"]["stage2"]["steps"] == 2
    assert {stage: list(found["loss"]) for stage, found in result["losses"].items()} == {
        "stage1": ["1", "2"], "stage2": ["1", "2"],
    }  # fmt: skip
    assert result["recipes"] == {"stage1": small, "stage2": small + "lora: {r: 2}\n"}
    assert result["tests"]["test"]["nearest"]["CLS"]["exact_match"] == 1.0  # the same pictures
    assert result["tests"]["test"]["probe"].keys() == {"CLS", "patch mean", "both"}
    assert result["plain_text"]["identical_without_adapters"]
    assert (tmp_path / "results" / "cifar.png").exists()
    assert "not run" not in table.render({"cifar": result}).splitlines()[2]

    capsys.readouterr()
    quality.main(["cifar", *where])
    assert "measured already" in capsys.readouterr().out
    quality.main(["cifar-no-stage1", *where])  # data and features serve again
    without = json.loads((tmp_path / "results" / "cifar-no-stage1.json").read_text())
    assert without["commands"]["features"] == result["commands"]["features"]
    assert "stage1" not in without["commands"]
    assert without["commands"]["stage2"] != result["commands"]["stage2"]
    assert Path(result["commands"]["stage2"].split()[-1]).name.startswith("stage2-")
