"""Read .tar files of WebDataset with the loader of `datasets`, and name the samples that it would read in part."""

import glob
import os
import re
import tarfile
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Image, IterableDataset, load_dataset

from ..assembly.local_paths import what_is_there
from .arguments import PICTURES, SPLITS


BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)")  # a sample's key, and the ending of one of its files
_INFERRED = 5  # samples whose files give `datasets` the columns
_RULE = "All samples need files of the same endings, and the files of a sample have to follow one another"

Rows = Dataset | IterableDataset


def load_webdataset(path: Path, image_column: str, split: str | None, streaming: bool) -> Rows | DatasetDict:
    """A split, or all splits, with the first picture's and the first text's column as `image` and `text`.

    Raises:
        FileNotFoundError: a file is missing; says what its folder contains.
        ValueError: a file is cut short; a sample has other files than the first ones. With the file and the key.
    """
    shards = _shards(path)
    files = {name: [glob.escape(str(file)) for file in part] for name, part in shards.items()}
    try:
        loaded = load_dataset("webdataset", data_files=files, split=split, streaming=streaming)
    except ValueError as error:
        if "share the same prefix" not in str(error):
            raise
        raise ValueError(f"dataset {str(path)!r}: {_first_uneven(next(iter(shards.values()))[0])}. {_RULE}") from error
    first = next(iter(loaded.values())) if isinstance(loaded, dict) else loaded
    columns = first.column_names
    picture = next((name for name in columns if f".{name}".lower() in PICTURES), None)
    text = next((name for name in ("txt", "text", "caption") if name in columns), None)
    names = {picture: "image", text: "text"} if image_column not in (picture, *columns) else {}
    names = {old: new for old, new in names.items() if old is not None and old != new}
    checked = image_column if image_column in columns else picture

    def prepare(rows: Rows) -> Rows:
        if checked is not None and isinstance(rows.features[checked], Image):
            rows = _with_pictures(rows.cast_column(checked, Image(decode=False)), checked, path)
        return rows.rename_columns(names)

    if isinstance(loaded, dict):
        return type(loaded)({name: prepare(rows) for name, rows in loaded.items()})
    return prepare(loaded)


def _shards(path: Path) -> dict[str, list[Path]]:
    """The .tar files of each split: a file, those that a range in braces names, or those of a folder and its splits."""
    if path.is_dir():
        files = sorted(path.rglob("*.tar"))
    elif path.is_file() or not (match := BRACES.search(str(path))):
        files = [path]
    else:
        numbers = range(int(match[1]), int(match[2]) + 1)
        width, before, after = len(match[1]), str(path)[: match.start()], str(path)[match.end() :]
        files = [Path(f"{before}{number:0{width}d}{after}") for number in numbers]
        if not files:
            raise ValueError(f"dataset {str(path)!r}: the range {match[0]} is empty")
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"dataset {str(path)!r}: no file {file} ({what_is_there(file)})")
        with file.open("rb") as opened:  # a tar ends with 1,024 zeros; its reader stops in silence where it is cut
            opened.seek(-min(1024, file.stat().st_size), os.SEEK_END)
            if opened.read() != bytes(1024):
                raise ValueError(f"dataset {str(path)!r}: {file.name} is cut short: the end of the archive is missing")
    splits: dict[str, list[Path]] = {}
    for file in files:
        first = file.relative_to(path).parts[0].lower() if path.is_dir() else ""
        splits.setdefault(SPLITS.get(first, "train"), []).append(file)
    return splits


def _with_pictures(rows: Rows, column: str, path: Path) -> Rows:
    """The rows; the first without a picture is a ValueError, in a stream when it comes.

    `datasets` takes the columns from the first samples. Of later ones it drops files of other endings, and makes
    several rows of a sample whose files stand apart.
    """
    if not isinstance(rows, Dataset):
        return rows.map(partial(_checked, column=column, path=path), features=rows.features)
    pictures = rows.data.column(column)
    if pictures.null_count:
        _checked(rows.select([pictures.is_null().index(True).as_py()])[0], column, path)
    return rows


def _checked(sample: dict[str, Any], column: str, path: Path) -> dict[str, Any]:
    if sample[column] is None:
        file, key = Path(sample["__url__"]).name, sample["__key__"]
        raise ValueError(f"dataset {str(path)!r}: sample {key!r} of {file} has no .{column}, as others have. {_RULE}")
    return sample


def _first_uneven(file: Path) -> str:
    """What the first sample with other endings than the one before it is called, and has."""
    with tarfile.open(file) as archive:
        names = (match for member in archive if member.isfile() and (match := _NAME.fullmatch(member.name)))
        samples = [(key, [match[2] for match in group]) for key, group in
                   islice(groupby(names, key=lambda match: match[1]), _INFERRED)]  # fmt: skip
    first = samples[0][1]
    key, endings = next(((key, endings) for key, endings in samples if set(endings) != set(first)), samples[-1])
    return f"sample {key!r} of {file.name} has {_listed(endings)}, and the first one {_listed(first)}"


def _listed(endings: list[str]) -> str:
    return " and ".join(f".{ending}" for ending in endings)
