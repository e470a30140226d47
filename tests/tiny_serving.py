"""A tiny model with two bridges, a worker that serves it on the loopback device, and a host with pictures."""

import base64
import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import httpx2
import torch
import uvicorn
from PIL import Image
from starlette.types import ASGIApp
from tiny import chat_tokenizer, image_processor, picture
from tiny_forms import stirred
from tiny_models import NUM_QUERY_TOKENS, QFORMER, language_model, vision_model

from lorgnette import LorgnetteForConditionalGeneration, LorgnetteProcessor
from lorgnette.serving.allowed_hosts import AllowedHosts
from lorgnette.serving.engine import InferenceEngine, Limits
from lorgnette.serving.worker import build_app


BRIDGES = ("one", "two")
MAX_NEW_TOKENS = 8


def save_bridges(folder: Path) -> None:
    """Two models over the same ViT and LM, whose Q-Formers and LoRA differ, in `folder/one` and `folder/two`."""
    tokenizer = chat_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for seed, name in enumerate(BRIDGES):
        processor = LorgnetteProcessor.from_backbones(
            image_processor(), tokenizer, num_query_tokens=NUM_QUERY_TOKENS, system_prompt=f"You are {name}."
        )
        vision, text = vision_model(), language_model(vocab_size=len(tokenizer), **ids)
        torch.manual_seed(seed)
        model = LorgnetteForConditionalGeneration.from_backbones(
            vision, text, processor=processor, lora={"r": 2}, qformer_config=dict(QFORMER)
        )
        stirred(model).save_pretrained(folder / name)
        processor.save_pretrained(folder / name)


def save_merged(source: Path, folder: Path) -> None:
    """One of them again, with LoRA merged into the language model."""
    LorgnetteForConditionalGeneration.from_pretrained(source).save_pretrained(folder, save_format="merged")
    LorgnetteProcessor.from_pretrained(source).save_pretrained(folder)


def load(folder: Path, **limits) -> InferenceEngine:
    """Both bridges in one model; pictures may come from 127.0.0.1, and no other name of this machine."""
    chosen = Limits(**{"max_new_tokens": MAX_NEW_TOKENS} | limits)
    hosts = AllowedHosts(internal=["127.0.0.1"])
    bridges = {"two": folder / "two"}
    return InferenceEngine.load(folder / "one", bridges, name="one", device="cpu", limits=chosen, hosts=hosts)


@contextmanager
def serving(engine: InferenceEngine, api_key: str | None = None) -> Iterator[tuple[str, uvicorn.Server]]:
    """A worker as `lorgnette serve` runs it, in a thread; its URL."""
    with serving_app(build_app(engine, api_key)) as started:
        yield started


@contextmanager
def serving_app(app: ASGIApp) -> Iterator[tuple[str, uvicorn.Server]]:
    config = uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=20)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def blocked(engine: InferenceEngine) -> Iterator[tuple[threading.Event, threading.Semaphore]]:
    """Block `generate` until the event is set; yields the event, and a semaphore that counts started batches."""
    go, began, generate = threading.Event(), threading.Semaphore(0), engine.batcher.model.generate

    def wait_and_generate(*args, **kwargs):
        began.release()
        assert go.wait(60)
        return generate(*args, **kwargs)

    engine.batcher.model.generate = wait_and_generate
    try:
        yield go, began
    finally:
        go.set()


def wait_for(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def metric(worker: str, line: str) -> float:
    """The sum of what `/metrics` says in lines that begin so."""
    text = httpx2.get(f"{worker}/metrics", timeout=60).text
    return sum(float(found.split()[-1]) for found in text.splitlines() if found.startswith(line))


def png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def data_url(seed: int = 0) -> str:
    return "data:image/png;base64," + base64.b64encode(png(picture(seed))).decode()


class PictureHandler(BaseHTTPRequestHandler):
    """`/picture/SEED`; `/huge`, of 100 megapixels; `/page`; `/slow`, which drips; `/to?URL`, a redirect."""

    huge = png(Image.new("1", (10_000, 10_000)))

    def do_GET(self):
        path, _, target = self.path.partition("?")
        name, _, seed = path.strip("/").partition("/")
        bodies = {"huge": self.huge, "page": b"<!DOCTYPE html><title>Not here</title>", "slow": b"", "to": b""}
        if name not in {*bodies, "picture"}:
            self.send_error(404)
            return
        body = png(picture(int(seed))) if name == "picture" else bodies[name]
        with contextlib.suppress(ConnectionError):
            self.send_response(302 if name == "to" else 200)
            self.send_header("Content-Length", str(10**6 if name == "slow" else len(body)))
            if name == "to":
                self.send_header("Location", target)
            self.end_headers()
            self.wfile.write(body)
            while name == "slow":
                self.wfile.write(b"x")
                time.sleep(0.05)

    def log_message(self, *_):
        pass


class _Host(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128


@contextmanager
def picture_host() -> Iterator[str]:
    """Its URL."""
    server = _Host(("127.0.0.1", 0), PictureHandler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
