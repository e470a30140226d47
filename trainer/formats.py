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
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    List,
    ReadInstruction,
    Value,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.csv.csv import CsvConfig

from ..assembly.local_paths import listing, what_is_there
from ..processing.prompt_encoding import IMAGE_TOKEN, error_context
from .arguments import BUILDERS, PICTURES, SPLITS, RowArguments, SourceArguments
from .messages import without_worker
from .webdataset import BRACES, load_webdataset


logger = logging.getLogger(__name__)

Rows = Dataset | IterableDataset
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_WORDS = {"keep_default_na": False}  # of pandas: "None" and "NA" are words
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
        csv_metadata = _csv_metadata(path) if kind == "folder" else []
        if csv_metadata or kind in _READERS:
            rows = _read_metadata(path, csv_metadata) if csv_metadata else _READERS[kind](path)
            splits = rows if isinstance(rows, DatasetDict) else DatasetDict(train=rows)
            if split is None:
                return splits, base
            if csv_metadata and split not in splits:
                rows = _slice(splits, split)
            elif split in splits:
                rows = splits[split]
            else:
                raise ValueError(f"dataset {source!r} has no split {split!r}; it has {', '.join(splits)}")
            return rows.to_iterable_dataset() if streaming else rows, base
        if kind == "webdataset":
            return load_webdataset(path, args.image_column, split, streaming), base
        if kind == "table":
            builder, keywords = BUILDERS[path.suffix.lower()], {}
            if builder == "csv":
                keywords = _WORDS | {"sep": "\t" if path.suffix.lower() == ".tsv" else ","}
                _check_header(path, keywords["sep"])
            files = {"train": glob.escape(str(path))}
            loaded = load_dataset(builder, data_files=files, split=split, streaming=streaming, **keywords)
            _check_rows(path, loaded["train"] if isinstance(loaded, DatasetDict) else loaded)
            return loaded, base
        revision = args.dataset_revision if source == args.dataset else None
        if kind == "hub":
            return load_dataset(source, args.dataset_config, split=split, streaming=streaming, revision=revision), base
        keywords = {}
        if isinstance(load_dataset_builder(str(path), args.dataset_config).config, CsvConfig):
            keywords = _WORDS
        loaded = load_dataset(str(path), args.dataset_config, split=split, streaming=streaming, **keywords)
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
    if suffix == ".tar" and BRACES.search(source):
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
    first = _first_object(path)
    if {"images", "annotations"} <= first.keys():
        return "coco"
    if "conversations" not in first:
        return "table"
    turns = first["conversations"]
    is_chat = isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "role" in turns[0]
    return "table" if is_chat else "llava"


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


def _first_object(path: Path) -> dict[str, Any]:
    """A JSON file's object, or its first row; empty for broken JSON, which the loader reports."""
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
            return {}
    return first if isinstance(first, dict) else {}


# ------------------------------------------------------------------------------------------------ broken files


_BROKEN = (DatasetGenerationError, UnicodeDecodeError, pa.ArrowInvalid, pd.errors.ParserError, tarfile.TarError)


@contextmanager
def readable(*paths: Path) -> Iterator[None]:
    """Within the block a file that `datasets` cannot read is a ValueError with the file, the line and the cause.

    Args:
        paths: of several, the error is of the one in which a line is broken, or else of the first.
    """
    try:
        yield
    except _BROKEN as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reasons = [(path, _reason(path, cause)) for path in paths]
        path, reason = next((found for found in reasons if found[1].startswith("line ")), reasons[0])
        raise ValueError(f"dataset {str(path)!r}: {reason}") from error
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        raise ValueError(f"dataset {str(paths[0])!r} has no rows") from error


def readable_stream(args: RowArguments, *others: str | None) -> AbstractContextManager[None]:
    """[`readable`] while rows of a stream, and of `others`, are read; nothing for rows that are all read already."""
    if not args.streaming:
        return nullcontext()
    return readable(*(Path(source).expanduser() for source in (args.dataset, *others) if source is not None))


def _reason(path: Path, cause: BaseException) -> str:
    suffix, message = path.suffix.lower(), without_worker(str(cause))
    if isinstance(cause, UnicodeDecodeError):
        where = _line_of(path, _decodes) if suffix in BUILDERS else "a text in it"
        return f"{where} is not UTF-8 ({cause.reason}): save it as UTF-8"
    if suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8-sig"))
        except json.JSONDecodeError as error:
            return f"line {error.lineno}, column {error.colno} is no JSON ({error.msg})"
    if suffix == ".jsonl":
        message = re.sub(r"\.? in row \d+$", "", message)  # of a part of the file
        return f"{_line_of(path, _is_json)} is no JSON ({message})"
    return f"it cannot be read ({message[:300].strip()})"


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
    parts = rows.values() if isinstance(rows, DatasetDict) else [rows]
    if not all(isinstance(part, Dataset) for part in parts) or not any(path.glob("metadata.*")):
        return
    pictures = sum(file.suffix.lower() in PICTURES for file in path.rglob("*"))
    if (without := pictures - sum(map(len, parts))) > 0:
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


def _csv_metadata(path: Path) -> list[Path]:
    """The metadata.csv files of an imagefolder."""
    files = sorted(path.rglob("metadata.csv"))
    return files if files and any(file.suffix.lower() in PICTURES for file in path.rglob("*")) else []


def _read_metadata(path: Path, files: list[Path]) -> DatasetDict:
    """An imagefolder with a metadata.csv in each folder of pictures; `datasets` would read "NA" in it as missing."""
    splits: dict[str, list[Dataset]] = {}
    for file in files:
        _check_header(file, ",")
        rows = load_dataset("csv", data_files=glob.escape(str(file)), split="train", **_WORDS)
        if "file_name" not in rows.column_names:
            raise ValueError(f"{file} has no column 'file_name', but {', '.join(rows.column_names)}")
        place = file.parent.relative_to(path)
        names = [str(name) if place == Path() else f"{place.as_posix()}/{name}" for name in rows["file_name"][:]]
        rows = rows.remove_columns("file_name").add_column("image", names)
        split = SPLITS.get(next(iter(place.parts), "").lower(), "train")
        splits.setdefault(split, []).append(rows)
    found = DatasetDict({name: concatenate_datasets(parts) for name, parts in splits.items()})
    _warn_of_unnamed_pictures(path, found)
    return found


def _slice(splits: DatasetDict, split: str) -> Dataset:
    """Rows such as `train[:100]` or `train+test`, as `datasets` writes them; ValueError for an unknown split."""
    parts = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in splits.items()})
    rows = [splits[part.splitname].select(range(part.from_, part.to), keep_in_memory=True) for part in parts]
    return concatenate_datasets(rows)


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
    splits = [folder for folder in folders if folder.name.lower() in SPLITS]
    if not splits or any(file.suffix.lower() in PICTURES for file in path.iterdir()):
        return _pairs_in(path, path)
    found: dict[str, Dataset] = {}
    for folder in folders:
        name = SPLITS.get(folder.name.lower())
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
