"""Every form a dataset may come in gives the same rows, and what is wrong with it is said before training."""

import json
from itertools import islice

import datasets
import pytest
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, List, Value
from tiny import picture

from lorgnette.processing.image_loading import load_image
from lorgnette.trainer import data
from lorgnette.trainer.arguments import DataArguments
from lorgnette.trainer.data import load_pairs


TEXTS = ["a cat", "a dog", "a bird", "a car"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep what `datasets` prepares out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    """Four PNG files, as in an imagefolder."""
    root = tmp_path / "pictures"
    root.mkdir()
    for number in range(len(TEXTS)):
        picture(number).save(root / f"{number}.png")
    return root


def write_imagefolder(folder):
    rows = [{"file_name": f"{number}.png", "caption": text} for number, text in enumerate(TEXTS)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def write_jsonl(folder):
    rows = [{"image": f"{number}.png", "caption": text, "extra": number} for number, text in enumerate(TEXTS)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"


def pictures_dataset():
    return Dataset.from_dict({"caption": TEXTS, "image": [picture(number) for number in range(len(TEXTS))]})


def write_parquet(folder):
    pictures_dataset().to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def write_saved(folder):
    pictures_dataset().save_to_disk(folder / "saved")
    return folder / "saved"


def write_saved_splits(folder):
    DatasetDict(train=pictures_dataset()).save_to_disk(folder / "splits")
    return folder / "splits"


def write_arrow(folder):
    return next(write_saved(folder).glob("*.arrow"))


SAVE_FORMATS = [write_imagefolder, write_jsonl, write_parquet, write_arrow, write_saved, write_saved_splits]


def arguments(source, **fields):
    return DataArguments(dataset=str(source), **{"text_column": "caption", **fields})


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("write", SAVE_FORMATS)
def test_every_form_gives_the_same_rows(folder, write, streaming):
    args = arguments(write(folder), streaming=streaming, shuffle_buffer_size=0)
    train, evaluation = load_pairs(args, evaluate=False, seed=0)
    rows = list(islice(train, len(TEXTS)))
    assert evaluation is None
    assert isinstance(train, IterableDataset if streaming else Dataset)
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert [row["caption"] for row in rows] == TEXTS
    assert set(rows[0]) == {"image", "caption", "index", "image_id"}
    for number, row in enumerate(rows):
        assert load_image(row["image"]).tobytes() == picture(number).tobytes()


def test_several_pictures_a_row(folder):
    (folder / "rows.jsonl").write_text(json.dumps({"image": ["0.png", "1.png"], "caption": "two"}))
    train, _ = load_pairs(arguments(folder / "rows.jsonl"), evaluate=False, seed=0)
    assert [load_image(path).size for path in train[0]["image"]] == [picture().size] * 2


def chat(*parts, answer="A cat."):
    asked = {"role": "user", "content": [{"type": "text", "text": "What?"}, *parts]}
    return [asked, {"role": "assistant", "content": answer}]


class TestChats:
    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize(
        "source",
        [{"image": "1.png"}, {"path": "1.png"}, {"url": "1.png"}, {"image": {"path": "1.png"}},
         {"type": "image_url", "image_url": {"url": "1.png"}}],
    )  # fmt: skip
    def test_pictures_in_the_messages_are_relative_to_the_file(self, folder, source, streaming):
        rows = [{"chat": chat({"type": "image", **source}), "text": "unused"}]
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        args = DataArguments(str(folder / "rows.jsonl"), messages_column="chat", streaming=streaming)
        row = next(iter(load_pairs(args, evaluate=False, seed=0)[0]))
        assert set(row) == {"messages", "index"}
        asked, answer = row["messages"]
        assert (asked["role"], asked["content"][0]) == ("user", {"type": "text", "text": "What?"})
        assert load_image(asked["content"][1]["image"]).tobytes() == picture(1).tobytes()
        assert answer == {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}

    def test_pictures_in_a_column_beside_them(self, folder):
        (folder / "rows.jsonl").write_text(json.dumps({"messages": chat({"type": "image"}), "picture": "1.png"}))
        args = DataArguments(str(folder / "rows.jsonl"), messages_column="messages", image_column="picture")
        row = load_pairs(args, evaluate=False, seed=0)[0][0]
        assert load_image(row["picture"]).tobytes() == picture(1).tobytes()
        assert row["messages"][0]["content"][1] == {"type": "image"}

    @pytest.mark.parametrize("streaming", [False, True])
    def test_pictures_that_the_file_holds_are_not_decoded(self, folder, streaming):
        part = {"type": Value("string"), "text": Value("string"), "image": Image()}
        messages = List({"role": Value("string"), "content": List(part)})
        asked = chat({"type": "image", "image": picture(1)}, answer=[{"type": "text", "text": "A cat."}])
        rows = Dataset.from_list([{"messages": asked}], features=Features(messages=messages))
        rows.to_parquet(folder / "rows.parquet")
        args = DataArguments(str(folder / "rows.parquet"), messages_column="messages", streaming=streaming)
        row = next(iter(load_pairs(args, evaluate=False, seed=0)[0]))
        shown = row["messages"][0]["content"][1]["image"]
        assert isinstance(shown, dict)
        assert load_image(shown).tobytes() == picture(1).tobytes()

    @pytest.mark.parametrize(
        ("messages", "kind", "message"),
        [
            (chat({"type": "video"}), ValueError, 'row 0: a part is .*"type": "image".*video'),
            ("What?", TypeError, "row 0: a message is .*not 'W'"),
        ],
    )
    def test_what_is_no_chat_is_named(self, folder, messages, kind, message):
        (folder / "rows.jsonl").write_text(json.dumps({"messages": messages}))
        args = DataArguments(str(folder / "rows.jsonl"), messages_column="messages")
        rows, _ = load_pairs(args, evaluate=False, seed=0)
        with pytest.raises(kind, match=message):
            _ = rows[0]

    def test_a_column_that_is_named_has_to_be_there(self, folder):
        (folder / "rows.jsonl").write_text(json.dumps({"messages": chat()}))
        for columns in ({"messages_column": "chat"}, {"messages_column": "messages", "image_column": "photo"}):
            with pytest.raises(ValueError, match=r"no column '(chat|photo)'; it has messages"):
                load_pairs(DataArguments(str(folder / "rows.jsonl"), **columns), evaluate=False, seed=0)


def test_class_folders_give_their_names_as_text(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "sorted" / name).mkdir(parents=True)
        picture().save(tmp_path / "sorted" / name / "0.png")
    train, _ = load_pairs(arguments(tmp_path / "sorted", text_column="label"), evaluate=False, seed=0)
    assert [row["label"] for row in train] == ["cat", "dog"]


def test_held_out_rows_keep_their_numbers(folder):
    args = arguments(write_jsonl(folder), eval_fraction=0.5)
    train, evaluation = load_pairs(args, evaluate=True, seed=0)
    again, _ = load_pairs(args, evaluate=False, seed=0)
    assert sorted(row["index"] for row in [*train, *evaluation]) == [0, 1, 2, 3]
    assert len(evaluation) == 2
    assert [row["index"] for row in train] == [row["index"] for row in again]
    assert all(TEXTS[row["index"]] == row["caption"] for row in [*train, *evaluation])


def test_evaluation_data_may_lie_elsewhere(folder):
    args = arguments(write_jsonl(folder), train_split="train[:2]", eval_dataset=str(write_parquet(folder)))
    train, evaluation = load_pairs(args, evaluate=True, seed=0)
    assert (len(train), len(evaluation)) == (2, 4)


def test_a_streamed_training_set_is_endless_and_shuffled_by_its_seed(folder):
    args = arguments(write_jsonl(folder), streaming=True, shuffle_buffer_size=3)
    orders = [[row["index"] for row in islice(load_pairs(args, evaluate=False, seed=n)[0], 40)] for n in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != [0, 1, 2, 3] * 10
    assert all(9 <= orders[0].count(index) <= 11 for index in range(4))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_column_is_named_with_those_that_exist(folder, streaming):
    args = arguments(write_jsonl(folder), text_column="text", streaming=streaming)
    with pytest.raises(ValueError, match="no column 'text'; it has image, caption, extra"):
        load_pairs(args, evaluate=False, seed=0)


@pytest.mark.parametrize("url", ["https://example.org/a.png", "HTTPS://example.org/a.png", "data:image/png;base64,AA"])
def test_a_pictures_url_is_left_to_the_processor(url):
    assert data._open_picture(url, 0, None) == url


def test_wrong_sources_are_errors(folder):
    write_jsonl(folder)
    (folder / "empty.jsonl").touch()
    (folder / "rows.txt").write_text("no")
    pictures_dataset().select([]).to_parquet(folder / "none.parquet")
    for name, error, message in [
        ("empty.jsonl", ValueError, "the file is empty"),
        ("rows.txt", ValueError, "files that end in .* are not read"),
        ("gone.jsonl", FileNotFoundError, "no such file or folder"),
        ("none.parquet", ValueError, "has no rows"),
    ]:
        with pytest.raises(error, match=message):
            load_pairs(arguments(folder / name), evaluate=False, seed=0)
    with pytest.raises(ValueError, match="has no rows"):
        load_pairs(arguments(folder / "none.parquet", streaming=True), evaluate=False, seed=0)
    (folder / "index.jsonl").write_text('{"image": "0.png", "index": "a"}')
    with pytest.raises(ValueError, match='"index" has to be renamed'):
        load_pairs(arguments(folder / "index.jsonl", text_column="index"), evaluate=False, seed=0)
    with pytest.raises(ValueError, match="no split 'test'; it has train"):
        load_pairs(arguments(write_saved(folder), train_split="test"), evaluate=False, seed=0)
