"""Whatever a user calls an image becomes an 8-bit RGB `PIL.Image`, upright, or an error that says why not.

Errors are of three kinds: `ValueError` for content that is no usable picture, `OSError` (`FileNotFoundError` for a
path) for what cannot be read or fetched, `TypeError` for an object that is no image at all.
"""

import base64
import binascii
import http.client
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image, ImageOps


DOWNLOAD_SECONDS = 20.0
DOWNLOAD_BYTES = 100 * 2**20
_FLOAT_SLACK = 1e-3  # resizing overshoots 0 and 1 by a little


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Put the item's name in front of the message of an error about it."""
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        kinds = (FileNotFoundError, OSError, TypeError, ValueError)
        kind = next(kind for kind in kinds if isinstance(error, kind))
        raise kind(f"{where}: {error}") from error


def load_image(source: Any, timeout: float | None = None) -> Image.Image:
    """Read one image.

    EXIF rotation is applied. Transparency is laid over white. Palettes, grey, CMYK and the rest are converted; 16 bits
    are scaled to 8, not clipped. Of an animation the first frame counts.

    Args:
        source: a PIL image; an array or tensor, `(H, W)`, `(H, W, C)` or `(C, H, W)` with 1, 3 or 4 channels, of
            integers (8 or 16 bits by their values) or of floats from 0 to 1 (where both layouts fit, numpy's is
            channels-last and torch's channels-first); a path; an http(s) or data URL; bytes; a binary file; a dict
            with `bytes` or `path`, as `datasets.Image(decode=False)` gives it.
        timeout: seconds a download may take in all, 20 by default; it ends at 100 MiB too.

    Returns:
        A PIL image in mode RGB.

    Raises:
        ValueError: `None`, no picture, a broken one, one with more pixels than `PIL.Image.MAX_IMAGE_PIXELS`, NaN or
            values out of range.
        FileNotFoundError: no such path.
        OSError: a file or URL that cannot be read.
        TypeError: an object of another kind.
    """
    if source is None:
        raise ValueError("the image is None")
    if isinstance(source, Image.Image):
        with _decoding("the picture"):
            return _to_rgb(source)
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        return _from_array((source.float() if source.is_floating_point() else source).numpy(), channels_first=True)
    if isinstance(source, np.ndarray):
        return _from_array(source, channels_first=False)
    name, data = _read(source, DOWNLOAD_SECONDS if timeout is None else timeout)
    if not data:
        raise ValueError(f"{name} is empty (0 bytes)")
    with _decoding(name, data):
        return _to_rgb(Image.open(BytesIO(data)))


def load_image_for(image_processor: Any, source: Any, timeout: float | None = None) -> Image.Image:
    """[`load_image`], and see to it that the ViT's image processor can take it.

    Raises:
        ValueError: as there; or so narrow a picture that resizing its shorter side would make it huge.
    """
    image = load_image(source, timeout)
    size, limit = getattr(image_processor, "size", None) or {}, Image.MAX_IMAGE_PIXELS
    edge, longest = (dict(size).get(name) for name in ("shortest_edge", "longest_edge"))
    if edge and not longest and limit is not None:
        pixels = edge * edge * max(image.size) // min(image.size)
        if pixels > limit:
            raise ValueError(
                f"a picture of {image.width} x {image.height}, its shorter side resized to {edge}, would have "
                f"{pixels} pixels, more than PIL.Image.MAX_IMAGE_PIXELS, {limit}"
            )
    return image


def _read(source: Any, timeout: float) -> tuple[str, bytes]:
    """The name of a source for messages, and its bytes."""
    if isinstance(source, dict):
        if source.get("bytes") is not None:
            return str(source.get("path") or "the picture"), source["bytes"]
        if source.get("path") is None:
            raise ValueError(f"a dict as an image needs `bytes` or `path`; it has {sorted(map(str, source))}")
        source = source["path"]
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "the picture", bytes(source)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        return _download(source, timeout)
    if isinstance(source, str) and source.startswith("data:"):
        return "the data URL", _from_base64(source.partition(",")[2])
    if isinstance(source, (str, os.PathLike)):
        try:
            with open(source, "rb") as file:
                return str(source), file.read()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no such file: {str(source)[:200]}") from error
    if hasattr(source, "read"):
        if hasattr(source, "seek") and source.seekable():
            source.seek(0)
        data = source.read()
        if not isinstance(data, bytes):
            raise TypeError("the file is open for text; an image needs mode 'rb'")
        return str(getattr(source, "name", "the file")), data
    raise TypeError(
        f"{type(source).__name__} is no image: a picture, an array, a path, a URL, bytes or a file is needed"
    )


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"not valid base64: {error}") from error


def _download(url: str, timeout: float) -> tuple[str, bytes]:
    """Fetch a URL. `urlopen`'s own timeout starts anew with every packet, hence the deadline."""
    deadline, data = time.monotonic() + timeout, bytearray()
    try:
        with urlopen(Request(url, headers={"User-Agent": "lorgnette"}), timeout=timeout) as response:
            while chunk := response.read1(2**16):
                data += chunk
                if len(data) > DOWNLOAD_BYTES:
                    raise OSError(f"larger than {DOWNLOAD_BYTES} bytes")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not complete after {timeout:g} s")
            return f"{url} ({response.headers.get_content_type()})", bytes(data)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise OSError(f"cannot fetch {url}: {error}") from error


@contextmanager
def _decoding(name: str, data: bytes = b"") -> Iterator[None]:
    """One kind of error for all that Pillow raises on broken files: SyntaxError, struct.error, EOFError and more."""
    try:
        yield
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{name} is no picture that Pillow can read; it begins with {data[:24]!r}") from error
    except Exception as error:
        raise ValueError(f"{name} cannot be read as a picture: {error or type(error).__name__}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    limit = Image.MAX_IMAGE_PIXELS
    if not image.width or not image.height:
        raise ValueError(f"{image.width} x {image.height} pixels")
    if limit is not None and image.width * image.height > limit:  # Pillow only warns, up to twice its limit
        raise ValueError(f"{image.width} x {image.height} pixels are more than PIL.Image.MAX_IMAGE_PIXELS, {limit}")
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_array(np.asarray(image), channels_first=False)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_array(pixels: np.ndarray, channels_first: bool) -> Image.Image:
    first, last = pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4), pixels.ndim == 3 and pixels.shape[-1] in (1, 3, 4)
    if not pixels.size or not (pixels.ndim == 2 or first or last):
        raise ValueError(
            f"an array of shape {pixels.shape} is no image: (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels is"
            " needed"
        )
    if first and (channels_first or not last):
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    return _to_rgb(Image.fromarray(np.ascontiguousarray(_to_uint8(pixels))))


def _to_uint8(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    if values.dtype.kind not in "iuf":
        raise ValueError(f"an array of {values.dtype} is no image: integers or floats are needed")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(values))} of its {values.size} values are NaN or infinite")
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        if low < -_FLOAT_SLACK or high > 1 + _FLOAT_SLACK:
            raise ValueError(f"its floats run from {low:g} to {high:g}; 0 to 1 is needed, or integers from 0 to 255")
        return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
    if low < 0 or high > 65535:
        raise ValueError(f"its integers run from {low} to {high}; 8 bits (0 to 255) or 16 (0 to 65535) are needed")
    if (values.dtype.itemsize == 2 and values.dtype.kind == "u") or high > 255:
        return np.rint(values / np.float32(257)).astype(np.uint8)  # 65535 / 255
    return values.astype(np.uint8)
