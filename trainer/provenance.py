"""Record the data of training and evaluation for the model's card, without local paths."""

import hashlib
import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from .arguments import DataArguments, SourceArguments
from .feature_cache import is_cache, read_metadata


TRAINING_DATA = "training_data.json"
HELD_OUT = "held_out.json"


def hub_dataset(args: SourceArguments) -> dict[str, str | None]:
    """The rows' Hub dataset; for a feature cache, the one of its source.

    Returns:
        `dataset_id`, `dataset_config` and `dataset_revision`, all None for local data.
    """
    fields = ("dataset", "dataset_config", "dataset_revision")
    source = {name: getattr(args, name) for name in fields}
    if is_cache(args.dataset):
        metadata = read_metadata(args.dataset)
        source = {name: metadata[name] for name in fields}
    path = Path(source.pop("dataset")).expanduser()
    if args.format != "hub" and (path.exists() or path.is_absolute()):
        return {"dataset_id": None, "dataset_config": None, "dataset_revision": None}
    return {"dataset_id": path.as_posix(), **source}


def write_training_data(folder: str | Path, args: SourceArguments, split: str, rows: int | None) -> None:
    """Write `training_data.json` to a run's folder: Hub id, split and number of rows (None for a stream)."""
    contents: dict[str, Any] = {**hub_dataset(args), "split": split, "rows": rows}
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, TRAINING_DATA).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def write_held_out(folder: str | Path, args: DataArguments, rows: Dataset) -> None:
    """Write `held_out.json` to a run's folder: the numbers of the rows that `eval_fraction` held out."""
    numbers = sorted(set(rows.with_format(None)["index"][:]))
    held_out = {"dataset": _digest(args.dataset), "split": args.train_split, "rows": numbers}
    Path(folder, HELD_OUT).write_text(json.dumps(held_out) + "\n", encoding="utf-8")


def _digest(dataset: str) -> str:
    """A data set's id or absolute path, as a digest: what is kept beside a model names no folder of this machine."""
    path = Path(dataset).expanduser()
    return hashlib.sha256(str(path.resolve() if path.exists() else dataset).encode()).hexdigest()


def read_held_out(model: str, dataset: str) -> tuple[str, set[int]] | None:
    """The split and the numbers of the rows of `dataset` that the training of `model` held out; None if unknown.

    `model` is a run's folder, or a checkpoint in it.
    """
    for folder in (Path(model).expanduser(), Path(model).expanduser().parent):
        if (folder / HELD_OUT).is_file():
            held_out = json.loads((folder / HELD_OUT).read_text(encoding="utf-8"))
            if held_out["dataset"] == _digest(dataset):
                return held_out["split"], set(held_out["rows"])
    return None
