"""Images of all kinds become upright 8-bit RGB `PIL.Image`s, or an error says why not."""

import asyncio
import base64
import importlib
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import torch
from huggingface_hub import get_session
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH

from .prompt_encoding import error_context


MAX_IMAGE_PIXELS = 50_000_000  # a pixel takes up to 20 bytes while it is decoded (JPEG 2000): 1 GB
DOWNLOAD_SECONDS, DOWNLOAD_BYTES = 20.0, 100 * 2**20
# Of what else Pillow reads EPS starts Ghostscript, IPTC opens any format, ICO decodes before its size is known
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
Image.init()
_READABLE = tuple(kind for kind in FORMATS if kind in Image.OPEN)  # older versions of Pillow know no AVIF
WEB = ("http://", "https://")
_BASE64_OF_URLS = str.maketrans("-_", "+/", "\r\n\t")
WERE_FLOATS = "lorgnette: floats from 0 to 1"  # in `info` of a loaded picture


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
    if source is None:
        raise ValueError("the image is None")
    if isinstance(source, (np.ndarray, torch.Tensor)):
        source = _from_array(source, layout)
    name, data = ("the picture", b"") if isinstance(source, Image.Image) else _read(source, timeout)
    if not data and not isinstance(source, Image.Image):
        raise ValueError(f"{name} is empty (0 bytes)")
    try:
        image = Image.open(BytesIO(data), formats=_READABLE) if data else source
        _check_size(*image.size, max_pixels)
        if image.format == "TIFF":  # a tile may be far larger than the picture that is cut out of it
            _check_size(*(image.tag_v2.get(tag, 1) for tag in (TILEWIDTH, TILELENGTH)), max_pixels)
        return _to_rgb(ImageOps.exif_transpose(image, in_place=bool(data)) or image)
    except MemoryError:  # says nothing of the picture: a smaller one may fail as well
        raise
    except Image.UnidentifiedImageError as error:
        what = f"is no picture that is read here ({', '.join(_READABLE)}); it begins with {data[:24]!r}"
        raise ValueError(f"{name} {what}") from error
    except Exception as error:  # on broken files Pillow raises SyntaxError, struct.error, EOFError and more
        raise ValueError(f"{name} cannot be read as a picture: {error or type(error).__name__}") from error


def load_image_for(image_processor: Any, source: Any, **settings: Any) -> Image.Image:
    """[`load_image`]; a ValueError also for a narrow picture that exceeds `max_pixels` once it is resized."""
    image = load_image(source, **settings)
    size = dict((getattr(image_processor, "do_resize", True) and getattr(image_processor, "size", None)) or {})
    if (edge := size.get("shortest_edge")) and not size.get("longest_edge"):
        resized = [edge * side // min(image.size) for side in image.size]
        with error_context(f"a picture of {image.width} x {image.height} with its shorter side resized to {edge}"):
            _check_size(*resized, settings.get("max_pixels", MAX_IMAGE_PIXELS))
    return image


def download(url: str, timeout: float | None = None) -> tuple[str, bytes]:
    """The name of a URL for messages, with its content type, and its bytes; an OSError where it cannot be fetched."""
    seconds = DOWNLOAD_SECONDS if timeout is None else timeout
    # the client library that huggingface_hub brings: httpx, or httpx2 since 2.0
    httpx = importlib.import_module(type(get_session()).__module__.partition(".")[0])

    async def fetch() -> tuple[str, bytes]:
        data, headers = bytearray(), {"User-Agent": "lorgnette", "Accept-Encoding": "identity"}
        async with asyncio.timeout(seconds), httpx.AsyncClient(timeout=None, headers=headers) as client:
            request = client.build_request("GET", url)
            for _ in range(10):  # follow_redirects=True would read the body of each redirect
                response = await client.send(request, stream=True)
                if (request := response.next_request) is None:
                    break
            response.raise_for_status()
            async for chunk in response.aiter_raw():
                data += chunk
                if len(data) > DOWNLOAD_BYTES:
                    raise OSError(f"larger than {DOWNLOAD_BYTES} bytes")
            return f"{url[:200]} ({response.headers.get('Content-Type', '').partition(';')[0]})", bytes(data)

    try:
        with ThreadPoolExecutor(1) as thread:  # the caller's thread may run an event loop of its own
            return thread.submit(lambda: asyncio.run(fetch())).result()
    except TimeoutError as error:
        raise TimeoutError(f"cannot fetch {url[:200]}: not complete after {seconds:g} s") from error
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        raise OSError(f"cannot fetch {url[:200]}: {str(error)[:300] or type(error).__name__}") from error


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
            return "the data URL", _decode_base64(source.partition(",")[2])
    if isinstance(source, (str, os.PathLike)):
        if os.path.isfile(source):
            return str(source), Path(source).read_bytes()
        if os.path.exists(source):  # a folder, or a pipe, which may never end
            raise OSError(f"no regular file: {source!s:.200}")
        with suppress(ValueError):
            data = _decode_base64("".join(str(source).split()))
            if isinstance(source, str) and any(Image.OPEN[kind][1](data[:16]) for kind in _READABLE):
                return "the base64 string", data
        rest = f"… ({len(str(source))} characters, and no base64 of a picture)" if len(str(source)) > 200 else ""
        raise FileNotFoundError(f"no such file: {source!s:.200}{rest}")
    if not hasattr(source, "read"):
        raise TypeError(f"{type(source).__name__} is no image: give a picture, array, path, URL, bytes or file")
    if hasattr(source, "seek") and source.seekable():
        source.seek(0)
    return str(getattr(source, "name", "the file")), source.read()


def _decode_base64(text: str) -> bytes:
    """Base64 as programs write it: in lines, percent-encoded, without padding, in either alphabet."""
    digits = unquote(text).strip().translate(_BASE64_OF_URLS).rstrip("=")
    return base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    limit = min(max_pixels, Image.MAX_IMAGE_PIXELS or max_pixels)  # Pillow only warns, up to twice its own
    if not 0 < width * height <= limit:
        more = f" are more than the {limit} that are allowed" if width * height else ""
        raise ValueError(f"{width} x {height} pixels{more}")


def _to_rgb(image: Image.Image) -> Image.Image:
    info = {WERE_FLOATS: True} if image.mode == "F" or image.info.get(WERE_FLOATS) is True else {}
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_to_uint8(np.asarray(image)))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.info = info  # without EXIF, which is applied and may be broken
    return image


def _from_array(source: np.ndarray | torch.Tensor, layout: Any) -> Image.Image:
    layout, prefers_first, pixels = getattr(layout, "value", layout), isinstance(source, torch.Tensor), source
    if prefers_first:
        pixels = (source.float() if source.is_floating_point() else source).detach().cpu().numpy()
    axes = {"channels_first": 0, "channels_last": -1}
    fitting = [name for name, axis in axes.items() if pixels.ndim == 3 and pixels.shape[axis] in (1, 3, 4)]
    if not pixels.size or not (pixels.ndim == 2 or fitting):
        needed = "(H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels is needed"
        raise ValueError(f"an array of shape {pixels.shape} is no image: {needed}")
    if fitting:
        layout = layout or fitting[0 if prefers_first else -1]
        if layout not in fitting:
            takes = " or ".join(fitting)
            raise ValueError(f"input_data_format is {layout!r}; an image of shape {pixels.shape} takes {takes}")
        pixels = np.moveaxis(pixels, axes[layout], -1)
        pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    image = Image.fromarray(np.ascontiguousarray(_to_uint8(pixels)))
    image.info[WERE_FLOATS] = pixels.dtype.kind == "f"
    return image


def _to_uint8(values: np.ndarray) -> np.ndarray:
    """8-bit values of booleans, of integers of 8 or 16 bits, or of floats from 0 to 1."""
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind not in "biuf":
        raise ValueError(f"an array of {values.dtype} is no image: integers or floats are needed")
    low, high = values.min(), values.max()
    most = 1 if values.dtype.kind in "bf" else 65535 if values.dtype == np.uint16 or high > 255 else 255
    slack = 1e-3 if values.dtype.kind == "f" else 0  # resizing overshoots 0 and 1 by a little
    if not -slack <= low <= high <= most + slack:  # NaN is in no range
        needed = "floats from 0 to 1 or integers of 8 or 16 bits are needed"
        raise ValueError(f"its values of {values.dtype} run from {low:g} to {high:g}; {needed}")
    scaled = np.multiply(values, np.float32(255 / most), dtype=np.float32)
    return np.rint(scaled, out=scaled).clip(0, 255, out=scaled).astype(np.uint8)
