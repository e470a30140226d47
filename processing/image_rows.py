"""Which images belong to which text of a batch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def rows_of(images: Any) -> tuple[list[list[Any]], bool]:
    """Sort what a caller gave as images into rows.

    Args:
        images: an image, a list of images (a 4-D array counts as one), or a list of lists; there None is an empty list.

    Returns:
        The rows, and whether the caller has sorted them; where not, each image is a row of its own.

    Raises:
        ValueError: an empty list, or images mixed with lists of them.
    """
    if not _is_list(images):
        return [[images]], False
    items = list(images)
    if not items:
        raise ValueError("images is an empty list")
    if not any(_is_list(item) for item in items):
        return [[item] for item in items], False
    for position, item in enumerate(items):
        if item is not None and not _is_list(item):
            raise ValueError(f"images mixes lists and single images: item {position} is a {type(item).__name__}")
    return [[] if item is None else list(item) for item in items], True


def texts_of(texts: str | Sequence[str], name: str) -> list[str]:
    """A string, or a list of them, as a list.

    Raises:
        ValueError: an empty list.
        TypeError: an item that is no string, with its position.
    """
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, Sequence):
        raise TypeError(f"{name} is a {type(texts).__name__}; a string or a list of strings is needed")
    if not texts:
        raise ValueError(f"{name} is an empty list")
    for position, item in enumerate(texts):
        if not isinstance(item, str):
            raise TypeError(f"{name} {position} is a {type(item).__name__}; a string is needed")
    return list(texts)


def match_images(rows: list[list[Any]], sorted_by_caller: bool, wanted: list[int]) -> list[Any]:
    """All images of a batch in the order of their placeholders.

    Args:
        rows, sorted_by_caller: what [`rows_of`] gives.
        wanted: how many `<image>` each of the texts has.

    Raises:
        ValueError: a text with more or fewer `<image>` than images; names the row and both counts.
    """
    flat = [image for row in rows for image in row]
    if not sorted_by_caller and len(flat) == sum(wanted):
        return flat
    given = [len(row) for row in rows]
    if not sorted_by_caller and len(wanted) == 1:
        given = [len(flat)]
    if given == wanted:
        return flat
    if len(given) != len(wanted):
        raise ValueError(
            f"the {len(wanted)} texts have {sum(wanted)} <image> in all ({', '.join(map(str, wanted))}), and "
            f"{len(flat)} images were given" + (f" in {len(rows)} lists" if sorted_by_caller else "")
        )
    row = next(row for row, (has, wants) in enumerate(zip(given, wanted, strict=True)) if has != wants)
    hint = ": each image needs its <image> in the text" if wanted[row] < given[row] else ""
    raise ValueError(f"row {row}: {wanted[row]} <image> in the text, {given[row]} images given{hint}")


def _is_list(item: Any) -> bool:
    if isinstance(item, (np.ndarray, torch.Tensor)):
        return item.ndim == 4
    return isinstance(item, Sequence) and not isinstance(item, (str, bytes, bytearray, memoryview))
