"""One set of pictures in each format that people have gives the same batches; what is broken is named."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from tiny import picture
from tiny_formats import (
    QUERY,
    TEXTS,
    assert_equal,
    batch_of,
    names,
    processor,
    write,
    write_csv,
    write_webdataset,
)

from lorgnette import LorgnetteCollator
from lorgnette.trainer.arguments import DataArguments, RowArguments
from lorgnette.trainer.data import load_pairs, load_rows
from lorgnette.trainer.formats import find_format


CAPTIONS = [[f"{text} {number}" for number in range(5)] for text in TEXTS]


pytestmark = pytest.mark.usefixtures("own_cache")


def write_tsv(root: Path) -> Path:
    return write_csv(root, "\t", "rows.tsv")


def write_windows_csv(root: Path) -> Path:
    """A byte order mark, CRLF, and backslashes."""
    path = write_csv(root, encoding="utf-8-sig", end="\r\n")
    path.write_bytes(path.read_bytes().replace(b"pics/", b"pics\\"))
    return path


def write_jsonl(root: Path) -> Path:
    rows = [{"image": name, "text": text} for name, text in zip(names(), TEXTS, strict=True)]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root / "rows.jsonl"


def write_shards(root: Path) -> str:
    for number in range(2):
        write_webdataset(root, f"part-{number:03d}.tar", range(2 * number, 2 * number + 2))
    return f"{root}/part-{{000..001}}.tar"


def write_folder_of_shards(root: Path) -> Path:
    (root / "tars" / "pics").mkdir(parents=True)
    for name in names():
        (root / "tars" / name).write_bytes((root / name).read_bytes())
    for number in range(2):
        write_webdataset(root / "tars", f"part-{number:03d}.tar", range(2 * number, 2 * number + 2))
    for name in names():
        (root / "tars" / name).unlink()
    return root / "tars"


def write_pairs(root: Path) -> Path:
    for name, text in zip(names(), TEXTS, strict=True):
        (root / name).with_suffix(".txt").write_text(text + "\n")
    return root / "pics"


def write_imagefolder(root: Path) -> Path:
    rows = [{"file_name": Path(name).name, "text": text} for name, text in zip(names(), TEXTS, strict=True)]
    (root / "pics" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root / "pics"


def write_parquet(root: Path) -> Path:
    Dataset.from_dict({"image": names(), "text": TEXTS}).to_parquet(root / "rows.parquet")
    return root / "rows.parquet"


WRITERS = (write_csv, write_tsv, write_windows_csv, write_jsonl, write_webdataset, write_shards)
WRITERS += (write_folder_of_shards, write_pairs, write_imagefolder, write_parquet)


def llava_rows() -> list[dict]:
    return [
        {"id": number, "image": name, "conversations": [
            {"from": "human", "value": f"<image>\n{QUERY}"}, {"from": "gpt", "value": text}]}
        for number, (name, text) in enumerate(zip(names(), TEXTS, strict=True))
    ]  # fmt: skip


def write_llava(root: Path, rows: list[dict] | None = None) -> Path:
    (root / "llava.json").write_text(json.dumps(llava_rows() if rows is None else rows, indent=1))
    return root / "llava.json"


def write_llava_jsonl(root: Path) -> Path:
    (root / "llava.jsonl").write_text("\n".join(map(json.dumps, llava_rows())))
    return root / "llava.jsonl"


def coco_content() -> dict:
    return {
        "info": {"year": 2014},
        "images": [{"id": number + 7, "file_name": Path(name).name} for number, name in enumerate(names())],
        "annotations": [
            {"id": 10 * number + place, "image_id": number + 7, "caption": caption}
            for place in range(5)
            for number, caption in ((number, CAPTIONS[number][place]) for number in range(len(TEXTS)))
        ],
    }


def write_coco(root: Path, content: dict | None = None) -> Path:
    (root / "captions.json").write_text(json.dumps(coco_content() if content is None else content, indent=2))
    return root / "captions.json"


@pytest.mark.parametrize("streaming", [False, True], ids=["", "streamed"])
def test_each_format_gives_the_same_batch(root, streaming):
    fields = {"streaming": True, "shuffle_buffer_size": 0} if streaming else {}
    expected = batch_of(write_jsonl(root))
    assert expected["pixel_values"].shape[0] == len(TEXTS)
    for write_rows in WRITERS:
        for stale in (*root.glob("*.*"), *root.glob("pics/*.txt"), *root.glob("pics/metadata*")):
            stale.unlink()
        assert_equal(batch_of(write_rows(root), **fields), expected)


@pytest.mark.parametrize("write", [write_llava, write_llava_jsonl])
def test_llavas_picture_stands_where_its_mark_does(root, write):
    source = write(root)
    assert find_format(str(source)) == "llava"
    rows, _ = load_pairs(DataArguments(dataset=str(source)), evaluate=False, seed=0)
    parts = rows[1]["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image", "text"]
    assert Path(parts[0]["image"]) == root / names()[1]
    found, collator = batch_of(source), LorgnetteCollator(processor(), text_column="messages")
    chats = [
        {"index": number, "messages": [
            {"role": "user", "content": [{"type": "image", "image": root / name}, {"type": "text", "text": QUERY}]},
            {"role": "assistant", "content": text}]}
        for number, (name, text) in enumerate(zip(names(), TEXTS, strict=True))
    ]  # fmt: skip
    assert_equal(found, dict(collator(chats)))
    assert "<image>" not in processor().tokenizer.decode(found["input_ids"][0]).replace("<image>" * 2, "")


def test_several_pictures_none_and_pictures_without_a_mark(root):
    turns = [{"from": "human", "value": "<image> and <image>: which?"}, {"from": "gpt", "value": "The second."}]
    several = {"image": names()[:2], "conversations": turns}
    unmarked_turns = [{"from": "user", "value": "What?"}, {"from": "assistant", "value": "A bird."}]
    unmarked = {"image": names()[2], "conversations": unmarked_turns}
    words = {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}]}
    rows, _ = load_pairs(
        DataArguments(dataset=str(write_llava(root, [several | {"images": None}, unmarked | {"image": [names()[2]]}]))),
        evaluate=False, seed=0,
    )  # fmt: skip
    assert [part["type"] for part in rows[0]["messages"][0]["content"]] == ["image", "text", "image", "text"]
    assert [part["type"] for part in rows[1]["messages"][0]["content"]] == ["image", "text"]
    (root / "llava.json").unlink()
    rows, _ = load_pairs(DataArguments(dataset=str(write_llava(root, [words]))), evaluate=False, seed=0)
    assert [part["type"] for part in rows[0]["messages"][0]["content"]] == ["text"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversations": [{"from": "human", "value": "<image><image>"}]}, "row 2: there are 2 <image> .* 1 pictures"),
        ({"image": None}, "row 2: there are 1 <image> .* 0 pictures"),
        ({"conversations": [{"from": "robot", "value": "Hi"}]}, "row 2: \"from\" is 'robot'; known are human"),
        ({"conversations": [{"from": "human", "value": None}]}, "row 2: the value of a turn from human is None"),
        ({"conversations": []}, "row 2: conversations is"),
    ],
)
def test_a_broken_conversation_is_named(root, change, message):
    rows = llava_rows()
    rows[2] |= change
    with pytest.raises(ValueError, match=message):
        batch_of(write_llava(root, rows))


@pytest.mark.parametrize("streaming", [False, True], ids=["", "streamed"])
def test_a_row_has_all_texts_of_its_picture(root, streaming):
    rows = [{"image": name, "text": texts} for name, texts in zip(names(), CAPTIONS, strict=True)]
    (root / "lists.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = {f"caption_{number}": [texts[number] for texts in CAPTIONS] for number in range(5)}
    Dataset.from_dict({"image": names(), **columns}).to_parquet(root / "columns.parquet")
    fields = {"streaming": True, "shuffle_buffer_size": 0} if streaming else {}
    sources = [
        (root / "lists.jsonl", {}),
        (root / "columns.parquet", {"text_column": list(columns)}),
        (root / "columns.parquet", {"text_column": json.dumps(list(columns))}),
    ]
    if not streaming:
        sources.append((write_coco(root), {"image_root": str(root / "pics")}))
    for source, named in sources:
        arguments = DataArguments(dataset=str(source), **named, **fields)
        trained, _ = load_pairs(arguments, evaluate=False, seed=0)
        trained = list(trained if isinstance(trained, Dataset) else trained.take(4))
        assert [row["text"] for row in trained] == CAPTIONS, source
        assert [row["index"] for row in trained] == [0, 1, 2, 3]
        assert [Path(row["image"]).name for row in trained] == [Path(name).name for name in names()]
        evaluated = load_rows(RowArguments(dataset=str(source), **named), "train")
        assert [row["text"] for row in evaluated] == CAPTIONS


def test_a_picture_is_held_out_with_all_its_texts(root):
    arguments = DataArguments(dataset=str(write_coco(root)), image_root=str(root / "pics"), eval_fraction=0.5)
    trained, held_out = load_pairs(arguments, evaluate=True, seed=0, length_column="length")
    assert len(trained) == len(held_out) == 2
    assert all(len(row["text"]) == 5 for rows in (trained, held_out) for row in rows)
    assert {row["index"] for row in trained} & {row["index"] for row in held_out} == set()
    assert all(row["length"] == sum(map(len, row["text"])) for row in trained)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "row 1: column 'text' is an empty list"),
        (["a", None], "row 1: column 'text', text 1 of 2, is None"),
        (["a", " "], "row 1: column 'text', text 1 of 2, is empty"),
    ],
)
def test_a_missing_text_among_several_is_named(root, texts, message):
    rows = [{"image": name, "text": ["a", "b"]} for name in names()]
    rows[1]["text"] = texts
    (root / "lists.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=message):
        batch_of(root / "lists.jsonl")


def coco_with(**changes) -> dict:
    content = coco_content()
    content["annotations"][3] |= changes
    return content


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda root: write_coco(root, coco_with(image_id=99)), "annotation 3 is of the picture 99, which `images`"),
        (lambda root: write_coco(root, coco_with(caption=5)), "annotation 3: its caption is a int, 5"),
        (lambda root: write_coco(root, coco_with(caption=None)), "annotation 3: its caption is a NoneType"),
        (lambda root: cut(write_webdataset(root), 2), "shards-000.tar is cut short"),
        (lambda root: cut(write_webdataset(root), 1), "shards-000.tar is cut short"),
        (
            lambda root: broken_line(write_jsonl(root), b'{"image": oh no}'),
            r'line 2, b\'{"image": oh no}\', is no JSON',
        ),
        (lambda root: broken_line(write_csv(root), b"pics/001.png,caf\xe9"), "line 2, .*caf.*is not UTF-8"),
        (lambda root: empty(root / "rows.csv"), "the file is empty"),
        (lambda root: unpaired(write_pairs(root), "000.txt"), r"1 files have no text of the same name \(000.png"),
        (lambda root: unpaired(write_pairs(root), "001.png"), r"1 files have no picture of the same name \(001.txt"),
    ],
)
def test_what_is_broken_is_named_before_training(root, write, message):
    with pytest.raises(ValueError, match=message):
        batch_of(write(root))


def cut(path: Path, by: int) -> Path:
    content = path.read_bytes().rstrip(b"\0")
    path.write_bytes(content[: len(content) // by])
    return path


def broken_line(path: Path, line: bytes) -> Path:
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], line, *lines[2:]]))
    return path


def empty(path: Path) -> Path:
    path.touch()
    return path


def unpaired(folder: Path, name: str) -> Path:
    (folder / name).unlink()
    return folder


def test_a_missing_picture_is_named_with_the_folder_that_was_searched(root):
    (root / "rows.csv").write_text("image,text\npics/000.png,a\npics/gone.png,b\n")
    with pytest.raises(OSError, match=rf"row 1.*{root}/pics/gone.png"):
        batch_of(root / "rows.csv")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("gone.csv", FileNotFoundError, r"no such file or folder \(.*data contains pics/\)"),
        ("nowhere/rows.csv", FileNotFoundError, "no folder .*nowhere"),
        ("gone-{00..01}.tar", FileNotFoundError, r"no file .*gone-00.tar \(.* contains pics/\)"),
    ],
)
def test_a_missing_file_is_named_with_what_lies_beside(root, name, error, message):
    with pytest.raises(error, match=message):
        batch_of(root / name)


def test_what_is_not_recognised_is_told_with_what_is_read(root):
    (root / "rows.xlsx").write_text("x")
    (root / "others").mkdir()
    (root / "others" / "notes.docx").write_text("x")
    with pytest.raises(ValueError, match=r"files that end in '.xlsx' are not read.*a .csv, .tsv.*WebDataset"):
        find_format(str(root / "rows.xlsx"))
    with pytest.raises(ValueError, match=r"contains notes.docx.*save_to_disk"):
        find_format(str(root / "others"))
    assert find_format("jxie/flickr8k") == "hub"


def test_the_format_can_be_overruled(root):
    write_pairs(root)
    rows = load_rows(RowArguments(dataset=str(write_llava(root)), format="table", text_column="id"), "train")
    assert rows[1]["id"] == 1
    with pytest.raises(ValueError, match="format is 'xml'; it takes table"):
        RowArguments(dataset="x", format="xml")


def pairs_with(root: Path, *names: str) -> Path:
    """Paired pictures and texts, and empty files of further names."""
    write_pairs(root)
    for name in names:
        (root / "pics" / name).parent.mkdir(exist_ok=True)
        picture(9).save(root / "pics" / name) if name.endswith((".jpg", ".png")) else write(root / "pics" / name, "x")
    return root / "pics"


def split_folders(root: Path, *folders: str) -> Path:
    for folder in folders:
        (root / "split" / folder).mkdir(parents=True)
        picture(1).save(root / "split" / folder / "0.png")
        write(root / "split" / folder / "0.txt", "a cat")
    return root / "split"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: write_coco(root, coco_with_image(id=7)), "image 2 has the id 7, as 000.png has"),
        (lambda root: write_coco(root, coco_with_image(file_name=None)), "image 2 has no id or no file_name"),
        (lambda root: write_coco(root, coco_content() | {"annotations": {}}), "`annotations` is no list of objects"),
        (lambda root: write(root / "a.csv", "text,image\na dog, running,pics/0.png\n"), "3 fields and the header 2"),
        (lambda root: write(root / "a.tsv", "a cat\tpics/000.png\na dog\tpics/001.png\n"), "a header is needed"),
        (lambda root: write(root / "a.csv", "image,text\n"), "has no rows"),
        (lambda root: write(root / "a.json", json.dumps({"image": names(), "text": TEXTS})), "one object of lists"),
        (lambda root: write(root / "a.json", '[\n {"image": "a",\n "text" "b"}]'), "line 3, column 9 is no JSON"),
        (lambda root: pairs_with(root, "000.jpg"), "000.jpg and 000.png share one text"),
        (lambda root: pairs_with(root, "README.txt"), "no picture of the same name .*--format folder"),
        (lambda root: split_folders(root, "train", "extra"), "the folder extra beside train is none of train"),
        (lambda root: split_folders(root, "train", "val", "validation"), "validation beside train is a second folder"),
        (lambda root: write_llava(root, [{"conversations": "[]"}]), "conversations is '\\[\\]'"),
    ],
)
def test_what_would_be_read_as_something_else_is_refused(root, make, message):
    with pytest.raises(ValueError, match=message):
        batch_of(make(root))


def coco_with_image(**changes) -> dict:
    content = coco_content()
    content["images"][2] |= changes
    return content


def test_names_that_datasets_would_expand_and_hidden_files(root):
    folder = root / "[x] y"
    for name in ("000.png", "001.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((root / "pics" / name).read_bytes())
    write(folder / "rows.csv", "image,text\n000.png,a\n001.png,b\n")
    assert batch_of(folder / "rows.csv")["pixel_values"].shape[0] == 2
    assert batch_of(pairs_with(root, ".thumb.png"))["pixel_values"].shape[0] == 4


def test_splits_of_paired_folders(root):
    for split in ("train", "val"):
        (root / "split" / split).mkdir(parents=True)
        for number, text in enumerate(TEXTS[:2]):
            picture(number).save(root / "split" / split / f"{number}.jpg")
            (root / "split" / split / f"{number}.txt").write_text(f"{text} {split}")
    arguments = DataArguments(dataset=str(root / "split"), eval_split="validation")
    trained, held_out = load_pairs(arguments, evaluate=True, seed=0)
    assert [row["text"] for row in held_out] == [f"{text} val" for text in TEXTS[:2]]
    assert Path(trained[0]["image"]) == root / "split" / "train" / "0.jpg"
