"""BLIP-2's random crops and flips of training pictures, from a generator of the row: see `row_seeds.py`."""

import math

import numpy as np
from PIL import Image, ImageOps


SCALE = (0.5, 1.0)  # share of the picture's area
RATIO = (3 / 4, 4 / 3)  # of width to height
_ATTEMPTS = 10


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
