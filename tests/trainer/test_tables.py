"""Tables: what pandas would read as missing, lines far into a stream, numbers, and pictures that no row names."""

import csv
from pathlib import Path

import pytest
from tiny_formats import TEXTS, batch_of, names, write, write_csv

from lorgnette.trainer.arguments import DataArguments, RowArguments
from lorgnette.trainer.data import load_rows
from lorgnette.trainer.formats import readable_stream


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("streaming", [False, True], ids=["", "streamed"])
def test_na_is_a_text_in_the_csv_of_a_folder(root, streaming):
    def texts(source: Path, split: str = "train") -> list[str]:
        return [row["text"] for row in load_rows(RowArguments(dataset=str(source), streaming=streaming), split)]

    rows = [(Path(name).name, text) for name, text in zip(names(), [*TEXTS[:3], "null"], strict=True)]
    (root / "csv").mkdir()
    write_csv(root / "csv")
    assert texts(root / "csv") == TEXTS
    for folder in ("pics", "val"):
        (root / "both" / folder).mkdir(parents=True)
        with (root / "both" / folder / "metadata.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("file_name", "text"), *rows])
        for name, _ in rows:
            (root / "both" / folder / name).write_bytes((root / "pics" / name).read_bytes())
    assert texts(root / "both") == texts(root / "both", "validation") == [text for _, text in rows]
    assert texts(root / "both", "train[1:3]+validation[:25%]") == [*TEXTS[1:3], TEXTS[0]]
    with pytest.raises(ValueError, match="Unknown split"):
        texts(root / "both", "test")
    loaded = load_rows(RowArguments(dataset=str(root / "both"), streaming=streaming), "validation")
    assert [Path(row["image"]) for row in loaded] == [root / "both" / "val" / name for name, _ in rows]
    write(root / "both" / "pics" / "metadata.csv", "name,text\n000.png,a\n")
    with pytest.raises(ValueError, match=r"metadata\.csv has no column 'file_name', but name, text"):
        texts(root / "both")


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        (
            "rows.jsonl",
            '{"image": oh}',
            r"line 50001, b'{\"image\": oh}', is no JSON \(JSON parse error: Invalid value\)",
        ),
        ("rows.csv", "pics/000.png,a,b", "Expected 2 fields in line 50002, saw 3"),
    ],
)
def test_a_broken_line_late_in_a_stream_is_named(root, name, line, message):
    good = '{"image": "pics/000.png", "text": "' + "a" * 300 + '"}' if name.endswith("jsonl") else "pics/000.png,a"
    header = [] if name.endswith("jsonl") else ["image,text"]
    write(root / name, "\n".join([*header, *[good] * 50_000, line, good]) + "\n")
    write(root / "held_out.csv", "image,text\npics/000.png,a\n")
    arguments = DataArguments(dataset=str(root / "held_out.csv"), eval_dataset=str(root / name), streaming=True)
    rows = load_rows(RowArguments(dataset=str(root / name), streaming=True), "train").select_columns(["text"])
    with pytest.raises(ValueError, match=message) as raised, readable_stream(arguments, arguments.eval_dataset):
        for _ in rows:
            pass
    if name.endswith("jsonl"):
        assert str(root / name) in str(raised.value)


def test_a_caption_that_is_a_number_is_named(root):
    (root / "numbers.csv").write_text("image,text\npics/000.png,5\npics/001.png,7\n")
    with pytest.raises(TypeError, match="row 0: column 'text' holds a int, 5"):
        batch_of(root / "numbers.csv")


def test_pictures_that_metadata_leave_out_and_texts_over_lines_are_warned_of(root, caplog):
    write(root / "pics" / "metadata.csv", "file_name,text\n000.png,a\n001.png,b\n")
    with caplog.at_level("WARNING", logger="lorgnette"):
        batch_of(root / "pics")
        batch_of(write(root / "rows.csv", 'image,text\npics/000.png,"a\ncat"\npics/001.png,b\n'))
    assert "2 pictures are in no row of its metadata" in caplog.text
    assert "3 lines make 2 rows" in caplog.text
