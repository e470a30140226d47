"""Every kind of image becomes upright 8-bit RGB, and every kind of wreck an error that names it."""

import base64
import os
from io import BytesIO

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from transformers import BitImageProcessor, CLIPImageProcessor, Siglip2ImageProcessor, SiglipImageProcessor

from lorgnette import LorgnetteCollator, LorgnetteProcessor
from lorgnette.processing.image_loading import load_image


def encoded(image, kind="PNG", **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PNG = encoded(tiny.picture())
JPEG = encoded(tiny.picture(width=200, height=200), "JPEG")
HTML = b"<!DOCTYPE html><title>Not here</title>"


class TestGood:
    def test_sources(self, tmp_path):
        path = tmp_path / "picture.png"
        path.write_bytes(PNG)
        url = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
        file = BytesIO(PNG)
        file.read()  # a file at its end is read from its start, as Pillow does
        sources = [path, str(path), PNG, bytearray(PNG), file, url, Image.open(path)]
        sources += [{"bytes": PNG, "path": None}, {"bytes": None, "path": str(path)}]
        for source in sources:
            image = load_image(source)
            assert (image.mode, image.size) == ("RGB", (40, 30))
            np.testing.assert_array_equal(image, tiny.picture())

    @pytest.mark.parametrize("kind", ["uint8", "uint16", "int64", "float32", "float64", "bool"])
    def test_arrays(self, kind):
        pixels = np.asarray(tiny.picture())
        expected = pixels
        if kind == "uint16":
            pixels = pixels.astype(np.uint16) * 257
        elif kind.startswith("float"):
            pixels = (pixels / 255).astype(kind)
        elif kind == "bool":
            pixels = pixels > 127
            expected = pixels.astype(np.uint8) * 255
        else:
            pixels = pixels.astype(kind)
        for array in (pixels, pixels.transpose(2, 0, 1), torch.tensor(pixels), torch.tensor(pixels.transpose(2, 0, 1))):
            np.testing.assert_array_equal(load_image(array), expected)
        grey = np.repeat(expected[..., :1], 3, axis=-1)
        for array in (pixels[..., 0], pixels[..., :1], torch.tensor(pixels[..., 0])[None]):
            np.testing.assert_array_equal(load_image(array), grey)

    def test_half_precision(self):
        assert load_image(torch.full((3, 5, 7), 0.5, dtype=torch.bfloat16)).getpixel((0, 0)) == (128, 128, 128)

    def test_exif_rotation(self):
        upright = Image.new("RGB", (20, 10), "red")
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by 90 degrees
        assert load_image(encoded(upright, "JPEG", exif=exif)).size == (10, 20)

    @pytest.mark.parametrize(
        "mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "I;16", "I", "F"]
    )
    def test_modes(self, mode):
        image = load_image(Image.new(mode, (8, 6)))
        assert (image.mode, image.size) == ("RGB", (8, 6))

    def test_transparent_is_white(self):
        picture = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
        picture.putpixel((0, 0), (0, 0, 0, 0))
        palette = picture.quantize()
        for image in (picture, encoded(picture), encoded(palette), encoded(picture, "WEBP", lossless=True)):
            assert load_image(image).getpixel((0, 0)) == (255, 255, 255)
            assert load_image(image).getpixel((1, 0))[0] > 250

    def test_16_bits_are_scaled(self):
        values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
        for image in (
            Image.fromarray(values),
            encoded(Image.fromarray(values)),
            encoded(Image.fromarray(values), "TIFF"),
        ):
            assert np.asarray(load_image(image))[0, :, 0].tolist() == [0, 1, 128, 255]

    def test_first_frame(self):
        frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
        for kind in ("GIF", "WEBP", "PNG"):
            animation = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
            red, _, blue = load_image(animation).getpixel((0, 0))
            assert (red > 200, blue < 50) == (True, True)

    @pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 3), (1, 3), (3, 1), (4, 4)])
    def test_narrow_ones_work_or_say_why_not(self, size):
        edge = {"shortest_edge": 32}
        for image_processor in (
            tiny.image_processor(),
            SiglipImageProcessor(size={"height": 32, "width": 32}),
            CLIPImageProcessor(size=edge, crop_size=32),
            BitImageProcessor(size=edge, crop_size={"height": 32, "width": 32}),
            Siglip2ImageProcessor(patch_size=8, max_num_patches=16),
        ):
            processor = LorgnetteProcessor(image_processor, tiny.chat_tokenizer())
            for image in (Image.new("RGB", size, "red"), np.full((size[1], size[0], 3), 255, dtype=np.uint8)):
                pixels = processor(images=image, return_tensors="pt")["pixel_values"]
                assert pixels.shape[0] == 1
                assert torch.isfinite(pixels).all()

    def test_too_narrow_to_resize(self):
        processor = LorgnetteProcessor(CLIPImageProcessor(size={"shortest_edge": 224}), tiny.chat_tokenizer())
        with pytest.raises(ValueError, match=r"image 0: a picture of 1 x 5000 .*: 224 x 1120000 pixels"):
            processor(images=Image.new("RGB", (1, 5000)))


class TestBad:
    @pytest.mark.parametrize(
        ("data", "cause"),
        [
            (b"", "empty"),
            (b"This is no picture.", r"no picture that is read here \(AVIF, .*; it begins with b'This"),
            (JPEG[: len(JPEG) // 2], "truncated"),
            (PNG[: len(PNG) // 2], "cannot be read as a picture"),
            (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "picture"),
            (HTML, "no picture"),
        ],
    )
    def test_files(self, tmp_path, data, cause):
        path = tmp_path / "cat.png"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"cat\.png.*{cause}"):
            load_image(path)
        processor = LorgnetteProcessor(tiny.image_processor(), tiny.chat_tokenizer())
        with pytest.raises(ValueError, match=rf"image 1: .*cat\.png.*{cause}"):
            processor(images=[tiny.picture(), path])
        rows = [{"image": tiny.picture(), "text": "a"}, {"image": str(path), "text": "b"}]
        with pytest.raises(ValueError, match=rf"row 1 of the batch: .*cat\.png.*{cause}"):
            LorgnetteCollator(processor)(rows)

    def test_paths(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"image 0: .*gone\.png"):
            LorgnetteProcessor(tiny.image_processor(), tiny.chat_tokenizer())(images="gone.png")
        with pytest.raises(OSError, match=tmp_path.name):
            load_image(tmp_path)

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes in this system's folders")
    def test_what_never_ends(self, tmp_path):
        """A row of a data set may name a device or a pipe: the one fills the memory, the other waits for a writer."""
        os.mkfifo(tmp_path / "pipe.png")
        for source in (tmp_path / "pipe.png", "/dev/zero", {"path": "/dev/zero"}):
            with pytest.raises(OSError, match="no regular file: /"):
                load_image(source)

    @pytest.mark.filterwarnings(
        "ignore::PIL.Image.DecompressionBombWarning"
    )  # all that Pillow does up to twice its limit
    @pytest.mark.parametrize("factor", [1.5, 3])
    def test_decompression_bomb(self, monkeypatch, factor):
        bomb = encoded(Image.new("1", (2000, 1000)))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(2_000_000 / factor))
        for source in (bomb, Image.new("1", (2000, 1000))):
            with pytest.raises(ValueError, match="pixels"):
                load_image(source)

    @pytest.mark.parametrize(
        ("array", "cause"),
        [
            (np.full((4, 4, 3), np.nan), r"values of float64 run from nan to nan; floats from 0 to 1"),
            (torch.tensor([[0.0, float("inf")]]), "run from 0 to inf"),
            (np.full((4, 4, 3), 2.5), r"float64 run from 2\.5 to 2\.5"),
            (torch.randn(3, 8, 8), "float32 run from"),
            (np.full((4, 4), -1), "int64 run from -1 to -1"),
            (np.full((4, 4), 70000), "70000"),
            (np.zeros((5, 5, 5), dtype=np.uint8), r"shape \(5, 5, 5\)"),
            (np.zeros(4, dtype=np.uint8), r"shape \(4,\)"),
            (np.zeros((0, 4, 3), dtype=np.uint8), r"shape \(0, 4, 3\) is no image"),
            (np.zeros((0, 4), dtype=np.uint8), r"shape \(0, 4\)"),
            (np.array([["a", "b"]]), "<U1"),
        ],
    )
    def test_arrays(self, array, cause):
        with pytest.raises(ValueError, match=cause):
            load_image(array)

    @pytest.mark.parametrize("item", [7, object(), BytesIO.__class__])
    def test_other_objects(self, item):
        with pytest.raises(TypeError, match="is no image"):
            load_image(item)

    def test_none_and_dicts(self):
        with pytest.raises(ValueError, match="None"):
            load_image(None)
        with pytest.raises(ValueError, match=r"needs `bytes` or `path`; it has \['picture'\]"):
            load_image({"picture": PNG})

    def test_files_opened_for_text(self, tmp_path):
        path = tmp_path / "cat.png"
        path.write_text("words")
        with path.open() as file, pytest.raises(ValueError, match="bytes-like object is required"):
            load_image(file)

    def test_data_urls(self):
        with pytest.raises(ValueError, match="base64"):
            load_image("data:image/png;base64,%%%")
