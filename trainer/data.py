"""Load rows from a Hub dataset, a local folder or file, or a stream, and check them before training.

Every row gets an `index`, its number in the split, which errors name. Rows hold pictures as paths, URLs or bytes; only
the processor decodes them.
"""

import os
import re
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from datasets import ClassLabel, Dataset, Image, LargeList, List, Value
from transformers.utils import logging

from ..assembly.conversations import messages_of
from ..processing.image_loading import WEB
from ..processing.prompt_encoding import IMAGE_TOKEN, error_context, parts_of
from .arguments import DataArguments, RowArguments
from .feature_cache import COLUMN, feature_opener, is_cache, load_cache
from .formats import Rows, load_source, readable
from .provenance import read_held_out
from .row_seeds import RowSeeds
from .texts import picture_number, texts_of


logger = logging.get_logger(__name__)

CHAT_NAMES = ("messages", "conversations")
IMAGE_ID = "image_id"  # of rows, see `LorgnetteCollator`

_warned: list[int | None] = []  # the row that was warned of


def load_pairs(
    args: DataArguments,
    *,
    evaluate: bool,
    seed: int,
    row_seeds: RowSeeds | None = None,
    length_column: str | None = None,
) -> tuple[Rows, Rows | None]:
    """The training rows and, with `evaluate` or `eval_fraction`, the evaluation rows.

    A row holds `index` and the columns that `args` names, `messages_column` as `messages`. A picture (in its column, in
    a list there or in a message) is a path, a URL, bytes or a dict of bytes and path; of a feature cache there is
    `vision_features` in place of the column. A class label is its name. A streamed training set starts again when it
    ends, shuffled within a buffer. A row has all texts of its picture, or with `texts_per_image` so many: `row_seeds`
    draws those of training, and evaluation has the first ones. With `augment` training rows have an
    `augmentation_seed`. With `length_column` all rows have a column of that name, the number of their characters, by
    which Trainer groups them.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: no such split, no rows, a named column is missing (those that exist are listed) or called `index`;
            a row without a text; augmentation of a feature cache; lengths of a stream.
    """
    if args.augment and is_cache(args.dataset):
        raise ValueError(
            f"augment changes pictures, and {args.dataset} is a feature cache, which has none: leave it out"
        )
    train, open_train = _numbered_rows(args, args.dataset, args.train_split)
    if args.messages_column is not None and args.num_texts is not None:
        raise ValueError(
            f"texts_per_image is {args.num_texts}, and {args.dataset} has chats: of these the last answer is learned"
        )
    evaluation, open_evaluation = None, open_train
    if args.eval_fraction is not None:
        # Split off even without evaluation: a run that resumes this one may evaluate.
        if len(train) < 2:
            raise ValueError(f"eval_fraction is {args.eval_fraction}, and {args.dataset} has {len(train)} row")
        parts = train.train_test_split(args.eval_fraction, seed=seed)
        train, evaluation = parts["train"], parts["test"]
    elif evaluate:
        source, split = args.eval_dataset or args.dataset, args.eval_split or "train"
        evaluation, open_evaluation = _numbered_rows(args, source, split)
    if not (args.skip_unreadable or args.dry_run):  # both find empty texts themselves, with all others
        for rows in (train, evaluation):
            _check_texts(rows, args.text_name)
    if length_column is not None:
        if args.streaming:
            raise ValueError("a stream cannot be grouped by length: its rows come one by one")
        text_columns = [args.text_name, *([args.query_column] if args.query_column else [])]
        train = _with_lengths(train, length_column, text_columns)
        if evaluation is not None:  # Trainer groups evaluation rows too
            evaluation = _with_lengths(evaluation, length_column, text_columns)
    if args.streaming:
        # Endless: Trainer counts a stream as one epoch, and would restart it when resumed after its end.
        train = train.repeat(None)
        if args.shuffle_buffer_size:
            train = train.shuffle(seed=seed, buffer_size=args.shuffle_buffer_size)
        if row_seeds is not None:
            train = train.map(_with_visit, with_indices=True)
    if row_seeds is not None:
        open_train = partial(row_seeds.mark, open_batch=open_train)
        open_evaluation = partial(row_seeds.keep_first, open_batch=open_evaluation)
    return _lazily(train, open_train), None if evaluation is None else _lazily(evaluation, open_evaluation)


def _with_lengths(rows: Dataset, column: str, text_columns: list[str]) -> Dataset:
    lengths = []
    for number, row in enumerate(rows.select_columns(text_columns)):
        with error_context(f"row {number}"):
            lengths.append(_length(row))
    return rows.add_column(column, lengths)


def _length(texts: dict[str, Any]) -> int:
    """Number of characters in a row's texts, without pictures."""
    chat = texts.pop("messages", None)
    messages = [] if chat is None else messages_of(chat)
    values = [part.get("text", "") for message in messages for part in parts_of(message)]
    for value in texts.values():
        values += value if isinstance(value, list) else [value]
    return sum(len(str(value)) for value in values)


def load_rows(args: RowArguments, split: str) -> Rows:
    """The rows of one split of `args.dataset`, in order, in the format of [`load_pairs`]; raises the same errors.

    The text column may hold a list of texts, which stay together.
    """
    return _lazily(*_numbered_rows(args, args.dataset, split))


def _numbered_rows(args: RowArguments, source: str, split: str) -> tuple[Rows, partial]:
    """The split's named columns and `index`, and a function that prepares batches of them for the collator."""
    cached = is_cache(source)
    if cached:
        dataset, base, image_column = load_cache(source, split), None, COLUMN
        dataset = dataset.to_iterable_dataset() if args.streaming else dataset
        open_image = feature_opener(source)
    else:
        dataset, base = load_source(args, source, split, streaming=args.streaming)
        image_column, open_image = args.image_column, partial(_open_picture, base=base)
    name = f"{source} ({split})"
    # A stream may have unknown columns until it is read; then nothing in it is decoded.
    with readable(Path(source).expanduser()):
        features = dataset.features or next(iter(dataset), {})
    _find_chats(args, dataset, features, name)
    wanted = [image_column, *args.text_columns]
    if args.messages_column and image_column == DataArguments.image_column and image_column not in features:
        wanted = args.text_columns  # chats may hold their pictures themselves; a named column has to exist
    if features:
        check_columns(features, wanted, name)
    if "index" in wanted:
        raise ValueError(f'{name}: the column "index" has to be renamed: row numbers go by that name')

    own = ["index"] if cached else []
    own += [IMAGE_ID] if IMAGE_ID in features and IMAGE_ID not in wanted else []
    dataset = undecoded(dataset.select_columns([*wanted, *own]))
    if not isinstance(args.text_column, str):
        dataset = _joined(dataset, args.text_column, args.text_name)
    text = features.get(args.text_name)
    if args.messages_column not in (None, "messages"):
        dataset = dataset.rename_column(args.messages_column, "messages")  # the collator's name for chats
    if next(iter(dataset), None) is None:
        raise ValueError(f"{name} has no rows")
    if not cached:  # a cache has the source's row numbers
        dataset = numbered(dataset)
    labels = {args.text_name: _inner(text).names} if isinstance(_inner(text), ClassLabel) else {}
    openers = {image_column: open_image, "messages": partial(_open_chat, base=base)}
    numbered_by = None if cached else image_column
    return dataset, partial(_open_batch, openers=openers, labels=labels, numbered_by=numbered_by)


def load_rows_of_model(args: RowArguments, split: str | None, model: str) -> tuple[Rows, str]:
    """Rows to evaluate a model on, and the name of their split.

    Args:
        split: by default `test`; if there is none, the rows that `eval_fraction` held out when `model` was trained.

    Raises:
        ValueError: there is neither, see [`load_rows`] for the rest.
    """
    try:
        return load_rows(args, split or "test"), split or "test"
    except ValueError as error:
        is_missing = re.search("Unknown split|has no split", str(error)) is not None
        held_out = read_held_out(model, args.dataset) if split is None and is_missing else None
        if held_out is None:
            raise
        logger.info(f"{args.dataset} has no split test ({error}): the rows that training held out are used")
    name, numbers = held_out
    rows = load_rows(args, name)
    if not isinstance(rows, Dataset):
        return rows.filter(lambda row: row["index"] in numbers), f"{name} (held out)"
    chosen = [place for place, number in enumerate(rows.with_format(None)["index"][:]) if number in numbers]
    if not chosen:
        raise ValueError(f"{args.dataset} ({name}) has none of the {len(numbers)} rows that training held out")
    return rows.select(chosen, keep_in_memory=True), f"{name} (held out)"


def is_chat(value: Any) -> bool:
    """Whether a value of a column is a list of messages, each with a role and a content."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and {"role", "content"} <= {*value[0]}


def _find_chats(args: RowArguments, dataset: Rows, columns: Collection[str], name: str) -> None:
    """Set `messages_column` if no column with text is named, the default one is missing, and one column has chats."""
    named = args.messages_column or args.query_column or args.text_column != RowArguments.text_column
    if named or args.text_column in columns:
        return
    existing = [column for column in CHAT_NAMES if column in columns]
    row = next(iter(undecoded(dataset.select_columns(existing))), {}) if existing else {}
    if len(chats := [column for column in existing if is_chat(row.get(column))]) == 1:
        args.messages_column = chats[0]
        logger.info("%s: the chats of the column %r are read, as there is no column 'text'", name, chats[0])


def _joined(dataset: Rows, columns: list[str], name: str) -> Rows:
    """The rows with several columns of text as one, a list."""
    if isinstance(dataset, Dataset):
        texts = [list(values) for values in zip(*(dataset[column][:] for column in columns), strict=True)]
        return dataset.remove_columns(columns).add_column(name, texts)
    return dataset.map(lambda row: {name: [row[column] for column in columns]}, remove_columns=columns)


def _check_texts(rows: Rows | None, column: str) -> None:
    """Raise ValueError or TypeError for the first row without a text, or with an empty one, with its number."""
    if not isinstance(rows, Dataset) or column == "messages" or not isinstance(_inner(rows.features[column]), Value):
        return
    for number, texts in zip(rows["index"][:], rows[column][:], strict=True):
        with error_context(f"row {number}"):
            texts_of(texts, column)


def _inner(feature: Any) -> Any:
    """The type of a column's values, or of those in its lists."""
    return feature.feature if isinstance(feature, List | LargeList) else feature


def check_columns(existing: Collection[str], wanted: list[str], name: str) -> None:
    """Raise ValueError for missing columns of the data set `name`; the message lists the existing ones."""
    if missing := [column for column in wanted if column not in existing]:
        raise ValueError(f"{name} has no column {' or '.join(map(repr, missing))}; it has {', '.join(existing)}")


def numbered(dataset: Rows) -> Rows:
    """The rows with their numbers as `index`."""
    if isinstance(dataset, Dataset):
        return dataset.add_column("index", np.arange(len(dataset)))
    return dataset.map(_with_index, with_indices=True)


def undecoded(dataset: Rows) -> Rows:
    """The rows with all pictures undecoded, as bytes and path."""
    for column, feature in (dataset.features or {}).items():
        if (plain := _undecoded(feature)) != feature:
            dataset = dataset.cast_column(column, plain)
    return dataset


def picture_opener(image_column: str, base: Path | None) -> Callable[[dict], dict]:
    """A transform for rows without texts: it leaves pictures in `image_column` that the processor can open."""
    openers = {image_column: partial(_open_picture, base=base)}
    return partial(_open_batch, openers=openers, labels={}, numbered_by=image_column)


def _undecoded(feature: Any) -> Any:
    """A column's type with all pictures in it undecoded."""
    if isinstance(feature, Image):
        return Image(decode=False)
    if isinstance(feature, List):
        return List(_undecoded(feature.feature), feature.length)
    if isinstance(feature, dict):
        return {name: _undecoded(field) for name, field in feature.items()}
    return feature


def image_id_of(picture: Any, index: int) -> int:
    """A number that rows with the same file or URL share; of any other picture, one inside a file too, the row's."""
    if isinstance(picture, dict) and picture.get("bytes") is None:
        picture = picture.get("path")
    is_name = isinstance(picture, str) and not picture.startswith("data:")
    return picture_number(picture) if is_name else index


def _lazily(dataset: Rows, open_batch: partial) -> Rows:
    if isinstance(dataset, Dataset):
        return dataset.with_transform(open_batch)
    return dataset.map(open_batch, batched=True, batch_size=1)


def _with_index(row: dict, index: int) -> dict:
    return {**row, "index": index}


def _with_visit(row: dict, position: int) -> dict:
    return {**row, "visit": position}


def _open_batch(
    batch: dict, openers: dict[str, Callable[..., Any]], labels: dict[str, list[str]], numbered_by: str | None
) -> dict:
    """Prepare a batch (column -> values): pictures become openable by the processor or features, class labels names.

    With the column `numbered_by`, of pictures, rows without an `image_id` get the one of their picture's file.
    """
    opened = dict(batch)
    if numbered_by in batch and "index" in batch and IMAGE_ID not in batch:
        pictures = zip(batch[numbered_by], batch["index"], strict=True)
        opened[IMAGE_ID] = [image_id_of(picture, index) for picture, index in pictures]
    numbers = batch.get("index", [None] * len(next(iter(batch.values()))))
    for column, open_value in openers.items():
        if column in batch:
            opened[column] = [open_value(value, n) for value, n in zip(batch[column], numbers, strict=True)]
    for column, names in labels.items():
        if column in batch:
            opened[column] = [_named(label, names) for label in batch[column]]
    return opened


def _named(label: Any, names: list[str]) -> Any:
    """The name of a class label, or of each in a list; None for an unlabelled row (-1), whose number an error names."""
    if isinstance(label, list):
        return [_named(each, names) for each in label]
    return names[label] if label is not None and label >= 0 else None


def _open_chat(messages: Any, number: int | None, base: Path | None) -> list[dict]:
    """The messages with their contents as parts, and their pictures opened; [] for None."""
    with error_context(f"row {number}"):
        opened = [(message, parts_of(message)) for message in ([] if messages is None else messages_of(messages))]
    for _, parts in opened:
        for part in parts:
            if "image" in part:
                part["image"] = _open_picture(part["image"], number, base)
            elif IMAGE_TOKEN in part.get("text", ""):
                _warn_of_mark(number)
    return [{**message, "content": parts} for message, parts in opened]


def _warn_of_mark(number: int | None) -> None:
    """Once in a process: most rows of such a data set have it."""
    if not _warned:
        _warned.append(number)
        logger.warning(
            f"row {number}: {IMAGE_TOKEN} stands in the text of a chat, and is read as text. Give the picture its "
            'place with a part {"type": "image"}; --format llava converts LLaVA\'s `conversations`'
        )


def _open_picture(value: Any, number: int | None, base: Path | None) -> Any:
    """Make a relative path absolute, read a file of a remote dataset as bytes, and return anything else unchanged."""
    if isinstance(value, list) and value and isinstance(value[0], dict | str):
        return [_open_picture(item, number, base) for item in value]
    if isinstance(value, dict):  # an undecoded image of datasets
        return value if value.get("bytes") is not None else _open_picture(value.get("path"), number, base)
    if not isinstance(value, str) or value[:8].lower().startswith((*WEB, "data:")):
        return value
    if "://" in value:  # on the Hub or inside an archive, in a streamed dataset
        try:
            with fsspec.open(value, "rb") as file:
                return file.read()
        except (OSError, ImportError, ValueError) as error:
            raise OSError(f"row {number}: cannot read {value[:200]}: {str(error)[:300]}") from error
    if base is None:
        return value
    path = base / os.path.expanduser(value)
    if "\\" in value and not path.exists():  # a path that was written on Windows
        path = base / value.replace("\\", "/")
    return str(path)
