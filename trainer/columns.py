"""Find out what a data set holds: its format, its splits, and which columns have pictures and texts."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Image, List, Value

from .arguments import PICTURES, SourceArguments
from .data import is_chat, undecoded
from .feature_cache import is_cache
from .formats import find_format, load_source


PICTURE_NAMES = ("image", "images", "img", "picture", "photo", "image_path", "img_path", "file_name", "filename",
                 "filepath", "path", "image_url", "url", "jpg", "jpeg", "png", "webp")  # fmt: skip
TEXT_NAMES = ("text", "caption", "captions", "texts", "sentence", "sentences", "sentids", "description", "txt",
              "alt_text", "title", "answer", "response", "output", "completion", "label")  # fmt: skip
QUERY_NAMES = ("question", "query", "prompt", "instruction")  # beside an answer
ANSWER_NAMES = ("answer", "response", "output", "completion")
_NUMBERED = re.compile(r"(caption|text|sentence|description|comment|reference|title)s?_?(\d+)")
_SAMPLE = 50  # rows


@dataclass
class Contents:
    """What a data set holds.

    Attributes:
        format: one of [`~lorgnette.trainer.arguments.FORMATS`].
        splits: the number of rows of each split.
        train_split: the split to train on.
        columns: all columns.
        image_column: None if the pictures are in the chats.
        text_column: None if there are chats.
        texts: of a picture, on average.
        picture: the path of the first picture, where it is a file.
    """

    format: str
    splits: dict[str, int]
    train_split: str
    columns: list[str]
    image_column: str | None
    text_column: str | list[str] | None
    query_column: str | None
    messages_column: str | None
    texts: float
    picture: str | None


def contents_of(args: SourceArguments, text_column: list[str] | str | None = None) -> Contents:
    """Read a data set and recognise its columns; `args.image_column` and `text_column` say what is not to be guessed.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a feature cache; no column with pictures or texts is recognised; no rows.
    """
    if is_cache(args.dataset):
        raise ValueError(f"{args.dataset} is a feature cache: give the data set that it was made of")
    splits, base = load_source(args, args.dataset)
    name = "train" if "train" in splits else next(iter(splits))
    rows = undecoded(splits[name])
    if not len(rows):
        raise ValueError(f"{args.dataset} ({name}) has no rows")
    sample = list(rows.select(range(min(_SAMPLE, len(rows)))))
    columns = [column for column in rows.column_names if not column.startswith("__")]
    given = args.image_column if args.image_column != SourceArguments.image_column else None
    messages = next((column for column in columns if any(map(is_chat, _values(sample, column)[:1]))), None)
    image = given or _image_column(rows, columns, sample)
    if image is None and messages is None:
        raise ValueError(f"no column with pictures is recognised among {', '.join(columns)}: give --image_column")
    found: dict[str, Any] = {"text_column": None, "query_column": None}
    if text_column is not None:
        messages = None
        found["text_column"] = text_column
    elif messages is None:
        found = _text_columns(rows, [column for column in columns if column != image], sample)
    for column in (image, *([text_column] if isinstance(text_column, str) else text_column or ())):
        if column is not None and column not in columns:
            raise ValueError(f"{args.dataset} has no column {column!r}; it has {', '.join(columns)}")
    return Contents(
        format=args.format or find_format(args.dataset),
        splits={split: len(part) for split, part in splits.items()},
        train_split=name,
        columns=columns,
        image_column=image,
        messages_column=messages,
        texts=_texts(sample, found["text_column"]),
        picture=_file(sample, image, base),
        **found,
    )


def _values(sample: list[dict[str, Any]], column: str) -> list[Any]:
    return [row[column] for row in sample if row[column] is not None]


def _image_column(rows: Dataset, columns: list[str], sample: list[dict[str, Any]]) -> str | None:
    """Columns that `datasets` calls images come first, then paths and URLs of pictures."""
    features = rows.features
    typed = [column for column in columns if isinstance(_inner(features[column]), Image)]
    named = [column for column in columns if column not in typed and _are_pictures(_values(sample, column))]
    return next(iter([*_by_name(typed, PICTURE_NAMES), *_by_name(named, PICTURE_NAMES)]), None)


def _inner(feature: Any) -> Any:
    return feature.feature if isinstance(feature, List) else feature


def _are_pictures(values: list[Any]) -> bool:
    first = values[0] if values else None
    first = first[0] if isinstance(first, list) and first else first
    if not isinstance(first, str):
        return isinstance(first, bytes)
    path = first.lower().partition("?")[0]
    return path.endswith(PICTURES) or path.startswith("data:image/")


def _by_name(columns: Iterable[str], names: tuple[str, ...]) -> list[str]:
    """Those of these names in the names' order, then the others in their own."""
    order = {name: position for position, name in enumerate(names)}
    return sorted(columns, key=lambda column: order.get(column.lower(), len(order)))


def _text_columns(rows: Dataset, columns: list[str], sample: list[dict[str, Any]]) -> dict[str, Any]:
    features = rows.features
    texts = [column for column in columns if _is_text(features[column], _values(sample, column))]
    numbered: dict[str, list[tuple[int, str]]] = {}
    for column in texts:
        if match := _NUMBERED.fullmatch(column.lower()):
            numbered.setdefault(match[1], []).append((int(match[2]), column))
    several = [column for _, column in sorted(max(numbered.values(), key=len, default=[]))]
    known = [column for column in _by_name(texts, TEXT_NAMES) if column.lower() in TEXT_NAMES]
    if len(several) > 1:
        return {"text_column": several, "query_column": None}
    answer = next((column for column in texts if column.lower() in ANSWER_NAMES), None)
    query = next((column for column in texts if column.lower() in QUERY_NAMES), None)
    if answer is not None and query is not None:
        return {"text_column": answer, "query_column": query}
    if not known and len(texts) != 1:
        which = f"{', '.join(texts)} all hold text" if texts else f"none of {', '.join(columns) or 'them'} is one"
        raise ValueError(f"no column with the texts is recognised ({which}): give --text_column")
    return {"text_column": (known or texts)[0], "query_column": None}


def _is_text(feature: Any, values: list[Any]) -> bool:
    if isinstance(feature, ClassLabel):
        return True
    inner = _inner(feature)
    return isinstance(inner, Value) and inner.dtype in ("string", "large_string") and not _are_pictures(values)


def _texts(sample: list[dict[str, Any]], column: str | list[str] | None) -> float:
    """How many texts a row has: each is a row of training."""
    if isinstance(column, list):
        return float(len(column))
    counts = [len(row[column]) if isinstance(row[column], list) else 1 for row in sample] if column else [1]
    return max(sum(counts) / len(counts), 1.0)


def _file(sample: list[dict[str, Any]], column: str | None, base: Path | None) -> str | None:
    value = sample[0][column] if column else None
    value = value.get("path") if isinstance(value, dict) else value
    if not isinstance(value, str) or base is None:
        return None
    path = base / value
    return path.as_posix() if path.is_file() else None
