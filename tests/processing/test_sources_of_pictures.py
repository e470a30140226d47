"""Base64 by itself as a picture, errors that do not repeat what they were given, and collections for `retrieve`."""

import base64
import io
from pathlib import Path

import numpy as np
import pandas
import pytest
import tiny
import torch
from tiny_retrieval import CAPTIONS, processor, retriever

from lorgnette import LorgnetteProcessor
from lorgnette.processing.image_loading import load_image
from lorgnette.processing.prompt_encoding import parts_of


def encoded(kind: str, size: int = 40) -> str:
    file = io.BytesIO()
    tiny.picture(0, size, size).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_base64_is_read(kind):
    expected = load_image(base64.b64decode(encoded(kind)))
    lines = "\n".join(encoded(kind)[start : start + 76] for start in range(0, len(encoded(kind)), 76))
    for text in (encoded(kind), lines, f"data:image/any;base64,{encoded(kind)}"):
        assert np.array_equal(load_image(text), expected)
    large = encoded(kind, 300)  # longer than any path
    assert load_image(large).size == (300, 300)
    assert load_image({"path": large}).size == (300, 300)


WRITTEN = {
    "lines": lambda text: "\n".join(text[at : at + 76] for at in range(0, len(text), 76)),
    "lines of Windows": lambda text: "\r\n".join(text[at : at + 76] for at in range(0, len(text), 76)),
    "percent-encoded": lambda text: text.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"),
    "without padding": lambda text: text.rstrip("="),
    "for URLs": lambda text: text.replace("+", "-").replace("/", "_"),
}


@pytest.mark.parametrize("how", WRITTEN)
def test_base64_is_read_however_it_is_written(how):
    text = encoded("PNG", 41)
    expected = load_image(base64.b64decode(text))
    written = WRITTEN[how](text)
    for source in (written, f"data:image/png;base64,{written}", f"DATA:image/png;BASE64,{written}"):
        assert np.array_equal(load_image(source), expected)
    part = parts_of({"role": "user", "content": [{"type": "image", "base64": written}]})[0]
    assert np.array_equal(load_image(part["image"]), expected)


def test_a_file_is_a_file_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.picture(1, 8, 8).save("catscatscatscats", "PNG")
    assert load_image("catscatscatscats").size == (8, 8)
    with pytest.raises(FileNotFoundError, match=r"no such file: dogsdogs$"):
        load_image("dogsdogs")
    with pytest.raises(FileNotFoundError, match=rf"no such file: {'dogs' * 20}$"):  # base64, and no picture
        load_image("dogs" * 20)


LONG = base64.b64encode(b"no picture at all" * 10_000).decode()


@pytest.mark.parametrize(
    "source",
    [
        LONG,
        Path(LONG),
        LONG + "?",
        f"data:image/png;base64,{LONG}",
        f"data:image/png;base64,{LONG}?",
        f"http://localhost:1/{LONG}",
        f"http://localhost:1/{LONG} \x01",
        f"http://[{LONG}",
        {"path": LONG},
        {"path": LONG, "bytes": b"nothing"},
        dict.fromkeys(map(str, range(50_000))),
        LONG.encode(),
        encoded("PNG", 300)[:150_000],
        "\0" + LONG,
    ],
    ids=lambda value: str(value)[:30].replace("\0", "0"),
)
def test_errors_do_not_repeat_what_they_were_given(source):
    with pytest.raises((OSError, ValueError, TypeError)) as caught:
        load_image(source, timeout=5)
    assert 10 < len(str(caught.value)) < 1000


def test_errors_about_words_do_not_repeat_them():
    made = LorgnetteProcessor(tiny.image_processor(), tiny.gemma_like_tokenizer(), num_query_tokens=4)
    words = "word " * 50_000
    for call in (
        lambda: made.build_prompt(system=words),
        lambda: made.apply_chat_template([{"role": "system", "content": "a"}, {"role": words, "content": "a"}]),
        lambda: made.apply_chat_template([{"role": "user", "content": [{"type": words}]}]),
        lambda: made.apply_chat_template([words]),
        lambda: made(images=[tiny.picture()], text=[words]),
    ):
        with pytest.raises((ValueError, TypeError)) as caught:
            call()
        assert len(str(caught.value)) < 1000


# ------------------------------------------------------------------------------------------------ retrieve


def test_iterators_are_read():
    model, pictures = retriever(), [tiny.picture(n) for n in range(3)]
    expected = model.retrieve(pictures, CAPTIONS, rerank=2)
    for images in (
        iter(pictures),
        (picture for picture in pictures),
        map(np.asarray, pictures),
        tuple(pictures),
        np.stack([np.asarray(picture) for picture in pictures]),
        pandas.Series(pictures, index=[7, 8, 9]),
    ):
        assert torch.equal(model.retrieve(images, CAPTIONS, rerank=2), expected)
    for texts in (
        iter(CAPTIONS),
        (text for text in CAPTIONS),
        dict(enumerate(CAPTIONS)).values(),
        np.array(CAPTIONS),
        pandas.Series(CAPTIONS, index=[9, 8, 7, 6]),
    ):
        assert torch.equal(model.retrieve(pictures, texts, rerank=2), expected)
    both = model.retrieve((picture for picture in pictures), (text for text in CAPTIONS), rerank=2)
    assert torch.equal(both, expected)


def test_what_is_no_collection_is_refused_by_its_type():
    model, pictures = retriever(), [tiny.picture(n) for n in range(2)]
    for images, kind in ((pictures[0], "Image"), (3, "int"), (None, "NoneType"), ({"a": pictures[0]}, "dict")):
        with pytest.raises(TypeError, match=f"images is a {kind}; a list is needed"):
            model.retrieve(images, CAPTIONS)
    for texts, kind in ((b"a cat", "bytes"), (3, "int"), (None, "NoneType"), ({"a": "a cat"}, "dict")):
        with pytest.raises(TypeError, match=f"texts is a {kind}; a list is needed"):
            model.retrieve(pictures, texts)
    with pytest.raises(TypeError, match=r"texts is one string \('x{100}'\); a list is needed"):
        model.retrieve(pictures, "x" * 100_000)
    for given in (((), CAPTIONS), (pictures, iter(()))):
        with pytest.raises(ValueError, match="there is nothing to compare"):
            model.retrieve(*given)
    assert processor().is_stage1
