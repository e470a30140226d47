"""From a parsed request to its answer: download and decode the pictures in worker threads, then generate."""

import asyncio
import functools
import os
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio.to_thread
import torch
from anyio import CapacityLimiter

from ..modeling.modeling_lorgnette import LorgnetteForConditionalGeneration
from ..processing.processing_lorgnette import LorgnetteProcessor
from .allowed_hosts import AllowedHosts
from .batching import Batcher, Request
from .errors import RefusedError, timed_out
from .loading import load
from .metrics import Metrics
from .payloads import Question
from .sampling import Sampler
from .stops import cut, sendable
from .web_images import read_web_image


@dataclass
class Limits:
    """Limits of a worker.

    Args:
        timeout: seconds for a whole request: below the 30 after which `wp_remote_post` and others disconnect.
        fetch_timeout: seconds of these for the download of a picture.
        fetch_bytes: limit on a picture's file.
        max_body: bytes of a request; base64 makes a picture a third larger.
        max_batch: requests in one batch of the model.
        capacity: requests in progress, waiting ones included.
        max_new_tokens: upper limit on a request's `max_new_tokens`, and the default.
    """

    timeout: float = 25.0
    fetch_timeout: float = 10.0
    fetch_bytes: int = 20 * 2**20
    max_body: int = 28 * 2**20
    max_batch: int = 8
    capacity: int = 64
    max_new_tokens: int = 128


@dataclass
class Answer:
    """A generated text and its token counts.

    Args:
        finish_reason: `"stop"`, or `"length"` at the token limit.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int

    @property
    def usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


class InferenceEngine:
    """A loaded model with its bridges, and the queue in front of it.

    Args:
        model: on its device; from now on only the batcher's thread uses it.
        processors: one for each adapter, by the name that callers use; the first is the model's own bridge. The others
            have the same names in the model.
        hosts: hosts that pictures may come from.

    Raises:
        ValueError: a processor that does not fit the model.
    """

    def __init__(
        self,
        model: LorgnetteForConditionalGeneration,
        processors: Mapping[str, LorgnetteProcessor],
        limits: Limits | None = None,
        hosts: AllowedHosts | None = None,
    ):
        self.processors, self.limits, self.hosts = dict(processors), limits or Limits(), hosts or AllowedHosts()
        self.metrics = Metrics()
        for processor in self.processors.values():
            model.check_processor(processor)
        self.first = next(iter(self.processors))
        self.bridges = {name: model.active_bridge if name == self.first else name for name in self.processors}
        self._is_merged = model.config.saved_form == "merged"
        self._context = model.max_text_length or self.processors[self.first].tokenizer.model_max_length
        names = {bridge: name for name, bridge in self.bridges.items()}
        self.batcher = Batcher(
            model.eval(),
            self.processors[self.first],
            self.limits.max_batch,
            lambda bridge, rows: self.metrics.rows.labels(names[bridge]).observe(rows),
        )
        self.metrics.waiting.set_function(lambda: self.batcher.waiting)
        self._fetching = CapacityLimiter(self.limits.capacity)
        self._decoding = CapacityLimiter(min(4, os.cpu_count() or 1))  # decoding a large picture takes up to 1 GB

    @classmethod
    def load(
        cls,
        model: str | Path,
        bridges: Mapping[str, str | Path],
        *,
        name: str = "default",
        revision: str | None = None,
        num_query_tokens: int | None = None,
        device: str | None = None,
        limits: Limits | None = None,
        hosts: AllowedHosts | None = None,
    ) -> "InferenceEngine":
        """An engine over what [`~lorgnette.serving.loading.load`] loads; see there for arguments and errors."""
        loaded, processors = load(
            model, bridges, name=name, revision=revision, num_query_tokens=num_query_tokens, device=device
        )
        return cls(loaded, processors, limits, hosts)

    def check_adapter(self, name: str) -> None:
        """Raise a [`RefusedError`] for an unknown adapter name."""
        if name not in self.processors:
            existing = ", ".join(self.processors)
            raise RefusedError(404, "unknown_adapter", f"there is no adapter {name[:100]!r}; there are {existing}")

    def adapter_of(self, model: str) -> str:
        """The adapter for a chat's `model`: a single adapter accepts any name, since huggingface_hub sends `dummy`.

        Raises:
            RefusedError: there are several, and none of this name.
        """
        if len(self.processors) == 1:
            return self.first
        self.check_adapter(model)
        return model

    async def begin(self, question: Question, deadline: float) -> "Generation":
        """Download, decode and encode the inputs, and queue them for the model.

        Raises:
            RefusedError: the request is invalid, or the worker cannot answer it.
        """
        name = self.first if question.adapter is None else question.adapter
        self.check_adapter(name)
        if not question.use_lora and self._is_merged:
            message = "use_lora is false, but this model was saved merged: LoRA is part of the LM"
            raise RefusedError(400, "lora_merged", message)
        limit = self.limits.max_new_tokens if question.max_new_tokens is None else question.max_new_tokens
        if limit > self.limits.max_new_tokens:
            message = f"{limit} new tokens are requested; {self.limits.max_new_tokens} are allowed"
            raise RefusedError(400, "too_many_tokens", message)
        limit = min(limit, question.at_most or limit)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                files = await asyncio.gather(*(self._fetch(url, deadline) for url in question.images))
                encode = functools.partial(self._encode, self.processors[name], question, files)
                inputs = await anyio.to_thread.run_sync(encode, abandon_on_cancel=True, limiter=self._decoding)
        except TimeoutError:
            raise timed_out(self.limits.timeout) from None
        length = inputs["input_ids"].shape[1]
        if length + limit > self._context:
            message = (
                f"prompt and pictures are {length} tokens; with {limit} new ones that is more than the {self._context} "
                "that the language model reads"
            )
            raise RefusedError(400, "prompt_too_long", message)
        generation = Generation(self, name, inputs, deadline, question.stops)
        request = Request(inputs, self.bridges[name], question.use_lora, limit, deadline, generation.on_event)
        generation.request = request
        if question.temperature > 0:
            request.sampler = Sampler(question.temperature, question.top_p, question.seed)
        if question.stops:
            request.should_stop = generation.has_stopped
        self.batcher.submit(request)
        return generation

    async def _fetch(self, url: str, deadline: float) -> bytes:
        seconds = min(self.limits.fetch_timeout, deadline - time.monotonic())

        def read() -> bytes:
            with _picture_errors():
                return read_web_image(url, seconds, self.limits.fetch_bytes, self.hosts)

        # a slow name server or host blocks its thread, not the request
        return await anyio.to_thread.run_sync(read, abandon_on_cancel=True, limiter=self._fetching)

    def _encode(self, processor: LorgnetteProcessor, question: Question, files: list[bytes]) -> dict[str, Any]:
        with _picture_errors():
            images = [processor.load_image(data) for data in files]
        try:
            if question.messages is None:
                return dict(processor(images=[images], queries=question.prompt, return_tensors="pt"))
            *before, last = question.messages
            if last["role"] == "user" and {part["type"] for part in last["content"]} == {"image"}:
                last = last | {"content": [{"type": "text", "text": processor.query}, *last["content"]]}
            return dict(
                processor.apply_chat_template(
                    [*before, last],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",
                    processor_kwargs={"images": [images] if images else None},
                )
            )
        except (ValueError, TypeError) as error:
            raise RefusedError(400, "unusable_prompt", str(error)) from error


class Generation:
    """A queued or running generation, as its caller's coroutine reads it."""

    def __init__(
        self,
        engine: InferenceEngine,
        adapter: str,
        inputs: dict[str, torch.Tensor],
        deadline: float,
        stops: Sequence[str] = (),
    ):
        self.engine, self.adapter, self.deadline, self.stops = engine, adapter, deadline, stops
        self.prompt_tokens = inputs["input_ids"].shape[1]
        self.request: Request | None = None
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue()

    def on_event(self, event: int | str | Exception) -> None:
        """Called in the model's thread with a token or the reason of the end."""
        self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    def has_stopped(self, tokens: list[int]) -> bool:
        """Whether the decoded tokens contain a stop string."""
        text = self._decode(tokens)
        return cut(text, self.stops) != text

    async def answer(self) -> Answer:
        """The whole answer. Raises [`RefusedError`] where the model fails or time is up."""
        async with aclosing(self._events()) as events:
            *tokens, reason = [event async for event in events]
        return self._answer(tokens, reason)

    async def pieces(self) -> AsyncIterator[str | Answer]:
        """The text in pieces, then the whole answer. Raises what [`answer`] does."""
        tokens, sent, reason = [], "", ""
        async with aclosing(self._events()) as events:
            async for event in events:
                if isinstance(event, str):
                    reason = event
                    break
                tokens.append(event)
                text = self._decode(tokens)
                if text.endswith("\ufffd"):  # half a character
                    continue
                text = sendable(text, self.stops).strip()
                if text.startswith(sent) and len(text) > len(sent):
                    yield text[len(sent) :]
                    sent = text
        answer = self._answer(tokens, reason)
        if answer.text.startswith(sent) and answer.text != sent:
            yield answer.text[len(sent) :]
        yield answer

    async def _events(self) -> AsyncIterator[int | str]:
        """Tokens, then the reason of the end."""
        try:
            while True:
                try:
                    async with asyncio.timeout(self.deadline - time.monotonic()):
                        event = await self._queue.get()
                except TimeoutError:
                    raise timed_out(self.engine.limits.timeout) from None
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, str):
                    return
        finally:
            self.request.is_cancelled = True

    def _decode(self, tokens: list[int]) -> str:
        return self.engine.processors[self.adapter].decode(tokens, skip_special_tokens=True)

    def _answer(self, tokens: list[int], reason: str) -> Answer:
        self.engine.metrics.tokens.labels(self.adapter).inc(len(tokens))
        text = cut(self._decode(tokens), self.stops).strip()
        return Answer(text, reason, self.prompt_tokens, len(tokens))


@contextmanager
def _picture_errors() -> Iterator[None]:
    """Turn errors of a picture or its host into a [`RefusedError`]."""
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        status, code = next(response for kind, response in _PICTURE_ERRORS.items() if isinstance(error, kind))
        raise RefusedError(status, code, str(error)) from error


_PICTURE_ERRORS = {
    PermissionError: (400, "image_refused"),
    TimeoutError: (504, "image_timeout"),
    OSError: (502, "image_unreachable"),
    Exception: (422, "no_picture"),
}
