"""Where the rows come from: a Hub dataset, a local folder or file, or a stream; checked before anything is trained.

Every row gets an `index`, its number in the split, so that an error can name it. Pictures are not decoded here but
handed on as paths, URLs or bytes: it is the processor alone that decodes pictures.
"""

from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Image, IterableDataset, List, load_dataset, load_from_disk

from ..processing.conversations import parts_of
from ..processing.image_loading import naming
from .arguments import DataArguments, SourceArguments


FILE_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
Rows = Dataset | IterableDataset


def load_pairs(args: DataArguments, *, evaluate: bool, seed: int) -> tuple[Rows, Rows | None]:
    """The training rows and, with `evaluate`, the evaluation rows.

    A row holds `index` and the columns that `args` names, `messages_column` as `messages`. A picture (in its column, in
    a list there or in a message) is a path, a URL, bytes or a dict of bytes and path; a class label is its name. A
    streamed training set starts again when it ends, shuffled within a buffer.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: no such split, no rows, a named column is missing (those that exist are listed) or called `index`.
    """
    train, open_train = _numbered_rows(args, args.dataset, args.train_split)
    evaluation, open_evaluation = None, open_train
    if args.eval_fraction is not None:
        # Held out of a run that does not evaluate, too: another may go on from it that does.
        parts = train.train_test_split(args.eval_fraction, seed=seed)
        train, evaluation = parts["train"], parts["test"]
    elif evaluate:
        source, split = args.eval_dataset or args.dataset, args.eval_split or "train"
        evaluation, open_evaluation = _numbered_rows(args, source, split)
    if args.streaming:
        # Endless, since Trainer takes a stream for one epoch: resumed after the stream's end it would start it over.
        train = train.repeat(None)
        if args.shuffle_buffer_size:
            train = train.shuffle(seed=seed, buffer_size=args.shuffle_buffer_size)
    return _lazily(train, open_train), _lazily(evaluation, open_evaluation) if evaluate else None


def load_rows(args: SourceArguments, split: str) -> Rows:
    """The rows of one split of `args.dataset`, in order; what they hold and what is raised is as in [`load_pairs`].

    The text column may hold a list of texts a row.
    """
    return _lazily(*_numbered_rows(args, args.dataset, split))


def _numbered_rows(args: SourceArguments, source: str, split: str) -> tuple[Rows, partial]:
    """The split's named columns and `index`; and the function that makes a batch of them ready for the collator."""
    dataset, base = _load_split(args, source, split)
    name = f"{source} ({split})"
    # A stream may not know its columns before it is read; nothing in it is decoded then.
    features = dataset.features or next(iter(dataset), {})
    wanted = [args.image_column, *args.word_columns]
    if args.messages_column and args.image_column == DataArguments.image_column and args.image_column not in features:
        wanted = args.word_columns  # chats may bring their pictures along; a column that was named has to be there
    missing = [column for column in wanted if column not in features]
    if features and missing:
        raise ValueError(f"{name} has no column {' or '.join(map(repr, missing))}; it has {', '.join(features)}")
    if "index" in wanted:
        raise ValueError(f'{name}: the column "index" has to be renamed: row numbers go by that name')

    text = features.get(args.text_column)
    dataset = dataset.select_columns(wanted)
    for column, feature in (dataset.features or {}).items():
        if (undecoded := _undecoded(feature)) != feature:
            dataset = dataset.cast_column(column, undecoded)
    if args.messages_column not in (None, "messages"):
        dataset = dataset.rename_column(args.messages_column, "messages")  # what the collator knows chats by
    if next(iter(dataset), None) is None:
        raise ValueError(f"{name} has no rows")
    if isinstance(dataset, Dataset):
        dataset = dataset.add_column("index", np.arange(len(dataset)))
    else:
        dataset = dataset.map(_with_index, with_indices=True)
    labels = {args.text_column: text.names} if isinstance(text, ClassLabel) else {}
    return dataset, partial(_open_batch, image_column=args.image_column, base=base, labels=labels)


def _load_split(args: SourceArguments, source: str, split: str) -> tuple[Rows, Path | None]:
    """The split, and the folder that its relative image paths start from (None for a dataset of the Hub)."""
    path = Path(source).expanduser()
    streaming = args.streaming
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
        if split not in saved:
            raise ValueError(f"dataset {source!r} has no split {split!r}; it has {', '.join(saved)}")
        return saved[split].to_iterable_dataset() if streaming else saved[split], path
    if path.is_dir():
        return load_dataset(str(path), args.dataset_config, split=split, streaming=streaming), path
    if path.suffix.lower() in FILE_BUILDERS or path.is_absolute() or source.startswith((".", "~")):
        raise FileNotFoundError(f"dataset {source!r}: no such file or folder")
    revision = args.dataset_revision if source == args.dataset else None
    return load_dataset(source, args.dataset_config, split=split, streaming=streaming, revision=revision), None


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


def _open_batch(batch: dict, image_column: str, base: Path | None, labels: dict[str, list[str]]) -> dict:
    """A batch (column -> values) with pictures that the processor can open and class labels by name."""
    opened = dict(batch)
    numbers = batch.get("index", [None] * len(next(iter(batch.values()))))
    for column, open_value in {image_column: _open_picture, "messages": _open_chat}.items():
        if column in batch:
            values = zip(batch[column], numbers, strict=True)
            opened[column] = [open_value(value, base, number) for value, number in values]
    for column, names in labels.items():
        if column in batch:
            # Unlabelled rows (-1) go on as None: the collator names their number.
            opened[column] = [names[label] if label is not None and label >= 0 else None for label in batch[column]]
    return opened


def _open_chat(messages: list[dict] | None, base: Path | None, number: int | None) -> list[dict]:
    """The messages (none for None) with their contents as parts, whose pictures are opened as those of a column are."""
    with naming(f"row {number}"):
        opened = [(message, parts_of(message)) for message in messages or []]
    for _, parts in opened:
        for part in parts:
            if "image" in part:
                part["image"] = _open_picture(part["image"], base, number)
    return [{**message, "content": parts} for message, parts in opened]


def _open_picture(value: Any, base: Path | None, number: int | None) -> Any:
    """A relative path as an absolute one, a file of a remote dataset as its bytes, anything else as it is."""
    if isinstance(value, list) and value and isinstance(value[0], dict | str):
        return [_open_picture(item, base, number) for item in value]
    if isinstance(value, dict):  # datasets' own form of an image that is not decoded
        return value if value.get("bytes") is not None else _open_picture(value.get("path"), base, number)
    if not isinstance(value, str) or value.startswith(("http://", "https://", "data:")):
        return value
    if "://" in value:  # on the Hub or inside an archive, where a dataset is streamed
        try:
            with fsspec.open(value, "rb") as file:
                return file.read()
        except OSError as error:
            raise OSError(f"row {number}: cannot read {value}: {error}") from error
    return str(base / value) if base is not None else value
