"""Check the sizes in an untrusted image processor's settings, which could exhaust the memory."""

from collections.abc import Iterator
from typing import Any

from PIL import Image

from ..processing.image_loading import MAX_IMAGE_PIXELS


def check_image_processor(image_processor: Any, max_pixels: int = MAX_IMAGE_PIXELS) -> None:
    """Refuse an image processor that enlarges a small picture beyond the limit.

    Args:
        image_processor: the ViT's.
        max_pixels: how many a picture may have; never more than `PIL.Image.MAX_IMAGE_PIXELS`.

    Raises:
        ValueError: a square picture would have more pixels; names the setting and both counts.
    """
    limit = min(max_pixels, Image.MAX_IMAGE_PIXELS or max_pixels)
    for what, width, height in _sizes(image_processor):
        if width * height > limit:
            raise ValueError(
                f"the image processor makes {width} x {height} pixels of a picture, {what}: {width * height} are more "
                f"than the {limit} that are allowed"
            )


def _sizes(image_processor: Any) -> Iterator[tuple[str, int, int]]:
    """Each size setting, with the width and height that it gives a square picture."""
    for field, switch in (("size", "do_resize"), ("crop_size", "do_center_crop"), ("pad_size", "do_pad")):
        size = dict(getattr(image_processor, field, None) or {})
        if not size or not getattr(image_processor, switch, True):
            continue
        edges = {name: size[name] for name in ("shortest_edge", "longest_edge") if size.get(name)}
        if size.get("height") and size.get("width"):
            yield f"by its {field}", size["width"], size["height"]
        elif edges:
            name, edge = next(iter(edges.items()))
            yield f"by its {field}'s {name}", edge, edge
    patches, patch = (getattr(image_processor, field, None) for field in ("max_num_patches", "patch_size"))
    if isinstance(patches, int) and isinstance(patch, int):
        yield f"in {patches} patches of {patch} x {patch}", patches * patch, patch
