"""Pictures for reports: map overlays, heat maps and contact sheets."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageOps


# dark blue, violet, red, orange, light yellow: from little to much, in order of lightness
COLOURS = np.array([(13, 8, 60), (106, 20, 110), (190, 55, 82), (246, 140, 30), (252, 250, 170)], dtype=float)


def overlay(picture: Image.Image, values: np.ndarray, size: int = 112) -> Image.Image:
    """A map over its greyscale picture, scaled by the map's maximum.

    Args:
        values: `(h, w)`, not negative; non-finite values count as 0.
        size: pixels of the longer side.
    """
    values = np.nan_to_num(values)
    scale = size / max(picture.size)
    shape = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    under = np.asarray(ImageOps.grayscale(picture.resize(shape, Image.Resampling.BICUBIC)), dtype=float)[..., None]
    largest = float(values.max())
    shares = (values / largest if largest > 0 else values).astype(np.float32)
    shares = np.asarray(Image.fromarray(shares).resize(shape, Image.Resampling.BICUBIC)).clip(0, 1)[..., None]
    strength = 0.25 + 0.55 * shares
    return Image.fromarray(((1 - strength) * under + strength * colours(shares[..., 0])).astype(np.uint8))


def colours(shares: np.ndarray) -> np.ndarray:
    """`(…)` numbers from 0 to 1 to `(…, 3)` colours from 0 to 255."""
    levels = np.linspace(0, 1, len(COLOURS))
    return np.stack([np.interp(shares, levels, channel) for channel in COLOURS.T], axis=-1)


def matrix(values: np.ndarray, low: float, high: float, size: int = 224) -> Image.Image:
    """A heat map of `(rows, columns)` values between `low` and `high`."""
    shares = ((np.asarray(values, dtype=float) - low) / (high - low)).clip(0, 1)
    small = Image.fromarray(colours(shares).astype(np.uint8))
    return small.resize((size, round(size * small.height / small.width)), Image.Resampling.NEAREST)


def sheet(titled: Sequence[tuple[str, Image.Image]], columns: int = 6, gap: int = 8) -> Image.Image:
    """A contact sheet of titled pictures, for trackers."""
    width, height = (max(size) for size in zip(*(picture.size for _, picture in titled), strict=True))
    rows, title = -(-len(titled) // columns), 14
    columns = min(columns, len(titled))
    page = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + title + gap) + gap), "white")
    draw = ImageDraw.Draw(page)
    for number, (text, picture) in enumerate(titled):
        left, top = gap + number % columns * (width + gap), gap + number // columns * (height + title + gap)
        draw.text((left, top), text.encode("latin-1", "replace").decode("latin-1")[: width // 6], fill="black")
        page.paste(picture, (left, top + title))
    return page


def sample_picture() -> Image.Image:
    """A drawn house under the sun, 320 x 240: the default test picture."""
    image = Image.new("RGB", (320, 240), (140, 190, 240))
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 170, 320, 240), fill=(90, 150, 70))
    pen.rectangle((110, 100, 210, 200), fill=(190, 90, 60))
    pen.polygon([(100, 100), (160, 50), (220, 100)], fill=(110, 50, 40))
    pen.ellipse((240, 20, 290, 70), fill=(250, 220, 80))
    return image


def data_uri(picture: Image.Image, lossless: bool = False) -> str:
    """A picture as a data URI."""
    buffer = io.BytesIO()
    kind = "png" if lossless else "jpeg"
    picture.save(buffer, kind, **({} if lossless else {"quality": 85}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
