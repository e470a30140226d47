"""Floats from 0 to 1 and pictures of 8 bits, with the settings that image processors take."""

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from lorgnette import LorgnetteCollator, LorgnetteProcessor


EIGHT_BITS = np.asarray(tiny.picture(0, 32, 32))
FLOATS = (EIGHT_BITS / 255).astype(np.float32)
SETTINGS = [
    {},
    {"do_rescale": False},
    {"rescale_factor": 1.0},
    {"do_resize": False},
    {"do_normalize": False},
    {"do_rescale": False, "do_normalize": False},
    {"do_rescale": False, "do_resize": False},
]
KINDS = {
    "array": FLOATS,
    "array, channels first": FLOATS.transpose(2, 0, 1),
    "float64": FLOATS.astype(np.float64),
    "tensor": torch.tensor(FLOATS).permute(2, 0, 1),
    "tensor, channels last": torch.tensor(FLOATS),
}


def processor_with(**settings) -> LorgnetteProcessor:
    parts = ViTImageProcessorPil(size={"height": 32, "width": 32}, **settings)
    return LorgnetteProcessor(parts, tiny.chat_tokenizer(), num_query_tokens=4)


def features(processor: LorgnetteProcessor, image, **settings) -> torch.Tensor:
    return processor(images=image, return_tensors="pt", **settings)["pixel_values"].float()


def wanted(settings: dict) -> torch.Tensor:
    """What the picture's features are with these settings, but for rescaling, which the values decide."""
    kept = {name: value for name, value in settings.items() if name in ("do_resize", "do_normalize")}
    return tiny.image_processor()([EIGHT_BITS], return_tensors="pt", **kept)["pixel_values"].float()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("where", ["keywords", "images_kwargs", "image processor"])
@pytest.mark.parametrize("kind", KINDS)
def test_floats_are_rescaled_once(kind, where, settings):
    if where == "image processor":
        found = features(processor_with(**settings), KINDS[kind])
    else:
        found = features(
            processor_with(), KINDS[kind], **({"images_kwargs": settings} if where != "keywords" else settings)
        )
    torch.testing.assert_close(found, wanted(settings), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "image",
    [EIGHT_BITS, torch.tensor(EIGHT_BITS).permute(2, 0, 1), Image.fromarray(EIGHT_BITS), EIGHT_BITS.astype(np.int64)],
    ids=["array", "tensor", "PIL", "int64"],
)
def test_8_bits_are_not_taken_for_floats(image):
    plain = processor_with()
    for settings in ({"do_rescale": False}, {"rescale_factor": 1.0}, {"do_rescale": False, "do_normalize": False}):
        with pytest.raises(ValueError, match=r"image 0: .*8-bit values run from 0 to 255 .*0\.5"):
            features(plain, image, **settings)
    with pytest.raises(ValueError, match="image 0: do_rescale is False"):
        features(processor_with(do_rescale=False), image)
    torch.testing.assert_close(features(processor_with(do_rescale=False), image, do_rescale=True), wanted({}))
    torch.testing.assert_close(features(plain, image, do_normalize=False), wanted({"do_normalize": False}))


def test_means_of_8_bit_values_take_pictures_as_they_are():
    scaled = processor_with(do_rescale=False, image_mean=[127.5] * 3, image_std=[127.5] * 3)
    for image in (EIGHT_BITS, FLOATS, Image.fromarray(EIGHT_BITS)):
        torch.testing.assert_close(features(scaled, image), wanted({}), atol=1e-5, rtol=0)


def test_a_vit_that_takes_values_as_they_come():
    raw = processor_with(do_rescale=False, do_normalize=False)
    assert features(raw, EIGHT_BITS).max() == 255
    assert features(raw, FLOATS).max() == 1
    with pytest.raises(ValueError, match="image 1: do_rescale is False"):
        raw(images=[FLOATS, EIGHT_BITS], text=["<image>", "<image>"], return_tensors="pt")


@pytest.mark.parametrize("settings", [{}, {"do_rescale": False}, {"do_normalize": False}], ids=str)
@pytest.mark.parametrize(
    ("values", "numbers"), [(FLOATS * 255, "0 to 255"), (FLOATS * 2 - 1, "-1 to 1")], ids=["0 to 255", "normalised"]
)
def test_floats_outside_0_to_1_are_refused_with_their_range(values, numbers, settings):
    for image in (values, torch.tensor(values)):
        with pytest.raises(ValueError, match=rf"its values of float\d\d run from {numbers}; floats from 0 to 1"):
            features(processor_with(), image, **settings)


def test_batches_know_floats_too():
    half = processor_with(do_rescale=False)
    rows = [{"image": FLOATS, "text": "a cat"}, {"image": torch.tensor(FLOATS), "text": "a dog"}]
    batch = LorgnetteCollator(half)(rows)
    torch.testing.assert_close(batch["pixel_values"], wanted({}).repeat(2, 1, 1, 1), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="image 1: do_rescale is False"):
        LorgnetteCollator(half)([rows[0], {"image": tiny.picture(1), "text": "a cat"}])
    seed = {"augmentation_seed": [0, 0, 0]}
    assert LorgnetteCollator(half)([rows[0] | seed])["pixel_values"].abs().max() <= 1
    loaded_twice = half.load_image(half.load_image(FLOATS))  # as the pipeline does
    torch.testing.assert_close(features(half, loaded_twice), wanted({}), atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------ layouts


def test_the_layout_that_the_caller_tells_is_the_one_that_is_read():
    narrow = np.asarray(tiny.picture(0, width=3, height=30))  # (30, 3, 3): either layout fits its transpose
    plain, kwargs = processor_with(), {"input_data_format": "channels_first"}
    expected = features(plain, Image.fromarray(narrow))
    first = narrow.transpose(2, 0, 1)  # (3, 30, 3)
    for image in (first, torch.tensor(first)):
        torch.testing.assert_close(features(plain, image, **kwargs), expected)
    last = narrow.transpose(1, 0, 2)  # (3, 30, 3) too
    expected = features(plain, Image.fromarray(np.ascontiguousarray(last)))
    for image in (last, torch.tensor(np.ascontiguousarray(last))):
        torch.testing.assert_close(features(plain, image, input_data_format="channels_last"), expected)
    torch.testing.assert_close(features(plain, Image.fromarray(EIGHT_BITS), **kwargs), wanted({}))
    with pytest.raises(ValueError, match=r"image 0: input_data_format is 'channels_first'; .*\(32, 32, 3\)"):
        features(plain, EIGHT_BITS, **kwargs)
    with pytest.raises(ValueError, match=r"image 0: input_data_format is 'first'; .* takes channels_last"):
        features(plain, EIGHT_BITS, input_data_format="first")
