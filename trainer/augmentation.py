"""BLIP-2's random crops and flips of training pictures, reproducible when a run is resumed.

A resumed data loader would draw other numbers from the global generators, since it fetches batches ahead. So each
picture gets its own generator, seeded with the run's seed, the epoch and the row.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


SCALE = (0.5, 1.0)  # share of the picture's area
RATIO = (3 / 4, 4 / 3)  # of width to height
_ATTEMPTS = 10


class AugmentationSeeds(TrainerCallback):
    """Gives each training row a seed for its augmentation, a new one in each epoch.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # data loader workers may outlive an epoch

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.epoch.fill_(int(state.epoch or 0))

    def mark(self, batch: dict[str, list], open_batch: Callable[[dict], dict]) -> dict[str, list]:
        """Open the rows and add an `augmentation_seed`, which the collator uses for training rows.

        A stream has one endless epoch; `visit`, the position in it, distinguishes its repetitions.
        """
        visits = batch.get("visit", [0] * len(batch["index"]))
        rows = zip(batch["index"], visits, strict=True)
        return {**open_batch(batch), "augmentation_seed": [[self.seed, self.epoch.item(), *row] for row in rows]}


def augment(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Crop to a random part of at least half the area, and flip with probability 0.5 (LAVIS' `blip2_image_train`).

    The image processor resizes the result. The crop is drawn like torchvision's `RandomResizedCrop`; a picture too
    narrow for these aspect ratios is not cropped.
    """
    for _ in range(_ATTEMPTS):
        area = image.width * image.height * generator.uniform(*SCALE)
        ratio = math.exp(generator.uniform(*map(math.log, RATIO)))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= image.width and 0 < height <= image.height:
            left = int(generator.integers(image.width - width + 1))
            top = int(generator.integers(image.height - height + 1))
            image = image.crop((left, top, left + width, top + height))
            break
    return ImageOps.mirror(image) if generator.random() < 0.5 else image
