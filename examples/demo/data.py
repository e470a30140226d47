"""Five classes of CIFAR-10 as a `datasets.DatasetDict` of pictures and sentences."""

from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from ..sources import cifar


CLASSES = ("airplane", "automobile", "frog", "horse", "ship")  # as many as ten minutes on two cores allow
SENTENCES = {name: f"a photo of {'an' if name[0] in 'aeiou' else 'a'} {name}" for name in CLASSES}
TRAIN, VALIDATION, HELD_OUT = 200, 10, 60  # pictures per class


def build(cache: Path, folder: Path) -> DatasetDict:
    """Save the splits `train`, `validation` and `test` to `folder`, with equally many pictures of each class.

    Columns: `image` (32 x 32 RGB) and `text` (the class' sentence). Training and validation pictures come from
    CIFAR-10's first training batch, the held-out ones from its test batch.
    """
    training, held_out = cifar.read(cache)
    indices = balanced(training[1], TRAIN + VALIDATION)  # (classes, TRAIN + VALIDATION)
    splits = DatasetDict(
        train=_rows(*training, indices[:, :TRAIN]),
        validation=_rows(*training, indices[:, TRAIN:]),
        test=_rows(*held_out, balanced(held_out[1], HELD_OUT)),
    )
    splits.save_to_disk(folder)
    return splits


def balanced(labels: np.ndarray, count: int) -> np.ndarray:
    """Indices (classes, count) of the first `count` pictures of each of `CLASSES`.

    Raises ValueError, with the class and the numbers, if there are fewer.
    """
    rows = []
    for name in CLASSES:
        found = np.flatnonzero(labels == cifar.CLASSES.index(name))
        if len(found) < count:
            raise ValueError(f"{count} pictures of class {name!r} are wanted, the batch has {len(found)}")
        rows.append(found[:count])
    return np.stack(rows)


def _rows(pictures: np.ndarray, labels: np.ndarray, indices: np.ndarray) -> Dataset:
    """Rows with alternating classes, so that the first k pictures are balanced."""
    order = indices.T.flatten()
    return Dataset.from_dict(
        {
            "image": [PILImage.fromarray(pictures[i]) for i in order],
            "text": [SENTENCES[cifar.CLASSES[labels[i]]] for i in order],
        },
        features=Features({"image": Image(), "text": Value("string")}),
    )
