"""Whatever a user calls an image becomes an 8-bit RGB `PIL.Image`, upright, or an error that says why not.

Errors are of three kinds: `ValueError` for content that is no usable picture, `OSError` (`FileNotFoundError` for a
path) for what cannot be read or fetched, `TypeError` for an object that is no image at all.
"""

import base64
import binascii
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH

from .image_download import Guard, download, is_web
from .public_addresses import refuse_private


MAX_IMAGE_PIXELS = 50_000_000  # a pixel takes up to 20 bytes while it is decoded (JPEG 2000): 1 GB
# What files may hold. Of what else Pillow reads EPS starts Ghostscript, IPTC opens whatever is inside it, in any format
# and of any size, ICO decodes before anybody has seen the size, and DDS is decoded in Python, a pixel after another.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_FLOAT_SLACK = 1e-3  # resizing overshoots 0 and 1 by a little
_OF_URLS = str.maketrans("-_", "+/", "\r\n\t")
_WERE_FLOATS = "lorgnette: floats from 0 to 1"  # in `info` of a loaded picture


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Put the item's name in front of the message of an error about it."""
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        kinds = (FileNotFoundError, OSError, TypeError, ValueError)
        kind = next(kind for kind in kinds if isinstance(error, kind))
        raise kind(f"{where}: {error}") from error


def load_image(source: Any, timeout: float | None = None, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Read one image.

    EXIF rotation is applied. Transparency is laid over white. Palettes, grey, CMYK and the rest are converted; 16 bits
    are scaled to 8, not clipped. Of an animation the first frame counts.

    Files and bytes are read in [`FORMATS`] alone. Whoever trusts a file in another format opens it with Pillow and
    gives the picture.

    Args:
        source: a PIL image; an array or tensor, `(H, W)`, `(H, W, C)` or `(C, H, W)` with 1, 3 or 4 channels, of
            integers (8 or 16 bits by their values) or of floats from 0 to 1 (where both layouts fit, numpy's is
            channels-last and torch's channels-first); a path; an http(s) or data URL; base64; bytes; a binary file; a
            dict with `bytes` or `path`, as `datasets.Image(decode=False)` gives it.
        timeout: seconds a download may take in all, 20 by default; it ends at 100 MiB too.
        max_pixels: a picture with more is refused before it is decoded; so it is above `PIL.Image.MAX_IMAGE_PIXELS`.

    Returns:
        A PIL image in mode RGB.

    Raises:
        ValueError: `None`, no picture, a broken one, one with too many pixels, NaN or values out of range.
        FileNotFoundError: no such path.
        OSError: a file or URL that cannot be read.
        TypeError: an object of another kind.
    """
    if source is None:
        raise ValueError("the image is None")
    if isinstance(source, Image.Image):
        with _decoding("the picture"):
            _check_size(*source.size, max_pixels)
            return _to_rgb(ImageOps.exif_transpose(source))
    if isinstance(source, torch.Tensor):
        return _from_array(_to_numpy(source), channels_first=True, max_pixels=max_pixels)
    if isinstance(source, np.ndarray):
        return _from_array(source, channels_first=False, max_pixels=max_pixels)
    name, data = _read(source, timeout)
    if not data:
        raise ValueError(f"{name} is empty (0 bytes)")
    with _decoding(name, data):
        image = Image.open(BytesIO(data), formats=_readable_formats())
        _check_size(*image.size, max_pixels)
        if image.format == "TIFF":  # a tile may be far larger than the picture that is cut out of it
            _check_size(*(image.tag_v2.get(tag, 1) for tag in (TILEWIDTH, TILELENGTH)), max_pixels)
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)


def load_image_for(
    image_processor: Any, source: Any, timeout: float | None = None, max_pixels: int = MAX_IMAGE_PIXELS
) -> Image.Image:
    """[`load_image`], and see to it that the ViT's image processor makes no huge one of it.

    Raises:
        ValueError: as there; or one that it would make larger than `max_pixels`: a narrow one whose shorter side it
            resizes, or any, where its settings are absurd.
    """
    image = load_image(source, timeout, max_pixels)
    limit = _limit(max_pixels)
    for what, (width, height) in _made_of(image_processor, *image.size):
        if width * height > limit:
            raise ValueError(
                f"a picture of {image.width} x {image.height}, {what}, would have {width * height} pixels, more than "
                f"the {limit} that are allowed"
            )
    return image


def laid_out(source: Any, layout: Any) -> Any:
    """An array or tensor whose layout the caller tells (`input_data_format`), as a numpy array with channels last.

    Raises:
        ValueError: there are not 1, 3 or 4 channels where the layout has them; or another layout.
    """
    layout = getattr(layout, "value", layout)
    if layout not in (None, "channels_first", "channels_last"):
        raise ValueError(f'input_data_format is {layout!r}; it takes "channels_first" or "channels_last"')
    if layout is None or getattr(source, "ndim", None) != 3:
        return source
    pixels = _to_numpy(source) if isinstance(source, torch.Tensor) else source
    pixels = np.moveaxis(pixels, 0, -1) if layout == "channels_first" else pixels
    if pixels.shape[-1] not in (1, 3, 4):
        raise ValueError(f"input_data_format is {layout!r}, and the image has the shape {tuple(source.shape)}")
    return pixels


def rescaling_of(image_processor: Any, images: list[Image.Image], settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with which an image processor that does not rescale reads loaded pictures, which have 8 bits each.

    Pictures that were given as floats from 0 to 1 are divided by 255 again.

    Args:
        settings: the caller's, which win over the image processor's own.

    Raises:
        ValueError: pictures of 8 bits that it would take for values from 0 to 1; names the first, with its values.
    """
    own, asked = (
        [setting(name) for name in ("do_rescale", "rescale_factor", "do_normalize", "image_mean")]
        for setting in (
            lambda name: getattr(image_processor, name, None),
            lambda name: getattr(image_processor, name, None) if settings.get(name) is None else settings[name],
        )
    )
    rescales, factor, normalizes, mean = asked
    if (rescales is not False and factor != 1) or (normalizes and mean is not None and np.max(mean) > 1):
        return {}  # or the mean is one of values from 0 to 255
    of_8_bits = [position for position, image in enumerate(images) if not image.info.get(_WERE_FLOATS)]
    raw = own[0] is False and own[2] is False  # a ViT that takes values as they come
    if of_8_bits and not (raw and len(of_8_bits) == len(images)):
        low, high = np.asarray(images[of_8_bits[0]]).min(), np.asarray(images[of_8_bits[0]]).max()
        what = "do_rescale is False" if rescales is False else f"rescale_factor is {factor}"
        raise ValueError(
            f"image {of_8_bits[0]}: {what}, which is for floats from 0 to 1, and its 8-bit values run from {low} to "
            f"{high} (image_mean is {mean}): give such floats, or have it rescaled"
        )
    return {} if of_8_bits else {"do_rescale": True, "rescale_factor": 1 / 255}


def _made_of(image_processor: Any, width: int, height: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """What an image processor does to the size of a picture, and what it is then at least."""
    short, long = sorted((width, height))
    for field, used in (("size", "do_resize"), ("crop_size", "do_center_crop"), ("pad_size", "do_pad")):
        size = dict(getattr(image_processor, field, None) or {})
        if not size or not getattr(image_processor, used, True):
            continue
        edge, longest = size.get("shortest_edge"), size.get("longest_edge")
        if size.get("height") and size.get("width"):
            yield f"by the image processor's {field}", (size["width"], size["height"])
        elif edge:
            yield f"its shorter side resized to {edge}", (edge, edge if longest else edge * long // short)
        elif longest:
            yield f"its longer side resized to {longest}", (longest, longest * short // long)
    patches, patch = (getattr(image_processor, field, None) for field in ("max_num_patches", "patch_size"))
    if isinstance(patches, int) and isinstance(patch, int):
        yield f"in {patches} patches of {patch} x {patch}", (patches * patch, patch)


def read_web_image(
    url: str, timeout: float | None = None, max_bytes: int | None = None, guard: Guard = refuse_private
) -> bytes:
    """The file behind a URL that somebody else names, and that must not lead into this machine or its network.

    Args:
        url: http, https or base64 data.
        timeout, max_bytes, guard: see [`download`]; without a `guard` the host has to be on the public internet.

    Raises:
        ValueError: a URL of another kind or without a host, base64 that is not valid.
        OSError: see [`download`].
    """
    if is_web(url):
        _check_url(url)
        return download(url, timeout, max_bytes, guard)[1]
    if is_data_url(url):
        return _from_base64(url.partition(",")[2])
    raise ValueError(f"an image's URL begins with http://, https:// or data:, not with {url[:20]!r}")


def _check_url(url: str) -> None:
    """What is wrong with a URL itself is not told as if its host were to blame."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # either may raise
    except ValueError as error:
        raise ValueError(f"{url[:200]} is no URL: {error}") from error
    if not host or parts.username is not None:
        raise ValueError("an image's URL names a host after http:// or https://, and no user before it")


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
    if isinstance(source, str) and is_web(source):
        return download(source, timeout)
    if isinstance(source, str) and is_data_url(source):
        return "the data URL", _from_base64(source.partition(",")[2])
    if isinstance(source, (str, os.PathLike)):
        try:
            mode = os.stat(source).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # open says what a folder is; a pipe may never end
                raise OSError(f"no regular file: {str(source)[:200]}")
            with open(source, "rb") as file:
                return str(source), file.read()
        except (FileNotFoundError, OSError, ValueError) as error:
            absent = isinstance(error, (FileNotFoundError, ValueError)) or error.errno == errno.ENAMETOOLONG
            if not absent:
                raise
            if (data := _raw_base64(source)) is not None:
                return "the base64 string", data
            text = str(source)
            rest = f"… ({len(text)} characters, and no base64 of a picture)" if len(text) > 200 else ""
            raise FileNotFoundError(f"no such file: {text[:200]}{rest}") from None
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


def is_data_url(url: str) -> bool:
    return url[:5].lower() == "data:"


def decode_base64(text: str) -> bytes:
    """Base64 as programs write it: in lines, percent-encoded, without padding, in either alphabet.

    Raises:
        binascii.Error: it is none.
    """
    digits = unquote(text).strip().translate(_OF_URLS).rstrip("=")
    return base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)


def _raw_base64(source: Any) -> bytes | None:
    """What a string that names no file says in base64, where it is long enough and Pillow knows a picture in it."""
    if not isinstance(source, str) or len(source) < 64:
        return None
    try:
        data = decode_base64("".join(source.split()))
        Image.open(BytesIO(data), formats=_readable_formats()).close()
    except (ValueError, Image.UnidentifiedImageError):  # binascii's is one
        return None
    except Exception:  # a picture, of which is said later on what is wrong with it
        return data
    return data


def _from_base64(text: str) -> bytes:
    try:
        return decode_base64(text)
    except binascii.Error as error:
        raise ValueError(f"the data URL is not valid base64: {error}") from error


@contextmanager
def _decoding(name: str, data: bytes = b"") -> Iterator[None]:
    """One kind of error for all that Pillow raises on broken files: SyntaxError, struct.error, EOFError and more."""
    try:
        yield
    except MemoryError:  # says nothing of the picture: a smaller one may fail as well
        raise
    except Image.UnidentifiedImageError as error:
        kinds = ", ".join(_readable_formats())
        raise ValueError(f"{name} is no picture that is read here ({kinds}); it begins with {data[:24]!r}") from error
    except Exception as error:
        raise ValueError(f"{name} cannot be read as a picture: {error or type(error).__name__}") from error


@cache
def _readable_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)  # older versions of Pillow know no AVIF


def _limit(max_pixels: int) -> int:
    return min(max_pixels, Image.MAX_IMAGE_PIXELS or max_pixels)  # Pillow only warns, up to twice its own


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if not width or not height:
        raise ValueError(f"{width} x {height} pixels")
    limit = _limit(max_pixels)
    if width * height > limit:
        raise ValueError(f"{width} x {height} pixels are more than the {limit} that are allowed")


def _to_rgb(image: Image.Image) -> Image.Image:
    were_floats = image.mode == "F" or image.info.get(_WERE_FLOATS) is True
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_to_uint8(np.asarray(image)))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    # EXIF and the like has been heeded; to read it once more may fail, where it is broken
    image.info = {_WERE_FLOATS: True} if were_floats else {}
    return image


def _from_array(pixels: np.ndarray, channels_first: bool, max_pixels: int) -> Image.Image:
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
    _check_size(pixels.shape[1], pixels.shape[0], max_pixels)
    image = Image.fromarray(np.ascontiguousarray(_to_uint8(pixels)))
    image.info[_WERE_FLOATS] = pixels.dtype.kind == "f"
    return _to_rgb(image)


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


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
        scaled = np.clip(values, 0, 1)
        scaled *= 255
        return np.rint(scaled, out=scaled).astype(np.uint8)
    if low < 0 or high > 65535:
        raise ValueError(f"its integers run from {low} to {high}; 8 bits (0 to 255) or 16 (0 to 65535) are needed")
    if (values.dtype.itemsize == 2 and values.dtype.kind == "u") or high > 255:
        scaled = np.divide(values, np.float32(257), dtype=np.float32)  # 65535 / 255
        return np.rint(scaled, out=scaled).astype(np.uint8)
    return values.astype(np.uint8)
