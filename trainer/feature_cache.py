"""A feature cache on disk: its layout, reading it, and the model that it belongs to.

    CACHE/vision_features.json                      its source and settings; `complete` once all shards exist
    CACHE/SPLIT/vision_features-00000-of-00003/     a shard, as `Dataset.save_to_disk` writes it

A row has the columns of its source except pictures, `index` (its number in the source), `image_id` (rows of one picture
have one) and `vision_features`, the bytes of its `(L, E)` features: Arrow reads bytes fastest, and they can hold
bfloat16. A row with several pictures has a list. Shards are memory-mapped, so a cache may be larger than memory.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from transformers.image_processing_utils import BaseImageProcessor

from ..assembly.fingerprints import weights_sha256
from ..modeling.modeling_base import LorgnettePreTrainedModel
from ..modeling.modeling_loading import is_unread


METADATA = "vision_features.json"
COLUMN = "vision_features"
_NOT_OF_THE_FEATURES = ("_name_or_path", "architectures", "dtype", "transformers_version")
GO_ON = "run the command that began it again (python -m lorgnette.trainer cache …): it keeps complete shards"


def is_cache(folder: str | Path) -> bool:
    """Whether a folder is a feature cache, complete or not."""
    folder = Path(folder).expanduser()
    return (folder / METADATA).is_file() or next(folder.glob(f"*/{COLUMN}-*-of-*"), None) is not None


def read_metadata(folder: str | Path) -> dict[str, Any]:
    """The contents of `vision_features.json`.

    Raises:
        FileNotFoundError: the file is missing. ValueError: it is not JSON.
    """
    path = Path(folder).expanduser() / METADATA
    if not path.is_file():
        raise FileNotFoundError(f"the feature cache {folder} has no {METADATA}: write the cache again, elsewhere")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): write the feature cache again, elsewhere") from error


def load_cache(folder: str | Path, split: str) -> Dataset:
    """The rows of a split, `vision_features` still as bytes.

    Raises:
        ValueError: no such split, or an incomplete cache (with what is missing and how to continue).
    """
    metadata = read_metadata(folder)
    if split not in metadata["splits"]:
        raise ValueError(f"the feature cache {folder} has no split {split!r}; it has {', '.join(metadata['splits'])}")
    planned = planned_shards(folder, metadata, split)
    shards = [open_shard(path, len(rows)) for path, rows in planned]
    missing = [path.name for (path, _), shard in zip(planned, shards, strict=True) if shard is None]
    if missing:
        raise ValueError(
            f"the feature cache {folder} is half written: of split {split!r} {len(missing)} of {len(shards)} shards "
            f"are missing or cut off, {missing[0]} first; {GO_ON}"
        )
    if not metadata["complete"]:
        raise ValueError(f"the feature cache {folder} is half written: shards of other splits are missing; {GO_ON}")
    return concatenate_datasets(shards)


def feature_opener(folder: str | Path) -> Callable[..., torch.Tensor]:
    """A function from a row's bytes to its features `(L, E)`, or `(n, L, E)` for n pictures, in the stored dtype."""
    metadata = read_metadata(folder)
    return partial(_open_features, dtype=getattr(torch, metadata["dtype"]), shape=tuple(metadata["feature_shape"]))


def planned_shards(folder: str | Path, metadata: dict[str, Any], split: str) -> list[tuple[Path, list[int]]]:
    """The folder of each shard of a split, and its rows of the source."""
    left_out, size = metadata["unreadable"].get(split, {}), metadata["shard_size"]
    rows = [index for index in range(metadata["splits"][split]) if str(index) not in left_out]
    starts = range(0, len(rows), size)
    parent = Path(folder).expanduser() / split
    return [
        (parent / f"{COLUMN}-{number:05}-of-{len(starts):05}", rows[start : start + size])
        for number, start in enumerate(starts)
    ]


def open_shard(path: Path, rows: int) -> Dataset | None:
    """A shard, or None if it is missing or incomplete."""
    try:
        shard = load_from_disk(str(path))
    except (OSError, ValueError):  # Arrow's own errors are ValueErrors
        return None
    return shard if len(shard) == rows else None


def vision_settings(model: LorgnettePreTrainedModel, image_processor: BaseImageProcessor) -> dict[str, Any]:
    """Everything except the picture that vision features depend on, as JSON values."""
    config = model.config.vision_config.to_diff_dict()
    return {
        # settings outside the weights: heads, activation, epsilon …
        "vision_config": {name: value for name, value in config.items() if name not in _NOT_OF_THE_FEATURES},
        "vision_feature_layer": model.config.vision_feature_layer,
        "vision_feature_select_strategy": model.config.vision_feature_select_strategy,
        "image_processor": json.loads(image_processor.to_json_string()),
        "vision_weights_sha256": _hash_of(model.vision_model),
    }


def check_cache(folder: str | Path, model: LorgnettePreTrainedModel, image_processor: BaseImageProcessor) -> None:
    """Check that a cache holds this model's features.

    Raises:
        ValueError: another ViT, layer or image processor; with each different field and both values.
    """
    theirs, ours = read_metadata(folder), vision_settings(model, image_processor)
    found = [
        f"{n} is {a!r} in the cache, {b!r} here" for n, a, b in differences({n: theirs.get(n) for n in ours}, ours)
    ]
    if found:
        raise ValueError(f"the feature cache {folder} does not belong to this model: {'; '.join(found)}")


def differences(first: Any, second: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The dotted name of each value that differs between two nested mappings, with both values; None if missing."""
    if isinstance(first, dict) and isinstance(second, dict):
        for key in {**first, **second}:
            yield from differences(first.get(key), second.get(key), f"{name}.{key}".lstrip("."))
    elif first != second:
        yield name, first, second


def _open_features(
    value: bytes | list[bytes], _number: int, dtype: torch.dtype, shape: tuple[int, int]
) -> torch.Tensor:
    if isinstance(value, list):
        return torch.stack([_open_features(item, _number, dtype, shape) for item in value])
    return torch.frombuffer(bytearray(value), dtype=dtype).view(shape)


def _hash_of(vision_model: torch.nn.Module) -> str:
    """Of the weights that the features depend on."""
    weights = vision_model.state_dict()
    return weights_sha256({name: value for name, value in weights.items() if not is_unread(f"vision_model.{name}")})
