"""Random crops and flips of training pictures, as BLIP-2 trains with them: the same again when a run is resumed.

Trainer restores the state of the random generators, but what a data loader fetched ahead has drawn from them by then.
So nothing is drawn from those: a picture's randomness follows from the seed, the epoch and the row.
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
    """Gives each training row the seed of its augmentation, another one in each epoch.

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
        """The rows, opened, with an `augmentation_seed`, by which the collator knows those of training.

        A stream has one endless epoch; `visit`, the place in it, tells its rounds apart.
        """
        visits = batch.get("visit", [0] * len(batch["index"]))
        rows = zip(batch["index"], visits, strict=True)
        return {**open_batch(batch), "augmentation_seed": [[self.seed, self.epoch.item(), *row] for row in rows]}


def augment(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """A random part of half the picture's area or more, mirrored every other time (LAVIS' `blip2_image_train`).

    Resizing it is left to the image processor, as with any picture. The part is drawn as torchvision's
    `RandomResizedCrop` does; a picture so narrow that no part of these proportions fits is not cropped.
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
