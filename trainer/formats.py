"""Recognise the format of a data set by its files, read it with the loaders of `datasets`, and name its columns.

- `table`: a .csv, .tsv, .jsonl, .json, .parquet or .arrow file, with its own columns
- `llava`: a .json or .jsonl file with `conversations` of `from` and `value`: `messages`, with pictures in their parts
- `coco`: a .json file with `images` and `annotations`: `image`, and `text`, a list of captions
- `webdataset`: a .tar file, a folder of them, or `data-{000..009}.tar`: `image`, `text`, and those of other files
- `pairs`: a folder of pictures, each with a .txt file of its name: `image` and `text`
- `saved`: a folder of `Dataset.save_to_disk`, with its columns
- `folder`: a folder that `datasets` reads (imagefolder, CSV or Parquet files …), with the columns that it gives
- `hub`: a data set of the Hub, with its columns
"""

import csv
import glob
import json
import logging
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from ..assembly.local_paths import listing, what_is_there
from ..processing.prompt_encoding import IMAGE_TOKEN, error_context
from .arguments import BUILDERS, SourceArguments


logger = logging.getLogger(__name__)

Rows = Dataset | IterableDataset
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_SPLITS = dict.fromkeys(("train", "training"), "train") | {"test": "test"}
_SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_PART = {"type": Value("string"), "text": Value("string"), "image": Value("string")}
_MESSAGES = Features({"messages": List({"role": Value("string"), "content": List(_PART)})})
_SUPPORTED = (
    "These are read: a .csv, .tsv, .jsonl or .parquet file with the columns image and text, for example "
    '{"image": "pictures/cat.jpg", "text": "a cat"}; .json files of LLaVA and COCO; .tar files of WebDataset; a folder '
    "of pictures with a .txt file each, or with a metadata.csv; a folder of save_to_disk; a data set of the Hub"
)


def load_source(
    args: SourceArguments, source: str, split: str | None = None, streaming: bool = False
) -> tuple[Rows | DatasetDict, Path | None]:
    """A split, or all splits, and the base folder of relative image paths (None for a Hub dataset).

    Args:
        args: for `format`, `image_root`, and the configuration and revision of a Hub dataset.

    Raises:
        FileNotFoundError: no such file or folder; says what its parent folder contains.
        ValueError: no such split, an unknown format, a broken file (with its line, where there are lines).
    """
    kind, path = args.format or find_format(source), Path(source).expanduser()
    if path.exists():
        logger.info("%s is read as %s (--format overrules this)", source, kind)
    base = None if kind == "hub" else path if path.is_dir() else path.parent
    if args.image_root is not None:
        base = Path(args.image_root).expanduser()
        if not base.is_dir():
            raise FileNotFoundError(f"image_root {args.image_root!r}: no such folder")
    with readable(path):
        if kind in _READERS:
            rows = _READERS[kind](path)
            splits = rows if isinstance(rows, DatasetDict) else DatasetDict(train=rows)
            if split is None:
                return splits, base
            if split not in splits:
                raise ValueError(f"dataset {source!r} has no split {split!r}; it has {', '.join(splits)}")
            return splits[split].to_iterable_dataset() if streaming else splits[split], base
        if kind == "webdataset":
            files = {name: [glob.escape(str(file)) for file in shards] for name, shards in _shards(path).items()}
            loaded = load_dataset("webdataset", data_files=files, split=split, streaming=streaming)
            return _rename_webdataset(loaded, args.image_column), base
        if kind == "table":
            builder, keywords = BUILDERS[path.suffix.lower()], {}
            if builder == "csv":  # "None" and "NA" are words
                keywords = {"keep_default_na": False, "sep": "\t" if path.suffix.lower() == ".tsv" else ","}
                _check_header(path, keywords["sep"])
            files = {"train": glob.escape(str(path))}
            loaded = load_dataset(builder, data_files=files, split=split, streaming=streaming, **keywords)
            _check_rows(path, loaded["train"] if isinstance(loaded, DatasetDict) else loaded)
            return loaded, base
        revision = args.dataset_revision if source == args.dataset else None
        name = str(path) if kind == "folder" else source
        loaded = load_dataset(name, args.dataset_config, split=split, streaming=streaming, revision=revision)
        if kind == "folder":
            _warn_of_unnamed_pictures(path, loaded)
        return loaded, base


# ------------------------------------------------------------------------------------------------ recognition


def find_format(source: str) -> str:
    """The format of a data set, one of [`~lorgnette.trainer.arguments.FORMATS`].

    Raises:
        FileNotFoundError: no such file or folder; says what its parent folder contains.
        ValueError: unknown files; says which ones, and which formats are read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _format_of_file(path)
    if path.is_dir():
        return _format_of_folder(path)
    suffix = path.suffix.lower()
    if suffix == ".tar" and _BRACES.search(source):
        return "webdataset"
    if suffix in (*BUILDERS, ".tar") or path.is_absolute() or source.startswith((".", "~")):
        raise FileNotFoundError(f"dataset {source!r}: no such file or folder ({what_is_there(path)})")
    return "hub"


def _format_of_file(path: Path) -> str:
    suffix = path.suffix.lower()
    if path.stat().st_size == 0:
        raise ValueError(f"dataset {str(path)!r}: the file is empty")
    if suffix == ".tar":
        return "webdataset"
    if suffix not in BUILDERS:
        raise ValueError(f"dataset {str(path)!r}: files that end in {suffix!r} are not read. {_SUPPORTED}")
    if BUILDERS[suffix] != "json":
        return "table"
    keys = _first_keys(path)
    if {"images", "annotations"} <= keys:
        return "coco"
    return "llava" if "conversations" in keys else "table"


def _format_of_folder(path: Path) -> str:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return "saved"
    files = chain(path.glob("*"), path.glob("*/*"))
    suffixes = {file.suffix.lower() for file in files if file.is_file()}
    if ".tar" in suffixes:
        return "webdataset"
    if suffixes & set(PICTURES) and ".txt" in suffixes and not any(path.glob("metadata.*")):
        return "pairs"
    if suffixes & BUILDERS.keys():  # a metadata file among them
        return "folder"
    if not suffixes & set(PICTURES):
        raise ValueError(f"dataset {str(path)!r} contains {listing(path)}. {_SUPPORTED}")
    return "folder"


def _first_keys(path: Path) -> set[str]:
    """The keys of a JSON file's object, or of its first row; empty for broken JSON, which the loader reports."""
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        text = file.read(2**20).lstrip()
        start = 1 if text.startswith("[") else 0
        try:
            try:
                first, _ = decoder.raw_decode(text[start:].lstrip())
            except ValueError:  # a row, or one object, of more than a MiB
                first, _ = decoder.raw_decode((text + file.read())[start:].lstrip())
        except ValueError:
            return set()
    return set(first) if isinstance(first, dict) else set()


# ------------------------------------------------------------------------------------------------ broken files


_BROKEN = (DatasetGenerationError, UnicodeDecodeError, pa.ArrowInvalid, pd.errors.ParserError, tarfile.TarError)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Within the block a file that `datasets` cannot read is a ValueError with the file, the line and the cause."""
    try:
        yield
    except _BROKEN as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ValueError(f"dataset {str(path)!r}: {_reason(path, cause)}") from error
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        raise ValueError(f"dataset {str(path)!r} has no rows") from error


def _reason(path: Path, cause: BaseException) -> str:
    suffix = path.suffix.lower()
    if isinstance(cause, UnicodeDecodeError):
        where = _line_of(path, _decodes) if suffix in BUILDERS else "a text in it"
        return f"{where} is not UTF-8 ({cause.reason}): save it as UTF-8"
    if suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8-sig"))
        except json.JSONDecodeError as error:
            return f"line {error.lineno}, column {error.colno} is no JSON ({error.msg})"
    if suffix == ".jsonl":
        return f"{_line_of(path, _is_json)} is no JSON ({cause})"
    return f"it cannot be read ({str(cause)[:300]})"


def _check_header(path: Path, sep: str) -> None:
    """Refuse a CSV without a header, and one whose first row has more fields: pandas would shift the columns."""
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        lines = list(islice(filter(None, csv.reader(file, delimiter=sep)), 2))
    header, row = lines if len(lines) == 2 else ([], [])
    if named := [name for name in header if name.lower().endswith(PICTURES)]:
        raise ValueError(f"dataset {str(path)!r}: the first line is a row ({named[0]}); a header is needed: image,text")
    if len(row) > len(header):
        raise ValueError(
            f"dataset {str(path)!r}: the first row has {len(row)} fields and the header {len(header)}: a text with "
            f"{sep!r} in it has to stand in quotes"
        )


def _check_rows(path: Path, rows: Rows) -> None:
    """Refuse JSON that is one object of lists; warn where quotes make several lines of a CSV one row."""
    if not isinstance(rows, Dataset) or not len(rows):
        return
    if path.suffix.lower() == ".json" and len(rows) == 1 and len(rows.column_names) > 1:
        lengths = {len(value) if isinstance(value, list) else 0 for value in rows[0].values()}
        if len(lengths) == 1 and lengths.pop() > 1:
            raise ValueError(
                f"dataset {str(path)!r} is one object of lists; a list of objects is needed, one for a row"
            )
    if BUILDERS[path.suffix.lower()] == "csv":
        with path.open("rb") as file:
            lines = sum(bool(line.strip()) for line in file) - 1
        if lines != len(rows):
            logger.warning("%s: %d lines make %d rows, as texts in quotes may span lines", path, lines, len(rows))


def _warn_of_unnamed_pictures(path: Path, rows: Rows | DatasetDict) -> None:
    """Warn of pictures of an imagefolder that its metadata leave out; of one whose metadata lie at the top."""
    rows = next(iter(rows.values())) if isinstance(rows, DatasetDict) else rows
    if not isinstance(rows, Dataset) or not any(path.glob("metadata.*")):
        return
    pictures = sum(file.suffix.lower() in PICTURES for file in path.rglob("*"))
    if (without := pictures - len(rows)) > 0:
        logger.warning("%s: %d pictures are in no row of its metadata", path, without)


def _line_of(path: Path, is_right: Callable[[bytes], Any]) -> str:
    """The first line of a file for which `is_right` raises a ValueError."""
    if path.is_file():
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    is_right(line)
                except ValueError:
                    return f"line {number}, {line.strip()[:80]!r},"
    return "it"


def _decodes(line: bytes) -> None:
    line.decode("utf-8")


def _is_json(line: bytes) -> None:
    if line.strip():
        json.loads(line)


# ------------------------------------------------------------------------------------------------ readers


def _read_saved(path: Path) -> Dataset | DatasetDict:
    return load_from_disk(str(path))


def _read_llava(path: Path) -> Dataset:
    rows = load_dataset("json", data_files=str(path), split="train")

    def convert(row: dict[str, Any], number: int) -> dict[str, Any]:
        with error_context(f"dataset {str(path)!r}: row {number}"):
            return {"messages": _messages_of(row)}

    names = rows.column_names
    return rows.map(convert, with_indices=True, remove_columns=names, features=_MESSAGES, desc=f"reading {path.name}")


def _messages_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """LLaVA's or ShareGPT's `conversations` as messages; `<image>` is replaced by the next picture."""
    turns, images = row.get("conversations"), row.get("image") or row.get("images") or []
    images = [images] if isinstance(images, str) else list(images)
    if not turns or not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f'conversations is {turns!r:.80}; a list of {{"from": "human", "value": "…"}} is needed')
    marks = sum(str(turn.get("value")).count(IMAGE_TOKEN) for turn in turns)
    if marks not in ({0, len(images)} if images else {0}):
        raise ValueError(f"there are {marks} {IMAGE_TOKEN} in the text and {len(images)} pictures")
    remaining, messages = iter(images), []
    for turn in turns:
        role, value = _ROLES.get(str(turn.get("from")).lower()), turn.get("value")
        if role is None:
            raise ValueError(f'"from" is {turn.get("from")!r}; known are {", ".join(_ROLES)}')
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"the value of a turn from {turn['from']} is {value!r}; text is needed")
        parts = []
        if not marks and role == "user":  # some data sets leave `<image>` out: the pictures come first
            parts = [_part(image=image) for image in remaining]
        for position, text in enumerate(value.split(IMAGE_TOKEN)):
            if position:
                parts.append(_part(image=next(remaining)))
            if text.strip():
                parts.append(_part(text=text.strip()))
        messages.append({"role": role, "content": parts})
    return messages


def _part(text: str | None = None, image: str | None = None) -> dict[str, str | None]:
    return {"type": "text" if image is None else "image", "text": text, "image": image}


def _read_coco(path: Path) -> Dataset:
    """COCO's captions: a row per picture that has some, in the order of `images`."""
    with error_context(f"dataset {str(path)!r}"):
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        files: dict[Any, str] = {}
        for number, image in enumerate(_objects(content, "images")):
            if "id" not in image or not isinstance(image.get("file_name"), str):
                raise ValueError(f"image {number} has no id or no file_name, but {', '.join(image)}")
            if image["id"] in files:
                raise ValueError(f"image {number} has the id {image['id']!r}, as {files[image['id']]} has")
            files[image["id"]] = image["file_name"]
        captions: dict[Any, list[str]] = {}
        for number, annotation in enumerate(_objects(content, "annotations")):
            name, caption = annotation.get("image_id"), annotation.get("caption")
            if name not in files:
                raise ValueError(f"annotation {number} is of the picture {name!r}, which `images` does not contain")
            if not isinstance(caption, str):
                kind = f"a {type(caption).__name__}, {caption!r:.80}"
                raise ValueError(f"annotation {number}: its caption is {kind}; text is needed (COCO's *captions* file)")
            captions.setdefault(name, []).append(caption)
    if without := len(files) - len(captions):
        logger.warning("%s: %d of %d pictures have no caption and are left out", path, without, len(files))
    rows = [(file, captions[name]) for name, file in files.items() if name in captions]
    return Dataset.from_dict({"image": [file for file, _ in rows], "text": [texts for _, texts in rows]})


def _objects(content: dict[str, Any], name: str) -> list[dict[str, Any]]:
    if not isinstance(content[name], list) or not all(isinstance(item, dict) for item in content[name]):
        raise ValueError(f"`{name}` is no list of objects, but {str(content[name])[:80]}")
    return content[name]


def _read_pairs(path: Path) -> Dataset | DatasetDict:
    """Pictures with texts beside them; folders called train, validation or test are splits."""
    folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and not folder.name.startswith(".")]
    splits = [folder for folder in folders if folder.name.lower() in _SPLITS]
    if not splits or any(file.suffix.lower() in PICTURES for file in path.iterdir()):
        return _pairs_in(path, path)
    found: dict[str, Dataset] = {}
    for folder in folders:
        name = _SPLITS.get(folder.name.lower())
        if name is None or name in found:
            why = "is none of train, validation and test" if name is None else f"is a second folder for {name}"
            raise ValueError(f"dataset {str(path)!r}: the folder {folder.name} beside {splits[0].name} {why}")
        found[name] = _pairs_in(folder, path)
    return DatasetDict(found)


def _pairs_in(folder: Path, base: Path) -> Dataset:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    pictures: dict[Path, Path] = {}
    for file in (file for file in files if file.suffix.lower() in PICTURES):
        if (other := pictures.setdefault(file.with_suffix(""), file)) is not file:
            raise ValueError(f"dataset {str(base)!r}: {other.name} and {file.name} share one text")
    texts = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    for kind, alone in (("text", pictures.keys() - texts.keys()), ("picture", texts.keys() - pictures.keys())):
        if alone:
            first = min(alone)
            name = (pictures | texts)[first].relative_to(base)
            raise ValueError(
                f"dataset {str(base)!r}: {len(alone)} files have no {kind} of the same name ({name}, …). If these "
                "texts are no captions, --format folder reads the pictures alone"
            )
    rows: dict[str, list[str]] = {"image": [], "text": []}
    for name, picture in pictures.items():
        with error_context(str(texts[name])):
            rows["text"].append(texts[name].read_text(encoding="utf-8-sig").strip())
        rows["image"].append(picture.relative_to(base).as_posix())
    return Dataset.from_dict(rows)


_READERS = {"saved": _read_saved, "llava": _read_llava, "coco": _read_coco, "pairs": _read_pairs}


def _shards(path: Path) -> dict[str, list[Path]]:
    """The .tar files of each split: a file, those that a range in braces names, or those of a folder and its splits."""
    if path.is_dir():
        files = sorted(path.rglob("*.tar"))
    elif path.is_file() or not (match := _BRACES.search(str(path))):
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
        splits.setdefault(_SPLITS.get(first, "train"), []).append(file)
    return splits


def _rename_webdataset(rows: Any, image_column: str) -> Any:
    """Rename the first picture's and the first text's column to `image` and `text`."""
    first = next(iter(rows.values())) if isinstance(rows, dict) else rows
    columns = first.column_names or list(next(iter(first), {}))
    picture = next((name for name in columns if f".{name}".lower() in PICTURES), None)
    text = next((name for name in ("txt", "text", "caption") if name in columns), None)
    names = {picture: "image", text: "text"} if image_column not in (picture, *columns) else {}
    return rows.rename_columns({old: new for old, new in names.items() if old is not None and old != new})
