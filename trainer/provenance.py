"""Record the data of training and evaluation for the model's card, without local paths."""

import json
from pathlib import Path
from typing import Any

from .arguments import SourceArguments
from .feature_cache import is_cache, read_metadata


TRAINING_DATA = "training_data.json"


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
    if path.exists() or path.is_absolute():
        return {"dataset_id": None, "dataset_config": None, "dataset_revision": None}
    return {"dataset_id": path.as_posix(), **source}


def write_training_data(folder: str | Path, args: SourceArguments, split: str, rows: int | None) -> None:
    """Write `training_data.json` to a run's folder: Hub id, split and number of rows (None for a stream)."""
    told: dict[str, Any] = {**hub_dataset(args), "split": split, "rows": rows}
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, TRAINING_DATA).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
