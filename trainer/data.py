"""Where the rows come from: a Hub dataset, a local folder or file, or a stream; checked before anything is trained.

Every row gets an `index`, its number in the split, so that an error can name it. Pictures are not decoded here but
handed on as paths, URLs or bytes: it is the processor alone that decodes pictures.
"""

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Image, IterableDataset, List, load_dataset, load_from_disk

from ..assembly.conversations import messages_of
from ..processing.image_loading import WEB
from ..processing.prompt_encoding import error_context, parts_of
from .arguments import DataArguments, RowArguments, SourceArguments
from .augmentation import AugmentationSeeds
from .feature_cache import COLUMN, feature_opener, is_cache, load_cache


FILE_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
Rows = Dataset | IterableDataset


def load_pairs(
    args: DataArguments,
    *,
    evaluate: bool,
    seed: int,
    augmentation: AugmentationSeeds | None = None,
    length_column: str | None = None,
) -> tuple[Rows, Rows | None]:
    """The training rows and, with `evaluate`, the evaluation rows.

    A row holds `index` and the columns that `args` names, `messages_column` as `messages`. A picture (in its column, in
    a list there or in a message) is a path, a URL, bytes or a dict of bytes and path; of a feature cache there is
    `vision_features` in place of the column. A class label is its name. A streamed training set starts again when it
    ends, shuffled within a buffer. With `augmentation` training rows have an `augmentation_seed`. With `length_column`
    rows of both have one of that name, by which Trainer groups them: the characters of their words.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: no such split, no rows, a named column is missing (those that exist are listed) or called `index`;
            augmentation of a feature cache; lengths of a stream.
    """
    if augmentation is not None and is_cache(args.dataset):
        raise ValueError(
            f"augment changes pictures, and {args.dataset} is a feature cache, which has none: leave it out"
        )
    train, open_train = _numbered_rows(args, args.dataset, args.train_split)
    evaluation, open_evaluation = None, open_train
    if args.eval_fraction is not None:
        # Held out of a run that does not evaluate, too: another may go on from it that does.
        parts = train.train_test_split(args.eval_fraction, seed=seed)
        train, evaluation = parts["train"], parts["test"]
    elif evaluate:
        source, split = args.eval_dataset or args.dataset, args.eval_split or "train"
        evaluation, open_evaluation = _numbered_rows(args, source, split)
    if length_column is not None:
        if args.streaming:
            raise ValueError("a stream cannot be grouped by length: its rows come one by one")
        words = ["messages"] if args.messages_column else args.word_columns
        train = _with_lengths(train, length_column, words)
        if evaluation is not None:  # Trainer groups its rows, too
            evaluation = _with_lengths(evaluation, length_column, words)
    if args.streaming:
        # Endless, since Trainer takes a stream for one epoch: resumed after the stream's end it would start it over.
        train = train.repeat(None)
        if args.shuffle_buffer_size:
            train = train.shuffle(seed=seed, buffer_size=args.shuffle_buffer_size)
        if augmentation is not None:
            train = train.map(_with_visit, with_indices=True)
    if augmentation is not None:
        open_train = partial(augmentation.mark, open_batch=open_train)
    return _lazily(train, open_train), _lazily(evaluation, open_evaluation) if evaluate else None


def _with_lengths(rows: Dataset, column: str, words: list[str]) -> Dataset:
    lengths = []
    for number, row in enumerate(rows.select_columns(words)):
        with error_context(f"row {number}"):
            lengths.append(_length(row))
    return rows.add_column(column, lengths)


def _length(words: dict[str, Any]) -> int:
    """Characters in a row's words; a picture in a chat counts for none."""
    chat = words.pop("messages", None)
    messages = [] if chat is None else messages_of(chat)
    values = [part.get("text", "") for message in messages for part in parts_of(message)]
    return sum(len(str(value)) for value in (*values, *words.values()))


def load_rows(args: RowArguments, split: str) -> Rows:
    """The rows of one split of `args.dataset`, in order; what they hold and what is raised is as in [`load_pairs`].

    The text column may hold a list of texts a row.
    """
    return _lazily(*_numbered_rows(args, args.dataset, split))


def _numbered_rows(args: RowArguments, source: str, split: str) -> tuple[Rows, partial]:
    """The split's named columns and `index`; and the function that makes a batch of them ready for the collator."""
    cached = is_cache(source)
    if cached:
        dataset, base, image_column = load_cache(source, split), None, COLUMN
        dataset = dataset.to_iterable_dataset() if args.streaming else dataset
        open_image = feature_opener(source)
    else:
        dataset, base = load_source(args, source, split, streaming=args.streaming)
        image_column, open_image = args.image_column, partial(_open_picture, base=base)
    name = f"{source} ({split})"
    # A stream may not know its columns before it is read; nothing in it is decoded then.
    features = dataset.features or next(iter(dataset), {})
    wanted = [image_column, *args.word_columns]
    if args.messages_column and image_column == DataArguments.image_column and image_column not in features:
        wanted = args.word_columns  # chats may bring their pictures along; a column that was named has to be there
    if features:
        check_columns(features, wanted, name)
    if "index" in wanted:
        raise ValueError(f'{name}: the column "index" has to be renamed: row numbers go by that name')

    text = features.get(args.text_column)
    dataset = undecoded(dataset.select_columns([*wanted, "index"] if cached else wanted))
    if args.messages_column not in (None, "messages"):
        dataset = dataset.rename_column(args.messages_column, "messages")  # what the collator knows chats by
    if next(iter(dataset), None) is None:
        raise ValueError(f"{name} has no rows")
    if not cached:  # whose rows say which ones of their source they are
        dataset = numbered(dataset)
    labels = {args.text_column: text.names} if isinstance(text, ClassLabel) else {}
    openers = {image_column: open_image, "messages": partial(_open_chat, base=base)}
    return dataset, partial(_open_batch, openers=openers, labels=labels)


def load_source(
    args: SourceArguments, source: str, split: str | None = None, streaming: bool = False
) -> tuple[Rows | DatasetDict, Path | None]:
    """A split, or all of them, and the folder that relative image paths start from (None for a dataset of the Hub).

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: no such split, a file of an unknown kind, an empty one.
    """
    path = Path(source).expanduser()
    if path.is_file():
        builder = FILE_BUILDERS.get(path.suffix.lower())
        if builder is None:
            raise ValueError(f"dataset {source!r}: a file has to end in {', '.join(FILE_BUILDERS)}")
        if path.stat().st_size == 0:
            raise ValueError(f"dataset {source!r}: the file is empty")
        return load_dataset(builder, data_files=str(path), split=split, streaming=streaming), path.parent
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = load_from_disk(str(path))
        if isinstance(saved, Dataset):
            saved = DatasetDict(train=saved)
        if split is None:
            return saved, path
        if split not in saved:
            raise ValueError(f"dataset {source!r} has no split {split!r}; it has {', '.join(saved)}")
        return saved[split].to_iterable_dataset() if streaming else saved[split], path
    if path.is_dir():
        return load_dataset(str(path), args.dataset_config, split=split, streaming=streaming), path
    if path.suffix.lower() in FILE_BUILDERS or path.is_absolute() or source.startswith((".", "~")):
        raise FileNotFoundError(f"dataset {source!r}: no such file or folder")
    revision = args.dataset_revision if source == args.dataset else None
    return load_dataset(source, args.dataset_config, split=split, streaming=streaming, revision=revision), None


def check_columns(existing: Collection[str], wanted: list[str], name: str) -> None:
    """Raise ValueError where columns of the data set `name` are missing, with those that exist."""
    if missing := [column for column in wanted if column not in existing]:
        raise ValueError(f"{name} has no column {' or '.join(map(repr, missing))}; it has {', '.join(existing)}")


def numbered(dataset: Rows) -> Rows:
    """The rows with their numbers as `index`."""
    if isinstance(dataset, Dataset):
        return dataset.add_column("index", np.arange(len(dataset)))
    return dataset.map(_with_index, with_indices=True)


def undecoded(dataset: Rows) -> Rows:
    """The rows with their pictures, wherever they are, left as bytes and path."""
    for column, feature in (dataset.features or {}).items():
        if (plain := _undecoded(feature)) != feature:
            dataset = dataset.cast_column(column, plain)
    return dataset


def picture_opener(image_column: str, base: Path | None) -> Callable[[dict], dict]:
    """A transform for rows of pictures alone: the processor can open what it leaves in `image_column`."""
    return partial(_open_batch, openers={image_column: partial(_open_picture, base=base)}, labels={})


def _undecoded(feature: Any) -> Any:
    """A column's type with its pictures, wherever they are in it, left as bytes and path."""
    if isinstance(feature, Image):
        return Image(decode=False)
    if isinstance(feature, List):
        return List(_undecoded(feature.feature), feature.length)
    if isinstance(feature, dict):
        return {name: _undecoded(field) for name, field in feature.items()}
    return feature


def _lazily(dataset: Rows, open_batch: partial) -> Rows:
    if isinstance(dataset, Dataset):
        return dataset.with_transform(open_batch)
    return dataset.map(open_batch, batched=True, batch_size=1)


def _with_index(row: dict, index: int) -> dict:
    return {**row, "index": index}


def _with_visit(row: dict, place: int) -> dict:
    return {**row, "visit": place}


def _open_batch(batch: dict, openers: dict[str, Callable[..., Any]], labels: dict[str, list[str]]) -> dict:
    """A batch (column -> values) with pictures that the processor can open, or features, and class labels by name."""
    opened = dict(batch)
    numbers = batch.get("index", [None] * len(next(iter(batch.values()))))
    for column, open_value in openers.items():
        if column in batch:
            opened[column] = [open_value(value, n) for value, n in zip(batch[column], numbers, strict=True)]
    for column, names in labels.items():
        if column in batch:
            # Unlabelled rows (-1) go on as None: the collator names their number.
            opened[column] = [names[label] if label is not None and label >= 0 else None for label in batch[column]]
    return opened


def _open_chat(messages: Any, number: int | None, base: Path | None) -> list[dict]:
    """The messages (none for None) with their contents as parts, whose pictures are opened as those of a column are."""
    with error_context(f"row {number}"):
        opened = [(message, parts_of(message)) for message in ([] if messages is None else messages_of(messages))]
    for _, parts in opened:
        for part in parts:
            if "image" in part:
                part["image"] = _open_picture(part["image"], number, base)
    return [{**message, "content": parts} for message, parts in opened]


def _open_picture(value: Any, number: int | None, base: Path | None) -> Any:
    """A relative path as an absolute one, a file of a remote dataset as its bytes, anything else as it is."""
    if isinstance(value, list) and value and isinstance(value[0], dict | str):
        return [_open_picture(item, number, base) for item in value]
    if isinstance(value, dict):  # datasets' own form of an image that is not decoded
        return value if value.get("bytes") is not None else _open_picture(value.get("path"), number, base)
    if not isinstance(value, str) or value[:8].lower().startswith((*WEB, "data:")):
        return value
    if "://" in value:  # on the Hub or inside an archive, where a dataset is streamed
        try:
            with fsspec.open(value, "rb") as file:
                return file.read()
        except OSError as error:
            raise OSError(f"row {number}: cannot read {value[:200]}: {str(error)[:300]}") from error
    return str(base / value) if base is not None else value
