"""Write the frozen ViT's features of a data set to disk; training reads them in place of pictures."""

import json
import logging
import shutil
import time
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset, DatasetDict, List, Value
from tqdm.auto import tqdm

from ..processing.image_loading import load_image_for
from .arguments import SourceArguments, VisionArguments
from .data import IMAGE_ID, check_columns, image_id_of, numbered, picture_opener, undecoded
from .feature_cache import (
    COLUMN,
    METADATA,
    differences,
    is_cache,
    open_shard,
    planned_shards,
    read_metadata,
    vision_settings,
)
from .formats import load_source
from .precision import autocast, default_mixed_precision
from .process import start_process
from .recipe import parse_recipe
from .unreadable import REPORT, find_unreadable, report_unreadable
from .vision_tower import FeatureEncoder, load_tower


UNFINISHED_METADATA = f"{METADATA}.unfinished"

logger = logging.getLogger(__name__)


@dataclass
class CacheArguments:
    """The target folder and format of the features."""

    output_dir: str | None = field(default=None, metadata={"help": "The cache's folder: the `dataset` of later runs."})
    splits: list[str] | None = field(default=None, metadata={"help": "Splits to take; left out, all there are."})
    dtype: str = field(default="float16", metadata={"help": "float16, bfloat16 or float32."})
    batch_size: int = field(default=32, metadata={"help": "Rows whose pictures each device sees at once."})
    shard_size: int = field(default=1000, metadata={"help": "Rows of a shard; a run that is cut off loses one."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that decode pictures."})

    def __post_init__(self):
        if self.output_dir is None:
            raise ValueError("output_dir not given: name the folder that the features go to")
        if self.dtype not in ("float16", "bfloat16", "float32"):
            raise ValueError(f"dtype is {self.dtype!r}; it takes float16, bfloat16 or float32")
        for name in ("batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be at least 1")


def main(argv: list[str], prog: str = "python -m lorgnette.trainer cache") -> None:
    """Write a cache from a recipe and the command line; see `recipes/cache.yaml`."""
    arguments = parse_recipe(
        (VisionArguments, SourceArguments, CacheArguments),
        argv,
        prog=prog,
        description=__doc__ or "",
    )
    write_cache(*arguments)


def write_cache(vision: VisionArguments, source: SourceArguments, args: CacheArguments) -> None:
    """Write a cache, or its missing shards; with several processes each writes its share.

    Raises:
        FileExistsError: `output_dir` holds something else, or a cache with other settings (with each that differs).
        FileNotFoundError: no such data set.
        ValueError: a missing or conflicting column, an unknown mixed precision; for pictures see
            [`FeatureEncoder`].
    """
    process = start_process(timeout=timedelta(days=7))  # processes wait for the slowest
    # float32 gives the features that training in float32 computes
    precision = "no" if args.dtype == "float32" else default_mixed_precision(process.device)
    casting = autocast(precision, process.device)
    tower, image_processor = load_tower(vision)
    tower.to(process.device)
    encoder = FeatureEncoder(
        tower, image_processor, getattr(torch, args.dtype), args.batch_size, args.dataloader_num_workers
    )
    folder = Path(args.output_dir).expanduser()
    with process.main_process_first():
        splits, fingerprints = load_splits(source, args.splits)
        settings = _settings(source, args, encoder, splits) | {
            "mixed_precision": precision,
            "dataset_fingerprints": fingerprints,
        }
        metadata = _begin(folder, settings, encoder, splits)

    planned = [(split, *shard) for split in splits for shard in planned_shards(folder, metadata, split)]
    todo = [(split, path, rows) for split, path, rows in planned if open_shard(path, len(rows)) is None]
    process.wait_for_everyone()  # no process writes while another still reads the folder
    if metadata["complete"] and not todo:
        logger.info("%s is complete and has these settings: there is nothing left to do", folder)
        return
    if len(todo) < len(planned):
        logger.info("%d of %d shards are complete already", len(planned) - len(todo), len(planned))

    datasets.disable_progress_bars()  # one for each part of each shard
    start, mine = time.monotonic(), todo[process.process_index :: process.num_processes]
    progress = tqdm(total=sum(len(rows) for *_, rows in mine), unit="row", disable=not process.is_main_process)
    with progress, casting:
        for split, path, rows in mine:
            _write_shard(splits[split].select(rows, keep_in_memory=True), source.image_column, encoder, path, progress)
    process.wait_for_everyone()
    if process.is_main_process:
        _write_metadata(folder, metadata | {"complete": True})
        seconds, rows = time.monotonic() - start, sum(len(rows) for *_, rows in todo)
        length, width = encoder.shape
        logger.info(
            "%s is complete: %s bytes per image (%d x %d, %s); %s rows written in %.0f s, %.1f pictures/s",
            *(folder, f"{encoder.bytes_per_picture:,}", length, width, args.dtype),
            *(f"{rows:,}", seconds, rows / seconds),
        )


def load_splits(args: SourceArguments, names: list[str] | None) -> tuple[DatasetDict, dict[str, str]]:
    """The splits to cache, with `index` and pictures that the image processor can open.

    Returns:
        the splits, and the fingerprint that `datasets` gives each: it changes with the rows.

    Raises:
        ValueError: no such split, one without rows, no such image column, a column called `index` or `vision_features`,
            no pictures.
    """
    if is_cache(args.dataset):
        raise ValueError(f"dataset {args.dataset} is a feature cache itself: it has no pictures")
    splits, base = load_source(args, args.dataset)
    if unknown := set(names or ()) - set(splits):
        raise ValueError(f"{args.dataset} has no split {' or '.join(sorted(unknown))}; it has {', '.join(splits)}")
    chosen, fingerprints = DatasetDict(), {}
    for name in names or splits:
        rows, title = splits[name], f"{args.dataset} ({name})"
        if not len(rows):
            raise ValueError(f"{title} has no rows: name the splits that have some in `splits`")
        check_columns(rows.features, [args.image_column], title)
        if taken := sorted({"index", COLUMN} & set(rows.features)):
            raise ValueError(f"{title}: the column {taken[0]!r} has to be renamed: a cache has one of that name")
        fingerprints[name] = rows._fingerprint
        chosen[name] = numbered(undecoded(rows)).with_transform(picture_opener(args.image_column, base))
    return chosen, fingerprints


def _settings(
    source: SourceArguments, args: CacheArguments, encoder: FeatureEncoder, splits: DatasetDict
) -> dict[str, Any]:
    """The metadata of a cache before it is written."""
    path = Path(source.dataset).expanduser()
    return {
        **vision_settings(encoder.tower, encoder.image_processor),
        "dtype": args.dtype,
        "feature_shape": list(encoder.shape),
        "dataset": str(path.resolve()) if path.exists() else source.dataset,
        "dataset_config": source.dataset_config,
        "dataset_revision": source.dataset_revision,
        "image_column": source.image_column,
        **({} if source.image_root is None else {"image_root": source.image_root}),
        "shard_size": args.shard_size,
        "skip_unreadable": source.skip_unreadable,
        "splits": {name: len(rows) for name, rows in splits.items()},
    }


def _begin(folder: Path, settings: dict[str, Any], encoder: FeatureEncoder, splits: DatasetDict) -> dict[str, Any]:
    """The metadata of the cache in `folder`, existing or new."""
    if is_cache(folder):
        metadata = read_metadata(folder)
        theirs = {name: value for name, value in metadata.items() if name not in ("unreadable", "complete")}
        if found := [f"{name} is {a!r} there, {b!r} here" for name, a, b in differences(theirs, settings)]:
            raise FileExistsError(f"{folder} holds a feature cache with other settings: {'; '.join(found)}")
        return metadata
    # a run that was killed before its first shard may leave it
    if folder.exists() and {path.name for path in folder.iterdir()} - {REPORT, UNFINISHED_METADATA}:
        raise FileExistsError(f"{folder} is not empty, and no feature cache: choose another output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    unreadable = {}
    if settings["skip_unreadable"]:
        column, workers = settings["image_column"], encoder.num_workers
        read = partial(load_image_for, encoder.image_processor)
        for name, rows in splits.items():
            pictures = rows.select_columns([column, "index"])
            unreadable[name] = find_unreadable(pictures, column, read, name, workers)
        report_unreadable(unreadable, folder)
    metadata = settings | {"unreadable": unreadable, "complete": False}
    _write_metadata(folder, metadata)
    return metadata


def _write_shard(rows: Dataset, image_column: str, encoder: FeatureEncoder, path: Path, progress: tqdm) -> None:
    """Save the rows with features in place of pictures; `path` appears when the shard is complete."""
    form = Value(f"fixed_size_binary[{encoder.bytes_per_picture}]")
    feature = List(form) if isinstance(rows.features[image_column], List) else form
    features = list(encoder(rows.select_columns([image_column, "index"]), image_column, progress))
    stored = rows.with_format(None)
    kept = stored.remove_columns(image_column).flatten_indices(keep_in_memory=True)
    if IMAGE_ID not in kept.features:
        kept = kept.add_column(IMAGE_ID, [image_id_of(row[image_column], row["index"]) for row in stored])
    unfinished = path.with_name(f"{path.name}.unfinished")
    for leftover in (unfinished, path):
        shutil.rmtree(leftover, ignore_errors=True)
    kept.add_column(COLUMN, features, feature=feature).save_to_disk(unfinished)
    unfinished.rename(path)


def _write_metadata(folder: Path, metadata: dict[str, Any]) -> None:
    unfinished = folder / UNFINISHED_METADATA
    unfinished.write_text(json.dumps(metadata, indent=2), encoding="utf-8")
    unfinished.replace(folder / METADATA)
