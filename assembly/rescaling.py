"""Image processors that do not rescale: pictures that were floats from 0 to 1 are rescaled, 8-bit ones are refused."""

from typing import Any

import numpy as np
from PIL import Image

from ..processing.image_loading import WERE_FLOATS


def rescaling_of(image_processor: Any, images: list[Image.Image], settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that rescale pictures that were floats, where none do.

    Args:
        image_processor: the ViT's.
        images: as [`load_image`] gives them: 8-bit RGB, with a mark on those that were floats.
        settings: keywords of the call, which take the place of the image processor's own.

    Raises:
        ValueError: 8-bit pictures that no setting rescales, although the mean is one of floats from 0 to 1.
    """
    names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean")
    own = {name: getattr(image_processor, name, None) for name in names}
    rescales, factor, normalizes, mean = (own[n] if settings.get(n) is None else settings[n] for n in names)
    has_mean_of_8_bits = normalizes and mean is not None and np.max(mean) > 1
    if has_mean_of_8_bits or (rescales is not False and factor != 1):
        return {}
    of_8_bits = [position for position, image in enumerate(images) if not image.info.get(WERE_FLOATS)]
    if not of_8_bits:
        return {"do_rescale": True, "rescale_factor": 1 / 255}
    if own["do_rescale"] is own["do_normalize"] is False and len(of_8_bits) == len(images):
        return {}  # a ViT that takes values as they come
    values = np.asarray(images[of_8_bits[0]])
    what = "do_rescale is False" if rescales is False else f"rescale_factor is {factor}"
    raise ValueError(
        f"image {of_8_bits[0]}: {what}, which is for floats from 0 to 1, and its 8-bit values run from {values.min()} "
        f"to {values.max()} (image_mean is {mean}): give such floats, or have it rescaled"
    )
