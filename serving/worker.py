"""The worker's routes: what sites call, OpenAI's chat form, health and figures."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from uuid import uuid4

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from .errors import RefusedError, timed_out
from .eyes import Answer, Asking, Eyes
from .gate import Gate
from .payloads import ChatRequest, LoadRequest, Question, VisionRequest


T = TypeVar("T")


def build_app(eyes: Eyes, api_key: str | None = None) -> FastAPI:
    """The ASGI application of a worker; `eyes` are its own from now on, and stop with it.

    Args:
        api_key: what callers have to send as `Authorization: Bearer …`; None for no such thing.
    """
    limits, metrics, started = eyes.limits, eyes.metrics, int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(eyes.batcher.stop)

    app = FastAPI(title="lorgnette", lifespan=lifespan)
    app.add_middleware(
        Gate,
        api_key=api_key,
        capacity=limits.capacity,
        max_body=limits.max_body,
        timeout=limits.timeout,
        metrics=metrics,
    )
    _add_errors(app)

    @app.post("/v1/vision")
    async def vision(request: Request, body: VisionRequest) -> Response:
        """Ask something about a picture."""
        adapter = body.adapter or eyes.first
        if body.stream:
            asking = await _begin(eyes, request, body.question())

            def event(item: str | Answer) -> dict[str, Any]:
                return {"delta": item} if isinstance(item, str) else _told(item, adapter)

            return _stream(asking, event)
        return JSONResponse(_told(await _answer(eyes, request, body.question()), adapter))

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        """OpenAI's chat form, with pictures as `image_url` parts.

        The answer's `model` is the adapter that answers, whatever it was asked as: OpenAI too gives the model's own
        name to who asked for an alias.
        """
        question = body.question()
        question.adapter = eyes.adapter_of(body.model)
        common = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time.time()), "model": question.adapter}
        if question.stream:
            asking = await _begin(eyes, request, question)
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            return _stream(asking, lambda item: _chunk(item, common, with_usage))
        answer = await _answer(eyes, request, question)
        message = {"role": "assistant", "content": answer.text}
        choice = {"index": 0, "message": message, "finish_reason": answer.why, "logprobs": None}
        return JSONResponse({**common, "object": "chat.completion", "choices": [choice], "usage": answer.usage})

    kind = {"object": "model", "created": started, "owned_by": "lorgnette"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The adapters, as OpenAI lists models."""
        return {"object": "list", "data": [{"id": name, **kind} for name in eyes.processors]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One adapter, as OpenAI describes a model; 404 for a name that none has."""
        eyes.check_adapter(name)
        return {"id": name, **kind}

    @app.post("/load_model", include_in_schema=False)
    async def load_model(request: Request, body: LoadRequest) -> Response:
        """What `transformers chat` asks for first: the adapters are always loaded.

        It is asked without the key, and who has none is not told which adapters there are.
        """
        name = eyes.adapter_of(body.model) if request.scope["has_key"] else body.model[:100]
        ready = {"status": "ready", "model": name, "cached": True}
        return Response(f"data: {json.dumps(ready)}\n\n", media_type="text/event-stream")

    @app.get("/health", include_in_schema=False)  # what `transformers chat` asks on port 8000
    @app.head("/healthz", include_in_schema=False)  # what many monitors ask with
    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        """200 while questions can be answered."""
        alive = eyes.batcher.is_alive
        return JSONResponse({"status": "ok" if alive else "stopping"}, 200 if alive else 503)

    @app.get("/metrics")
    async def figures() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return app


def run(eyes: Eyes, host: str, port: int, api_key: str | None = None) -> None:
    """Serve until SIGINT or SIGTERM: then nothing new is taken, and what is under way is finished."""
    patience = int(eyes.limits.timeout) + 1
    config = uvicorn.Config(build_app(eyes, api_key), host=host, port=port, timeout_graceful_shutdown=patience)
    uvicorn.Server(config).run()


async def _begin(eyes: Eyes, request: Request, question: Question) -> Asking:
    return await _unless_gone(request, eyes, eyes.begin(question, request.scope["deadline"]))


async def _answer(eyes: Eyes, request: Request, question: Question) -> Answer:
    async def work() -> Answer:
        return await (await eyes.begin(question, request.scope["deadline"])).answer()

    return await _unless_gone(request, eyes, work())


async def _unless_gone(request: Request, eyes: Eyes, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; it is cancelled when its caller hangs up, or time is up."""

    async def hangs_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, hanging_up = asyncio.ensure_future(work), asyncio.ensure_future(hangs_up())
    try:
        left = request.scope["deadline"] - time.monotonic()
        await asyncio.wait({working, hanging_up}, timeout=max(left, 0.0), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if hanging_up.done():
            raise RefusedError(499, "gone", "the caller hung up")
        raise timed_out(eyes.limits.timeout)
    finally:
        working.cancel()
        hanging_up.cancel()


def _reason(found: Mapping[str, Any]) -> str:
    """What pydantic says, but of errors that `payloads` raises their own words alone."""
    return str(found["ctx"]["error"]) if found["type"] == "value_error" else found["msg"]


def _told(answer: Answer, adapter: str) -> dict[str, Any]:
    return {"text": answer.text, "usage": answer.usage, "adapter": adapter, "finish_reason": answer.why}


def _chunk(item: str | Answer, common: dict[str, Any], with_usage: bool) -> dict[str, Any]:
    last = isinstance(item, Answer)
    choice = {"index": 0, "delta": {} if last else {"role": "assistant", "content": item}}
    choice["finish_reason"] = item.why if last else None
    usage = {"usage": item.usage if last else None} if with_usage else {}
    return {**common, "object": "chat.completion.chunk", "choices": [choice], **usage}


def _stream(asking: Asking, event: Any) -> StreamingResponse:
    """Server-sent events; an error on the way is one too, for the status has been sent by then."""

    async def lines() -> AsyncIterator[str]:
        try:
            async for item in asking.pieces():
                yield f"data: {json.dumps(event(item))}\n\n"
        except RefusedError as refused:
            yield f"data: {json.dumps(refused.body)}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def _add_errors(app: FastAPI) -> None:
    """All errors in one form: `{"error": {"message": …, "type": …, "code": …}}`."""

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        kind = request.headers.get("content-type", "")
        if "json" not in kind.lower():  # what is not called JSON is not read as JSON
            message = f"the body's Content-Type is {kind[:100] or 'not given'}; application/json is needed"
            return JSONResponse(RefusedError(422, "invalid_request", message).body, 422)
        # without the values, which may be megabytes
        told = "; ".join(f"{'.'.join(map(str, found['loc']))}: {_reason(found)}" for found in error.errors()[:5])
        return JSONResponse(RefusedError(422, "invalid_request", told[:2000]).body, 422)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        body = RefusedError(error.status_code, "http_error", str(error.detail)).body
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, error: Exception) -> JSONResponse:
        message = f"the worker failed with {type(error).__name__}; its log says where"
        return JSONResponse(RefusedError(500, "internal_error", message).body, 500)
