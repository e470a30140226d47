"""Tars of WebDataset: splits by folders, and samples that the loader of `datasets` would read in part."""

import io
import re
import tarfile
from pathlib import Path

import pytest
from tiny_formats import TEXTS, write_webdataset

from lorgnette.trainer.arguments import DataArguments
from lorgnette.trainer.data import load_pairs, load_rows


pytestmark = pytest.mark.usefixtures("own_cache")


def write_tar(root: Path, names: list[str]) -> Path:
    """A tar of these files: pictures, and texts that are the names."""
    with tarfile.open(root / "part-0.tar", "w") as archive:
        for name in names:
            content = name.encode() if name.endswith(".txt") else (root / "pics" / "000.png").read_bytes()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return root / "part-0.tar"


def in_turn(*pictures: str) -> list[str]:
    return [f"{number:03d}.{ending}" for number, picture in enumerate(pictures) for ending in (picture, "txt")]


@pytest.mark.parametrize("streaming", [False, True], ids=["", "streamed"])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (in_turn("png", "png", "jpg"), "sample '002' of part-0.tar has .jpg and .txt, and the first one .png and .txt"),
        (in_turn(*["png"] * 6, "jpg"), "sample '006' of part-0.tar has no .png, as others have. All samples need"),
        ([*in_turn(*["png"] * 5), "005.png", "006.png", "005.txt", "006.txt"], "sample '005' of part-0.tar has no"),
        ([f"{n}.{end}" for end in ("png", "txt") for n in range(7)], "sample '0' of part-0.tar has no .png"),
        (["0.png", "1.png", "0.txt", "1.txt"], "sample '0' of part-0.tar has .txt, and the first one .png"),
    ],
)
def test_samples_of_a_tar_that_would_lose_their_pictures_are_named(root, names, message, streaming):
    arguments = DataArguments(dataset=str(write_tar(root, names)), streaming=streaming, shuffle_buffer_size=0)
    if streaming and names[:2] == ["0.png", "1.png"] and len(names) > 10:
        message = "has no column 'text'; it has image, __key__"  # a stream's columns are those of its first samples
    with pytest.raises(ValueError, match=re.escape(message)):
        list(load_rows(arguments, "train"))


def test_tars_in_folders_of_splits(root):
    for split, numbers in (("train", range(3)), ("val", range(3, 4))):
        (root / "tars" / split).mkdir(parents=True)
        path = write_webdataset(root, numbers=numbers)
        path.rename(root / "tars" / split / "part-0.tar")
    arguments = DataArguments(dataset=str(root / "tars"), eval_split="validation")
    trained, held_out = load_pairs(arguments, evaluate=True, seed=0)
    assert [row["text"] for row in trained] == TEXTS[:3]
    assert [row["text"] for row in held_out] == TEXTS[3:]
