"""`lorgnette check`: every row that training would stop at is named with its cause, and nothing else is written."""

import json
import sys
from pathlib import Path

import datasets
import pytest
import tiny
import tiny_models
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from tiny_training import CAPTIONS, write_backbones, write_pairs
from transformers import Trainer

from lorgnette import cli
from lorgnette.trainer import dry_run
from lorgnette.trainer.__main__ import main
from lorgnette.trainer.dry_run import megabytes


LONG = "the cat " * 60
QFORMER = json.dumps(tiny_models.QFORMER)
RUN = ("--use_cpu", "--report_to", "none", "--per_device_train_batch_size", "4", "--num_query_tokens", "4")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep what `datasets` prepares out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Options that name tiny backbones of both stages."""
    folder = tmp_path_factory.mktemp("parts")
    vision, text = write_backbones(folder)
    for part in (tiny_models.bert(vocab_size=len(tiny.bert_tokenizer())), tiny.bert_tokenizer()):
        part.save_pretrained(folder / "bert")
    stage2 = ("--vision", vision, "--text", text, "--lora", '{"r": 2}', "--qformer_config", QFORMER, *RUN)
    return {"stage2": stage2, "stage1": ("--vision", vision, "--qformer", str(folder / "bert"), *RUN)}


@pytest.fixture
def check(parts, tmp_path, capsys):
    """Check a data set; the exit status, the report and what was printed."""

    def run(source, *options, stage: str = "stage2", command: tuple[str, ...] | None = None):
        output = tmp_path / "out"
        arguments = [*parts[stage], "--dataset", str(source), "--output_dir", str(output), *options]
        status = 0
        try:
            main([*(command or ("check", stage)), *arguments])
        except SystemExit as ended:
            status = ended.code
        report = json.loads((output / "check.json").read_text())
        return status, report, capsys.readouterr().out

    return run


def write_rows(folder: Path, changes: dict[int, dict]) -> Path:
    """Twelve pictures and a .jsonl file that names them, with some rows changed."""
    folder.mkdir()
    rows = [{"image": f"{n}.png", "text": text} for n, text in enumerate(CAPTIONS)]
    for n in range(len(rows)):
        tiny.picture(n).save(folder / f"{n}.png")
    for n, change in changes.items():
        rows[n] |= change
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"


@pytest.fixture
def bad_rows(tmp_path):
    changes = {1: {"image": "gone.png"}, 4: {"text": " "}, 5: {"text": None}, 7: {"text": LONG}, 9: {"image": "0.png"}}
    rows = write_rows(tmp_path / "rows", changes)
    (rows.parent / "2.png").write_bytes((rows.parent / "2.png").read_bytes()[:400])
    (rows.parent / "6.png").write_bytes(b"not a picture")
    Image.new("RGB", (1, 1)).save(rows.parent / "3.png")
    return rows


EXPECTED = {
    1: ("picture", "gone.png"),
    2: ("picture", "2.png"),
    4: ("text", "the text is empty"),
    5: ("text", "the text is empty"),
    6: ("picture", "6.png"),
    7: ("length", "more than the maximum of 120"),
}


@pytest.mark.parametrize("workers", ["0", "2"])
def test_every_bad_row_is_named_with_its_cause(check, bad_rows, tmp_path, workers):
    status, report, output = check(bad_rows, "--max_length", "120", "--dataloader_num_workers", workers)
    assert status == 1
    found = {row["index"]: (row["kind"], row["reason"]) for row in report["bad"]}
    assert found.keys() == EXPECTED.keys()
    for index, (kind, reason) in EXPECTED.items():
        assert found[index][0] == kind
        assert reason in found[index][1]
        assert f"train, row {index}: {found[index][1]}" in output
    assert {row["split"] for row in report["bad"]} == {"train"}
    assert "picture (a picture that cannot be read): 3 rows" in output
    *_, last = output.splitlines()
    assert last.startswith("check failed: training would stop at 6 of 12 rows; skip_unreadable: true leaves out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["check.json"]


def test_what_skip_unreadable_leaves_out_does_not_fail(check, bad_rows):
    status, report, output = check(bad_rows, "--skip_unreadable")
    assert (status, report["left_out"]) == (0, 5)
    *_, last = output.splitlines()
    assert last.startswith("check passed: 7 of 12 rows can be used; 5 are left out by skip_unreadable")
    status, report, output = check(bad_rows, "--skip_unreadable", "--max_length", "120")
    assert (status, report["left_out"]) == (1, 5)
    assert "training would stop at 1 of 12 rows." in output


def test_training_stops_before_its_first_step_or_leaves_them_out(parts, bad_rows, tmp_path):
    options = [*parts["stage2"], "--dataset", str(bad_rows), "--output_dir", str(tmp_path / "out")]
    with pytest.raises((ValueError, OSError, TypeError), match="row "):
        main(["stage2", *options, "--per_device_train_batch_size", "12", "--max_steps", "1"])
    assert not list(tmp_path.glob("out/*.safetensors"))
    main(["stage2", *options, "--skip_unreadable", "--max_steps", "1"])
    left_out = json.loads((tmp_path / "out" / "unreadable.json").read_text())["train"]
    assert sorted(map(int, left_out)) == [1, 2, 4, 5, 6]
    assert left_out["4"] == left_out["5"] == "the text is empty"


def test_numbers_in_place_of_texts(check, tmp_path):
    rows = write_rows(tmp_path / "rows", {n: {"text": n} for n in range(len(CAPTIONS))})
    status, report, output = check(rows)
    assert status == 1
    assert len(report["bad"]) == len(CAPTIONS)
    assert report["bad"][3] == {
        "split": "train",
        "index": 3,
        "position": 3,
        "kind": "text",
        "skippable": False,
        "reason": "column 'text' holds a int, 3; a string is needed",
    }
    assert "… and 7 more" in output
    assert "skip_unreadable" not in output
    assert "steps_per_epoch" not in report


def test_texts_in_lists_and_an_evaluation_split(check, tmp_path):
    texts = {n: {"text": [text, text + " again"]} for n, text in enumerate(CAPTIONS)}
    texts[3] = {"text": ["a cat", ""]}
    texts[8] = {"text": []}
    rows = write_rows(tmp_path / "rows", texts)
    status, report, _ = check(rows)
    assert (status, report["rows"]) == (1, {"train": 12})
    assert [(row["index"], row["position"], row["reason"]) for row in report["bad"]] == [
        (3, 3, "text 1 of 2 is empty"),
        (8, 8, "the text is empty"),
    ]
    status, report, _ = check(rows, "--skip_unreadable", "--eval_fraction", "0.25", "--eval_strategy", "epoch")
    assert (status, sum(report["rows"].values()), report["left_out"]) == (0, 12, 2)


def test_chats(check, tmp_path):
    chats = [
        {"image": f"{n}.png", "conversations": [
            {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": text}]}
        for n, text in enumerate(CAPTIONS)
    ]  # fmt: skip
    folder = write_rows(tmp_path / "rows", {}).parent
    chats[2]["image"] = "gone.png"
    (folder / "llava.json").write_text(json.dumps(chats))
    status, report, output = check(folder / "llava.json")
    assert status == 1
    assert [(row["index"], row["kind"]) for row in report["bad"]] == [(2, "picture")]
    assert "[[" in output
    messages = [[{"role": "user", "content": "What?"}, {"role": "assistant", "content": answer}]
                for answer in ("A cat.", "A dog.", " ", "A bird.")]  # fmt: skip
    messages[3].pop()
    pictures = [str(folder / f"{n}.png") for n in range(4)]
    Dataset.from_dict({"image": pictures, "messages": messages}).to_parquet(folder / "chats.parquet")
    status, report, _ = check(folder / "chats.parquet", "--messages_column", "messages")
    assert status == 1
    assert [(row["index"], row["reason"][:40]) for row in report["bad"]] == [
        (2, "the text is empty"),
        (3, "the last of the messages has to be the a"),
    ]


def test_a_batch_is_shown_and_steps_are_timed(check, tmp_path, monkeypatch):
    reads = []
    monkeypatch.setattr(dry_run, "_Problem", counted(dry_run._Problem, reads))
    options = ("--num_train_epochs", "3", "--gradient_accumulation_steps", "2", "--augment", "--save_strategy", "epoch")
    status, report, output = check(write_pairs(tmp_path / "pictures"), *options)
    assert status == 0
    assert len(reads) == len(CAPTIONS)  # one pass
    assert (report["steps_per_epoch"], report["steps"], report["bad"]) == (2, 6, [])
    assert report["seconds_per_step"] > 0
    assert report["seconds"] == pytest.approx(6 * report["seconds_per_step"], rel=0.1, abs=0.1)
    assert report["peak_memory_bytes"] > 1e6
    assert any(f"[[{text}<|im_end|>]]" in output for text in CAPTIONS)
    assert "<image> x 4" in output
    assert "12 rows in batches of 8: 2 steps an epoch, 6 steps in all" in output
    assert output.splitlines()[-1].startswith("check passed: 12 of 12 rows can be used. See ")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["check.json"]


def counted(problem: type, reads: list) -> type:
    class Counted(problem):
        def __call__(self, read):
            return super().__call__(lambda: reads.append(1) or read())

    return Counted


def test_weights_stay_and_a_checkpoint_has_the_size(parts, check, tmp_path, monkeypatch):
    before, after = {}, {}
    train = Trainer.train

    def watched(self, *arguments, **keywords):
        before.update({name: value.clone() for name, value in self.model.state_dict().items()})
        train(self, *arguments, **keywords)
        after.update(self.model.state_dict())

    monkeypatch.setattr(Trainer, "train", watched)
    pictures = write_pairs(tmp_path / "pictures")
    _, report, _ = check(pictures)
    assert before.keys() == after.keys()
    assert all(before[name].equal(value) for name, value in after.items())
    monkeypatch.setattr(Trainer, "train", train)
    output = tmp_path / "trained"
    run = ["--dataset", str(pictures), "--output_dir", str(output), "--max_steps", "1", "--save_steps", "1"]
    main(["stage2", *parts["stage2"], *run])
    weights = load_file(output / "checkpoint-1" / "model.safetensors")
    states = torch.load(output / "checkpoint-1" / "optimizer.pt")["state"].values()
    moments = [state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq")]
    assert report["checkpoint_bytes"] == sum(value.nbytes for value in weights.values()) + sum(moments)


def test_stage_1_and_a_feature_cache(check, parts, tmp_path):
    pictures = write_pairs(tmp_path / "pictures")
    status, report, output = check(pictures, stage="stage1")
    assert status == 0
    assert report["steps_per_epoch"] == 3
    assert "[[" in output
    cache = tmp_path / "cache"
    main(["cache", "--vision", parts["stage2"][1], "--dataset", str(pictures), "--output_dir", str(cache)])
    for stage in ("stage1", "stage2"):
        status, report, output = check(cache, "--max_length", "60", stage=stage)
        assert status == (1 if stage == "stage2" else 0)
        assert "12 pictures" not in output
        assert report["rows"] == {"train": 12}


def test_train_with_dry_run_is_the_same(check, tmp_path):
    pictures = write_pairs(tmp_path / "pictures")
    reports = [check(pictures, *options, command=command)[1]
               for command, options in ((("stage2",), ("--dry_run", "true")), (None, ()))]  # fmt: skip
    for report in reports:
        for name in ("seconds_per_step", "seconds", "peak_memory_bytes"):
            report.pop(name)
    assert reports[0] == reports[1]


def test_other_settings_of_training(check, tmp_path):
    pictures = write_pairs(tmp_path / "pictures")
    for options in (
        ("--pack_to", "128", "--pad_to_multiple_of", "64"),
        ("--train_sampling_strategy", "group_by_length", "--dataloader_drop_last", "--gradient_checkpointing"),
        ("--qformer_learning_rate", "1e-5", "--optim", "adafactor", "--max_steps", "7"),
        ("--push_to_hub", "--report_to", "tensorboard", "--logging_steps", "1", "--save_steps", "1"),
    ):
        status, report, _ = check(pictures, *options)
        assert (status, report["bad"]) == (0, [])
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["check.json"]
    with pytest.raises(ValueError, match="do not fill one batch of 16"):
        check(pictures, "--per_device_train_batch_size", "16", "--dataloader_drop_last")


def test_the_command_line_gives_the_status(parts, bad_rows, tmp_path, monkeypatch, capsys):
    arguments = ["lorgnette", "check", "stage2", *parts["stage2"], "--dataset", str(bad_rows)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--output_dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert "check failed: " in capsys.readouterr().out


def test_a_stream_is_refused(parts, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["check", "stage2", *parts["stage2"], "--dataset", "d", "--streaming", "--max_steps", "1"])
    assert ended.value.code == 2
    assert "dry_run reads all rows, which cannot be done with a stream" in capsys.readouterr().err


def test_figures():
    assert [megabytes(count) for count in (5e5, 2.5e7, 3e9)] == ["0.5 MB", "25.0 MB", "3.00 GB"]
    assert [dry_run.duration(seconds) for seconds in (5, 600, 7260)] == ["5 s", "10 min", "2 h 1 min"]
