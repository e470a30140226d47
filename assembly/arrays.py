"""Pictures as arrays and tensors of all kinds."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from ..processing.image_loading import WERE_FLOATS, to_uint8


_AXES = {"channels_first": 0, "channels_last": -1}


def image_of(source: np.ndarray | torch.Tensor, layout: Any = None) -> Image.Image:
    """An 8-bit picture of an array, with a mark in its `info` where that is of floats.

    Args:
        source: `(H, W)`, `(H, W, C)` or `(C, H, W)` with 1, 3 or 4 channels; integers of 8 or 16 bits, or floats from 0
            to 1.
        layout: `"channels_first"` or `"channels_last"`; where it is None and both fit, arrays are channels-last and
            tensors are not.

    Raises:
        ValueError: another shape, values out of range, or a layout that does not fit.
    """
    is_tensor, pixels = isinstance(source, torch.Tensor), source
    if is_tensor:
        pixels = (source.float() if source.is_floating_point() else source).detach().cpu().numpy()
    fitting = [name for name, axis in _AXES.items() if pixels.ndim == 3 and pixels.shape[axis] in (1, 3, 4)]
    if not pixels.size or not (pixels.ndim == 2 or fitting):
        needed = "(H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels is needed"
        raise ValueError(f"an array of shape {pixels.shape} is no image: {needed}")
    if fitting:
        layout = getattr(layout, "value", layout) or fitting[0 if is_tensor else -1]
        if layout not in fitting:
            takes = " or ".join(fitting)
            raise ValueError(f"input_data_format is {layout!r}; an image of shape {pixels.shape} takes {takes}")
        pixels = np.moveaxis(pixels, _AXES[layout], -1)
        pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    image = Image.fromarray(np.ascontiguousarray(to_uint8(pixels)))
    image.info[WERE_FLOATS] = pixels.dtype.kind == "f"
    return image
