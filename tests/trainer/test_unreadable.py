"""`skip_unreadable`: rows with broken pictures are an error, or are left out and listed before training begins."""

import json

import datasets
import pytest
import tiny
from tiny_training import CAPTIONS, joined, write_backbones, write_pairs
from transformers import TrainingArguments

from lorgnette.processing.image_loading import load_image
from lorgnette.trainer.arguments import DataArguments
from lorgnette.trainer.data import load_pairs
from lorgnette.trainer.run import train
from lorgnette.trainer.unreadable import find_unreadable, leave_out_unreadable, why_empty


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep what `datasets` prepares out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures, of which the fourth is cut off and the eighth is none."""
    folder = write_pairs(tmp_path / "pictures")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:400])
    (folder / "7.png").write_bytes(b"not a picture")
    return folder


@pytest.mark.parametrize("skip", [False, True])
def test_training_stops_at_them_or_goes_on_without_them(folder, tmp_path, caplog, skip):
    data = DataArguments(dataset=str(folder), eval_fraction=0.25, skip_unreadable=skip)
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "eval_strategy": "epoch"}
    plain = {"report_to": "none", "use_cpu": True, "remove_unused_columns": False, "save_strategy": "no"}
    arguments = TrainingArguments(str(tmp_path / "out"), **settings, **plain, prediction_loss_only=True)
    backbones = write_backbones(tmp_path)
    if not skip:
        with pytest.raises(ValueError, match=r"row [37]: .*[37]\.png"):
            train(lambda: joined(backbones), data, arguments)
        return
    run = train(lambda: joined(backbones), data, arguments)
    kept = [row["index"] for rows in (run.train_dataset, run.eval_dataset) for row in rows]
    assert sorted(kept) == [n for n in range(len(CAPTIONS)) if n not in (3, 7)]
    report = json.loads((tmp_path / "out" / "unreadable.json").read_text())
    assert sorted(int(number) for reasons in report.values() for number in reasons) == [3, 7]
    assert "3.png" in {**report["train"], **report["eval"]}["3"]
    assert "rows that cannot be read are left out: " in caplog.text


def test_workers_find_the_same(folder, tmp_path):
    rows, _ = load_pairs(DataArguments(dataset=str(folder)), evaluate=False, seed=0)
    found = [find_unreadable(rows, "image", load_image, "train", workers) for workers in (0, 2)]
    assert found[0] == found[1]
    assert list(found[0]) == ["3", "7"]
    kept = leave_out_unreadable({"train": rows}, "image", load_image, tmp_path / "out", "text")["train"]
    with pytest.raises(ValueError, match="none of its 2 rows can be read; row 3: "):
        find_unreadable(rows.select([3, 7]), "image", load_image, "train")
    assert find_unreadable(kept, "image", load_image, "train") == {}


def test_pictures_in_chats_are_read_too(tmp_path):
    def chat(path):
        parts = [{"type": "text", "text": "What?", "image": None}, {"type": "image", "text": None, "image": path}]
        answer = [{"type": "text", "text": "A cat.", "image": None}]
        return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]}

    tiny.picture().save(tmp_path / "0.png")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(chat(path)) for path in ("0.png", "gone.png")))
    data = DataArguments(dataset=str(tmp_path / "rows.jsonl"), messages_column="messages")
    rows, _ = load_pairs(data, evaluate=False, seed=0)
    found = find_unreadable(rows, "image", load_image, "train")
    assert list(found) == ["1"]
    assert "gone.png" in found["1"]


def test_what_is_no_picture_at_all_names_the_row(tmp_path):
    rows = datasets.Dataset.from_dict({"index": [4, 5], "image": [1, 2]})
    with pytest.raises(TypeError, match="row 4: int is no image"):
        find_unreadable(rows, "image", load_image, "train")
    assert find_unreadable(rows.select([]), "image", load_image, "train") == {}


@pytest.mark.parametrize(
    ("text", "empty"),
    [
        ("a cat", False),
        (" ", True),
        (None, True),
        ([], True),
        (["a cat", "a dog"], False),
        (["a cat", " "], "text 1 of 2 is empty"),
        ([None, "a cat"], "text 0 of 2 is empty"),
        ([{"role": "user", "content": ""}, {"role": "assistant", "content": "A cat."}], False),
        ([{"role": "user", "content": "What?"}, {"role": "assistant", "content": " "}], True),
    ],
)
def test_empty_texts_are_the_same_everywhere(text, empty):
    assert why_empty(text) == ("the text is empty" if empty is True else empty or None)


def test_a_stream_cannot_be_read_first():
    with pytest.raises(ValueError, match="skip_unreadable reads all pictures first"):
        DataArguments(dataset="d", streaming=True, skip_unreadable=True)
