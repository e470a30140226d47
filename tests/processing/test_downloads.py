"""Pictures from the web: what comes in time and in size is one, and a redirect leads nowhere but to the web."""

import asyncio
import time

import numpy as np
import pytest
import tiny
from picture_server import PNG
from tiny_models import NUM_QUERY_TOKENS, QFORMER, language_model, vision_model

from lorgnette import LorgnetteForConditionalGeneration, LorgnetteImageToTextPipeline, LorgnetteProcessor
from lorgnette.processing import image_loading
from lorgnette.processing.image_loading import load_image


def test_a_picture(server):
    for url in (
        f"{server}/picture",
        f"HTTP{server[4:]}/picture",
        f"{server}/to?/picture",
        f"{server}/to?{server}/to?/picture",
    ):
        np.testing.assert_array_equal(load_image(url), tiny.picture())


@pytest.mark.parametrize(
    ("path", "kind", "cause"),
    [
        ("gone", OSError, "404"),
        ("page", ValueError, r" \(text/html\) is no picture"),
        ("drip", OSError, "not complete after 1 s"),
        ("headers_that_drip", OSError, "not complete after 1 s"),
        ("slowly_to?/slowly_to?/slowly_to?/slowly_to?/slowly_to?/picture", OSError, "not complete after 1 s"),
    ],
)
def test_no_picture_in_time(server, path, kind, cause):
    """A server that never ends its answer is left; the test would not end otherwise."""
    processor = LorgnetteProcessor(tiny.image_processor(), tiny.chat_tokenizer())
    slow = "1 s" in cause
    start = time.monotonic()
    with pytest.raises(kind, match=rf"image 0: .*{path.partition('?')[0]}.*{cause}"):
        processor(images=f"{server}/{path}", timeout=1 if slow else 20)
    assert time.monotonic() - start < 15


@pytest.mark.parametrize("scheme", ["ftp", "file", "data", "gopher", "javascript"])
def test_redirects_to_other_schemes(server, visitors, tmp_path, scheme):
    port, recorded = visitors
    (tmp_path / "secret.png").write_bytes(PNG)
    target = {
        "ftp": f"ftp://127.0.0.1:{port}/picture.png",
        "file": f"file://{tmp_path}/secret.png",
        "gopher": f"gopher://127.0.0.1:{port}/picture.png",
    }.get(scheme, f"{scheme}:picture")
    with pytest.raises(OSError, match=f"cannot fetch {server}/to.*{scheme}"):
        load_image(f"{server}/to?{target}", timeout=10)
    assert recorded == []


def test_redirects_in_a_circle(server):
    with pytest.raises(OSError, match="cannot fetch"):
        load_image(f"{server}/to?/to?/to?/to?/to?/to?/to?/to?/to?/to?/to?/to?/picture")


@pytest.mark.parametrize("path", ["picture", "to?/picture"])
def test_huge_answers(server, monkeypatch, path):
    """What a page sends that redirects is not read."""
    monkeypatch.setattr(image_loading, "DOWNLOAD_BYTES", 100)
    with pytest.raises(OSError, match="larger than 100 bytes"):
        load_image(f"{server}/{path}")


def test_a_pipeline_fetches_within_the_same_limits(server, visitors, monkeypatch):
    processor = LorgnetteProcessor(tiny.image_processor(), tiny.chat_tokenizer(), num_query_tokens=NUM_QUERY_TOKENS)
    words = language_model(vocab_size=len(processor.tokenizer))
    model = LorgnetteForConditionalGeneration.from_backbones(
        vision_model(), words, processor=processor, qformer_config=QFORMER
    )
    pipe = LorgnetteImageToTextPipeline(model=model.eval(), processor=processor, device="cpu")
    port, recorded = visitors
    settings = {"max_new_tokens": 2, "generate_kwargs": {"do_sample": False}}
    assert pipe(f"{server}/picture", **settings) == pipe(tiny.picture(), **settings)
    with pytest.raises(OSError, match=r"the image: cannot fetch .*ftp"):
        pipe(f"{server}/to?ftp://127.0.0.1:{port}/picture.png")
    assert recorded == []
    start = time.monotonic()
    with pytest.raises(OSError, match="not complete after 1 s"):
        pipe(f"{server}/drip", timeout=1)
    monkeypatch.setattr(image_loading, "DOWNLOAD_SECONDS", 0.5)
    with pytest.raises(OSError, match=r"not complete after 0\.5 s"):
        pipe(f"{server}/drip")
    assert time.monotonic() - start < 15
    monkeypatch.setattr(image_loading, "DOWNLOAD_BYTES", 100)
    with pytest.raises(OSError, match="larger than 100 bytes"):
        pipe(f"{server}/picture", timeout=10)


def test_hosts_that_are_not_there():
    with pytest.raises(OSError, match="cannot fetch http://127"):
        load_image("http://127.0.0.1:9/cat.png")
    with pytest.raises(OSError, match="cannot fetch"):
        load_image("http://bad host/cat.png")


def test_other_schemes_are_no_urls():
    for source in ("ftp://127.0.0.1/cat.png", "file:///etc/hostname"):
        with pytest.raises(FileNotFoundError, match="no such file"):
            load_image(source)


def test_the_body_of_a_redirect_is_not_read(server):
    np.testing.assert_array_equal(load_image(f"{server}/endlessly_to?/picture", timeout=10), tiny.picture())


def test_letters_and_spaces_in_a_url_are_sent_as_browsers_send_them(server):
    name, sent = image_loading.download(f"{server}/path_that_was_asked_for?größe=1 2%20&x=a#part")
    assert sent == b"/path_that_was_asked_for?gr%C3%B6%C3%9Fe=1%202%20&x=a"
    assert "größe" in name


def test_where_an_event_loop_runs(server):
    """As in a notebook, or in a web application."""

    async def load():
        return load_image(f"{server}/picture")

    np.testing.assert_array_equal(asyncio.run(load()), tiny.picture())
