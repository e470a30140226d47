"""Which data a model learned from or was measured on, written so that its card can tell; no path of this machine is."""

import json
from pathlib import Path
from typing import Any

from .arguments import SourceArguments
from .feature_cache import is_cache, read_metadata


TRAINING_DATA = "training_data.json"


def hub_dataset(args: SourceArguments) -> dict[str, str | None]:
    """Where on the Hub the rows come from; of a feature cache, those that it was made of.

    Returns:
        `dataset_id`, `dataset_config` and `dataset_revision`, all None for data that lie on this machine.
    """
    fields = ("dataset", "dataset_config", "dataset_revision")
    said = {name: getattr(args, name) for name in fields}
    if is_cache(args.dataset):
        metadata = read_metadata(args.dataset)
        said = {name: metadata[name] for name in fields}
    path = Path(said.pop("dataset")).expanduser()
    if path.exists() or path.is_absolute():
        return {"dataset_id": None, "dataset_config": None, "dataset_revision": None}
    return {"dataset_id": path.as_posix(), **said}


def write_training_data(folder: str | Path, args: SourceArguments, split: str, rows: int | None) -> None:
    """Put `training_data.json` where a model is to be trained: Hub id, split and number of rows (None for a stream)."""
    told: dict[str, Any] = {**hub_dataset(args), "split": split, "rows": rows}
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, TRAINING_DATA).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
