"""Images of all kinds become upright 8-bit RGB `PIL.Image`s, or an error says why not."""

import asyncio
import errno
import importlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import get_session
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH

from .prompt_encoding import decode_base64, error_context


MAX_IMAGE_PIXELS = 50_000_000  # a pixel takes up to 20 bytes while it is decoded (JPEG 2000): 1 GB
DOWNLOAD_SECONDS, DOWNLOAD_BYTES = 20.0, 100 * 2**20
# Of what else Pillow reads EPS starts Ghostscript, IPTC opens any format, ICO decodes before its size is known
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
Image.init()
_READABLE = tuple(kind for kind in FORMATS if kind in Image.OPEN)  # older versions of Pillow know no AVIF
WEB = ("http://", "https://")
_WERE_FLOATS = "lorgnette: floats from 0 to 1"  # in `info` of a loaded picture


def load_image(source: Any, timeout: Any = None, max_pixels: int = MAX_IMAGE_PIXELS, layout: Any = None) -> Image.Image:
    """Read one image as RGB: upright by its EXIF, transparency over white, 16 bits scaled to 8, an animation's first.

    Args:
        source: a PIL image; an array or tensor, `(H, W)`, `(H, W, C)` or `(C, H, W)` with 1, 3 or 4 channels, of 8-bit
            or 16-bit integers or floats from 0 to 1 (where both fit and `layout` is None, arrays are channels-last and
            tensors are not); a path; an http(s) or data URL; base64; bytes; a file; a dict with `bytes` or `path`.
        timeout: seconds a download may take in all, 20 by default; it ends at 100 MiB too.
        max_pixels: a picture with more is refused before it is decoded; so it is above `PIL.Image.MAX_IMAGE_PIXELS`.

    Raises a ValueError for no usable picture, an OSError for what cannot be read or fetched, a TypeError for the rest.
    """
    layout = getattr(layout, "value", layout)
    if layout not in (None, "channels_first", "channels_last"):
        raise ValueError(f'input_data_format is {layout!r}; it takes "channels_first" or "channels_last"')
    if source is None:
        raise ValueError("the image is None")
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _from_array(source, layout, max_pixels)
    is_open = isinstance(source, Image.Image)
    name, data = ("the picture", b"") if is_open else _read(source, timeout)
    if not data and not is_open:
        raise ValueError(f"{name} is empty (0 bytes)")
    with _decoding(name, data):
        image = source if is_open else Image.open(BytesIO(data), formats=_READABLE)
        _check_size(*image.size, max_pixels)
        if image.format == "TIFF":  # a tile may be far larger than the picture that is cut out of it
            _check_size(*(image.tag_v2.get(tag, 1) for tag in (TILEWIDTH, TILELENGTH)), max_pixels)
        return _to_rgb(ImageOps.exif_transpose(image, in_place=not is_open) or image)


def load_image_for(
    image_processor: Any, source: Any, timeout: Any = None, max_pixels: int = MAX_IMAGE_PIXELS, layout: Any = None
) -> Image.Image:
    """[`load_image`]; a ValueError also for a narrow picture that exceeds `max_pixels` once it is resized."""
    image = load_image(source, timeout, max_pixels, layout)
    size = dict((getattr(image_processor, "do_resize", True) and getattr(image_processor, "size", None)) or {})
    if (edge := size.get("shortest_edge")) and not size.get("longest_edge"):
        with error_context(f"a picture of {image.width} x {image.height} with its shorter side resized to {edge}"):
            _check_size(*(edge * side // min(image.size) for side in image.size), max_pixels)
    return image


def rescaling_of(image_processor: Any, images: list[Image.Image], settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that rescale pictures that were floats, where none do; a ValueError for 8-bit ones that none rescale."""
    names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean")
    own = {name: getattr(image_processor, name, None) for name in names}
    rescales, factor, normalizes, mean = (own[n] if settings.get(n) is None else settings[n] for n in names)
    of_8_bits = [position for position, image in enumerate(images) if not image.info.get(_WERE_FLOATS)]
    if (rescales is not False and factor != 1) or (normalizes and mean is not None and np.max(mean) > 1):
        return {}  # the mean is one of 8-bit values
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


def download(url: str, timeout: float | None = None) -> tuple[str, bytes]:
    """The name of a URL for messages, with its content type, and its bytes; an OSError where it cannot be fetched."""
    seconds = DOWNLOAD_SECONDS if timeout is None else timeout
    # the client library that huggingface_hub brings: httpx, or httpx2 since 2.0
    httpx = importlib.import_module(type(get_session()).__module__.partition(".")[0])

    async def fetch() -> tuple[str, bytes]:
        data, headers = bytearray(), {"User-Agent": "lorgnette", "Accept-Encoding": "identity"}
        async with asyncio.timeout(seconds), httpx.AsyncClient(timeout=seconds, headers=headers) as client:
            request = client.build_request("GET", url)
            for _ in range(10):
                response = await client.send(request, stream=True)
                if (request := response.next_request) is None:
                    break
            if response.status_code != 200:
                raise OSError(f"HTTP Error {response.status_code}: {response.reason_phrase}")
            async for chunk in response.aiter_raw():
                data += chunk
                if len(data) > DOWNLOAD_BYTES:
                    raise OSError(f"larger than {DOWNLOAD_BYTES} bytes")
            return f"{url[:200]} ({response.headers.get('Content-Type', '').partition(';')[0]})", bytes(data)

    try:
        with ThreadPoolExecutor(1) as thread:  # the caller's thread may run an event loop of its own
            return thread.submit(lambda: asyncio.run(fetch())).result()
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        late = f"not complete after {seconds:g} s" if isinstance(error, TimeoutError) else ""
        reason = late or str(error)[:300] or type(error).__name__
        raise (TimeoutError if late else OSError)(f"cannot fetch {url[:200]}: {reason}") from error


def _read(source: Any, timeout: float | None) -> tuple[str, bytes]:
    """The name of a source for messages, and its bytes."""
    if isinstance(source, dict):
        if source.get("bytes") is not None:
            return str(source.get("path") or "the picture")[:200], source["bytes"]
        if source.get("path") is None:
            raise ValueError(f"a dict as an image needs `bytes` or `path`; it has {sorted(map(str, source))!s:.200}")
        source = source["path"]
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "the picture", bytes(source)
    if isinstance(source, str) and source[:8].lower().startswith(WEB):
        return download(source, timeout)
    if isinstance(source, str) and source[:5].lower() == "data:":
        with error_context("the data URL is not valid base64"):
            return "the data URL", decode_base64(source.partition(",")[2])
    if isinstance(source, (str, os.PathLike)):
        text = str(source)
        try:
            if (path := Path(source)).exists() and not (path.is_file() or path.is_dir()):  # a pipe may never end
                raise OSError(f"no regular file: {text[:200]}")
            return text, path.read_bytes()
        except (OSError, ValueError) as error:
            if not isinstance(error, (FileNotFoundError, ValueError)) and error.errno != errno.ENAMETOOLONG:
                raise
        if isinstance(source, str) and len(text) >= 64:
            with suppress(ValueError):
                data = decode_base64("".join(text.split()))
                if any(Image.OPEN[kind][1](data[:16]) for kind in _READABLE):  # the file begins as a picture does
                    return "the base64 string", data
        rest = f"… ({len(text)} characters, and no base64 of a picture)" if len(text) > 200 else ""
        raise FileNotFoundError(f"no such file: {text[:200]}{rest}")
    if not hasattr(source, "read"):
        raise TypeError(
            f"{type(source).__name__} is no image: give a picture, an array, a path, a URL, bytes or a file"
        )
    if hasattr(source, "seek") and source.seekable():
        source.seek(0)
    if not isinstance(data := source.read(), bytes):
        raise TypeError("the file is open for text; an image needs mode 'rb'")
    return str(getattr(source, "name", "the file")), data


@contextmanager
def _decoding(name: str, data: bytes = b"") -> Iterator[None]:
    """One kind of error for all that Pillow raises on broken files: SyntaxError, struct.error, EOFError and more."""
    try:
        yield
    except MemoryError:  # says nothing of the picture: a smaller one may fail as well
        raise
    except Exception as error:
        what = f"cannot be read as a picture: {error or type(error).__name__}"
        if isinstance(error, Image.UnidentifiedImageError):
            what = f"is no picture that is read here ({', '.join(_READABLE)}); it begins with {data[:24]!r}"
        raise ValueError(f"{name} {what}") from error


def _check_size(width: int, height: int, max_pixels: int) -> None:
    limit = min(max_pixels, Image.MAX_IMAGE_PIXELS or max_pixels)  # Pillow only warns, up to twice its own
    if not 0 < width * height <= limit:
        more = f" are more than the {limit} that are allowed" if width * height else ""
        raise ValueError(f"{width} x {height} pixels{more}")


def _to_rgb(image: Image.Image) -> Image.Image:
    info = {_WERE_FLOATS: True} if image.mode == "F" or image.info.get(_WERE_FLOATS) is True else {}
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_to_uint8(np.asarray(image)))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.info = info  # without EXIF, which is applied and may be broken
    return image


def _from_array(source: np.ndarray | torch.Tensor, layout: str | None, max_pixels: int) -> Image.Image:
    prefers_first, pixels = isinstance(source, torch.Tensor), source
    if prefers_first:
        pixels = (source.float() if source.is_floating_point() else source).detach().cpu().numpy()
    first, last = (pixels.ndim == 3 and pixels.shape[axis] in (1, 3, 4) for axis in (0, -1))
    if not pixels.size or not (pixels.ndim == 2 or first or last):
        needed = "(H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels is needed"
        raise ValueError(f"an array of shape {pixels.shape} is no image: {needed}")
    if pixels.ndim == 3 and layout is not None:
        if not (first if layout == "channels_first" else last):
            raise ValueError(f"input_data_format is {layout!r}, and the image has the shape {pixels.shape}")
        first, last = layout == "channels_first", layout == "channels_last"
    pixels = np.moveaxis(pixels, 0, -1) if first and (prefers_first or not last) else pixels
    pixels = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels
    _check_size(pixels.shape[1], pixels.shape[0], max_pixels)
    image = Image.fromarray(np.ascontiguousarray(_to_uint8(pixels)))
    image.info[_WERE_FLOATS] = pixels.dtype.kind == "f"
    return _to_rgb(image)


def _to_uint8(values: np.ndarray) -> np.ndarray:
    kind = values.dtype.kind
    if values.dtype == np.uint8 or kind == "b":
        return values if kind == "u" else values.astype(np.uint8) * 255
    if kind not in "iuf":
        raise ValueError(f"an array of {values.dtype} is no image: integers or floats are needed")
    if kind == "f" and not np.isfinite(values).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(values))} of its {values.size} values are NaN or infinite")
    low, high = values.min(), values.max()
    if kind == "f":
        if low < -1e-3 or high > 1.001:  # resizing overshoots 0 and 1 by a little
            raise ValueError(f"its floats run from {low:g} to {high:g}; 0 to 1 is needed, or integers from 0 to 255")
        scaled = np.clip(values, 0, 1)
        scaled *= 255
    elif low < 0 or high > 65535:
        raise ValueError(f"its integers run from {low} to {high}; 8 bits (0 to 255) or 16 (0 to 65535) are needed")
    elif values.dtype == np.uint16 or high > 255:
        scaled = np.divide(values, np.float32(257), dtype=np.float32)  # 65535 / 255
    else:
        return values.astype(np.uint8)
    return np.rint(scaled, out=scaled).astype(np.uint8)
