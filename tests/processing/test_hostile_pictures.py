"""Files made to start programs, or to fill memory: refused before anything is decoded."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import tiny
import torch
from PIL import Image, ImageFile
from tiny_models import NUM_QUERY_TOKENS, QFORMER, language_model, vision_model
from transformers import CLIPImageProcessor, Siglip2ImageProcessor, ViTImageProcessor

from lorgnette import (
    LorgnetteCollator,
    LorgnetteForConditionalGeneration,
    LorgnetteImageToTextPipeline,
    LorgnetteProcessor,
)
from lorgnette.assembly.picture_sizes import check_image_processor
from lorgnette.processing.image_loading import FORMATS, MAX_IMAGE_PIXELS, load_image


def encoded(image, kind, **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width, height, size=None):
    """A grey PNG of `width` x `height` zeros that says it is of another `size`."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *(size or (width, height)), 8, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes((width + 1) * height), 1))
    return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")


def iptc(inner):
    """10 x 10 pixels, as it says, and a picture of any format and size inside."""

    def field(record, tag, data):
        return bytes([0x1C, record, tag]) + struct.pack(">H", len(data)) + data

    fields = [(60, b"\x01\x00"), (20, b"\x00\x0a"), (30, b"\x00\x0a"), (120, b"\x05")]
    parts = [inner[start : start + 30000] for start in range(0, len(inner), 30000)]
    return (
        b"".join(field(3, tag, data) for tag, data in fields)
        + b"".join(field(8, 10, part) for part in parts)
        + bytes(5)
    )


def ico(inner):
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inner), 22) + inner


def dds(width, height):
    header = struct.pack("<4s6I", b"DDS ", 124, 0x1007, height, width, 0, 0) + bytes(48)
    return header + struct.pack("<II4s5I", 32, 0x40, bytes(4), 24, 0xFF0000, 0xFF00, 0xFF, 0) + bytes(20)


def qoi(width, height):
    return b"qoif" + struct.pack(">IIBB", width, height, 3, 0) + b"\xfd" * (width * height // 62 + 1)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) print\n%%EOF\n"
# format -> a file of it that Pillow by itself reads
OTHERS = {
    "EPS": EPS,
    "IPTC": iptc(encoded(tiny.picture(), "PNG")),
    "ICO": ico(encoded(tiny.picture(), "PNG")),
    "DDS": dds(4, 4),
    "QOI": qoi(4, 4),
    "TGA": encoded(tiny.picture(), "TGA"),
    "ICNS": encoded(tiny.picture(), "ICNS"),
}


@pytest.fixture
def decoded(monkeypatch):
    """The sizes of the pictures that are decoded, once they are looked at."""
    recorded, load = [], ImageFile.ImageFile.load

    def watched(self):
        recorded.append(self.size)
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", watched)
    return recorded


@pytest.mark.parametrize("kind", OTHERS)
def test_other_formats_are_not_even_opened(kind, tmp_path, monkeypatch):
    with Image.open(BytesIO(OTHERS[kind])) as image:
        assert image.format == kind
    path = tmp_path / "cat.png"
    path.write_bytes(OTHERS[kind])
    opened, factories = [], dict(Image.OPEN)
    monkeypatch.setitem(Image.OPEN, kind, (lambda *_: opened.append(kind), factories[kind][1]))
    monkeypatch.setattr("subprocess.check_call", lambda *args, **_: opened.append(args))
    for source in (OTHERS[kind], path, {"bytes": OTHERS[kind], "path": None}):
        with pytest.raises(ValueError, match=r"is no picture that is read here \(AVIF, BMP, "):
            load_image(source)
    assert opened == []


def test_the_formats_are_those_that_are_said():
    Image.init()
    written = [kind for kind in FORMATS if kind in Image.SAVE]
    assert {"BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"} <= set(written)
    for kind in written:
        assert load_image(encoded(tiny.picture(), kind)).size == (40, 30)
    several = encoded(tiny.picture(), "MPO", save_all=True, append_images=[tiny.picture(1)])
    assert load_image(several).size == (40, 30), "JPEGs of several pictures, as telephones make them, begin as JPEGs do"


@pytest.mark.parametrize("size", [(30000, 30000), (2**31 - 1, 1), (1, MAX_IMAGE_PIXELS + 1), (7072, 7072)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("pillows", ["as it is", None])
def test_the_limit_is_looked_at_first_and_is_not_pillows(size, pillows, decoded, monkeypatch):
    """Whoever switches Pillow's guard off for a program of his own has not switched this one off."""
    if pillows is None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    guards = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    with pytest.raises(ValueError, match=r"pixels"):
        load_image(png(4, 4, size))
    assert decoded == []
    assert guards == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


def test_a_tile_larger_than_its_picture(decoded):
    entries = [
        (256, 16),
        (257, 16),
        (258, 8),
        (259, 8),
        (262, 1),
        (277, 1),
        (322, 13008),
        (323, 13008),
        (324, 8),
        (325, 8),
    ]
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    with pytest.raises(ValueError, match="13008 x 13008 pixels are more than the 50000000 that are allowed"):
        load_image(b"II*\0" + struct.pack("<IH", 8, len(entries)) + tags + bytes(16))
    assert decoded == []


def test_only_the_first_frame_is_decoded():
    frames = [Image.new("L", (64, 64), shade) for shade in range(200)]
    recorded = []
    for kind in ("GIF", "PNG", "TIFF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        with Image.open(BytesIO(data)) as image:
            assert image.n_frames == len(frames)
            seek = type(image).seek
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                type(image), "seek", lambda self, frame, seek=seek: (recorded.append(frame), seek(self, frame))[1]
            )
            assert load_image(data).getpixel((0, 0)) == (0, 0, 0)
    assert set(recorded) <= {0}


def test_a_processor_has_a_limit_of_its_own(tmp_path):
    """In all that goes through it; and Pillow's own guard is heeded too, where it is the lower one."""
    plain = LorgnetteProcessor(tiny.image_processor(), tiny.chat_tokenizer(), num_query_tokens=NUM_QUERY_TOKENS)
    model = LorgnetteForConditionalGeneration.from_backbones(
        vision_model(), language_model(vocab_size=len(plain.tokenizer)), processor=plain, qformer_config=QFORMER
    )
    picture, width, height = tiny.picture(), *tiny.picture().size
    for limit in (width * height, width * height - 1):
        processor = LorgnetteProcessor(
            tiny.image_processor(), tiny.chat_tokenizer(), num_query_tokens=NUM_QUERY_TOKENS, max_image_pixels=limit
        )
        processor.save_pretrained(tmp_path)
        again = LorgnetteProcessor.from_pretrained(tmp_path)
        assert again.max_image_pixels == limit
        assert LorgnetteProcessor.from_pretrained(tmp_path, max_image_pixels=7).max_image_pixels == 7
        pipe = LorgnetteImageToTextPipeline(model=model, processor=again, device="cpu")
        ways = {
            "image 0": lambda image, again=again: again(images=image),
            "row 0 of the batch": lambda image, again=again: LorgnetteCollator(again)([{"image": image, "text": "a"}]),
            "the image": lambda image, pipe=pipe: pipe(image, max_new_tokens=1),
        }
        pixels = np.asarray(picture)
        for source in (encoded(picture, "PNG"), picture, pixels, torch.tensor(pixels)):
            for where, way in ways.items():
                if limit == width * height:
                    assert way(source)
                    continue
                with pytest.raises(ValueError, match=rf"{where}: .*40 x 30 pixels are more than the {limit} that"):
                    way(source)
    for spoilt in (0, -1, "7", 1.5, None):
        with pytest.raises(
            ValueError, match=f"max_image_pixels is {spoilt!r}; it has to be a whole number of at least 1"
        ):
            LorgnetteProcessor(tiny.image_processor(), tiny.chat_tokenizer(), max_image_pixels=spoilt)
    other = LorgnetteProcessor(tiny.image_processor(), tiny.chat_tokenizer(), num_query_tokens=5)
    with pytest.raises(ValueError, match="num_query_tokens is 4, the processor's 5"):
        LorgnetteImageToTextPipeline(model=model, processor=other, device="cpu")


@pytest.mark.parametrize(
    ("image_processor", "cause"),
    [
        (ViTImageProcessor(size={"height": 20000, "width": 20000}), "by its size"),
        (CLIPImageProcessor(size={"shortest_edge": 10**5}), "by its size's shortest_edge"),
        (CLIPImageProcessor(size={"shortest_edge": 10**5, "longest_edge": 10**6}), "by its size's shortest_edge"),
        (CLIPImageProcessor(size={"longest_edge": 10**5}), "by its size's longest_edge"),
        (CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=20000), "by its crop_size"),
        (Siglip2ImageProcessor(patch_size=16, max_num_patches=10**9), "in 1000000000 patches of 16 x 16"),
    ],
)
def test_an_image_processor_that_would_make_a_small_picture_huge(image_processor, cause):
    """Settings of somebody else's folder: refused before any picture is read."""
    processor = LorgnetteProcessor(image_processor, tiny.chat_tokenizer(), max_image_pixels=10**18)
    message = rf"the image processor makes \d+ x \d+ pixels of a picture, {cause}: .*the {Image.MAX_IMAGE_PIXELS} that"
    with pytest.raises(ValueError, match=message):
        LorgnetteCollator(processor)
    with pytest.raises(ValueError, match=message):
        check_image_processor(image_processor, 10**18)


def test_ordinary_image_processors_pass():
    for kind in (ViTImageProcessor(), CLIPImageProcessor(), Siglip2ImageProcessor(), tiny.image_processor()):
        check_image_processor(kind)


def test_a_narrow_picture_that_would_become_huge(monkeypatch):
    monkeypatch.setattr(LorgnetteProcessor, "encode_images", None)
    processor = LorgnetteProcessor(CLIPImageProcessor(size={"shortest_edge": 224}), tiny.chat_tokenizer())
    narrow = Image.new("1", (20_000, 5))
    with pytest.raises(ValueError, match=r"image 0: a picture of 20000 x 5 .*: 896000 x 224 pixels are more than"):
        processor(images=narrow)


def test_what_a_picture_says_of_itself_is_left_behind():
    """A broken EXIF block passes where the file is read; the picture may be given on, and is read again then."""
    broken = Image.Exif()
    broken[0x0112] = 6
    data = encoded(tiny.picture(), "JPEG", exif=b"Exif\0\0" + b"\xff" * 20, comment=b"c" * 1000)
    first = load_image(data)
    assert first.info == {}
    assert load_image(first).tobytes() == first.tobytes()
    assert load_image(load_image(encoded(tiny.picture(), "PNG", exif=broken))).size == (30, 40), (
        "turned once, not twice"
    )


def test_memory_that_runs_out_is_no_fault_of_the_picture(monkeypatch):
    def run_out(*_):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", run_out)
    for source in (encoded(tiny.picture(), "PNG"), tiny.picture()):
        with pytest.raises(MemoryError):
            load_image(source)
