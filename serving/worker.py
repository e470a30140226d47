"""The worker's routes: `/v1/vision`, OpenAI's chat completions, health and metrics."""

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

from .engine import Answer, Generation, InferenceEngine
from .errors import RefusedError, timed_out
from .middleware import RequestLimits
from .payloads import ChatRequest, LoadRequest, Question, VisionRequest


T = TypeVar("T")


def build_app(engine: InferenceEngine, api_key: str | None = None) -> FastAPI:
    """The ASGI application of a worker; it owns `engine` and stops it at shutdown.

    Args:
        api_key: the key that callers send as `Authorization: Bearer …`; None requires no key.
    """
    limits, metrics, created = engine.limits, engine.metrics, int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.batcher.stop)

    app = FastAPI(title="lorgnette", lifespan=lifespan)
    app.add_middleware(
        RequestLimits,
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
        adapter = body.adapter or engine.first
        if body.stream:
            generation = await _begin(engine, request, body.question())

            def event(item: str | Answer) -> dict[str, Any]:
                return {"delta": item} if isinstance(item, str) else _vision_body(item, adapter)

            return _stream(generation, event)
        return JSONResponse(_vision_body(await _answer(engine, request, body.question()), adapter))

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        """OpenAI's chat completions, with pictures as `image_url` parts.

        The answer's `model` is the adapter's own name, whatever name the request used: OpenAI, too, resolves aliases.
        """
        question = body.question()
        question.adapter = engine.adapter_of(body.model)
        common = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time.time()), "model": question.adapter}
        if question.stream:
            generation = await _begin(engine, request, question)
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            return _stream(generation, lambda item: _chunk(item, common, with_usage))
        answer = await _answer(engine, request, question)
        message = {"role": "assistant", "content": answer.text}
        choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason, "logprobs": None}
        return JSONResponse({**common, "object": "chat.completion", "choices": [choice], "usage": answer.usage})

    kind = {"object": "model", "created": created, "owned_by": "lorgnette"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The adapters, as OpenAI lists models."""
        return {"object": "list", "data": [{"id": name, **kind} for name in engine.processors]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One adapter, as OpenAI describes a model; 404 for a name that none has."""
        engine.check_adapter(name)
        return {"id": name, **kind}

    @app.post("/load_model", include_in_schema=False)
    async def load_model(request: Request, body: LoadRequest) -> Response:
        """`transformers chat` calls this first; the adapters are always loaded.

        It sends no key here. Without a key the answer does not reveal the adapters' names.
        """
        name = engine.adapter_of(body.model) if request.scope["has_key"] else body.model[:100]
        ready = {"status": "ready", "model": name, "cached": True}
        return Response(f"data: {json.dumps(ready)}\n\n", media_type="text/event-stream")

    @app.get("/health", include_in_schema=False)  # `transformers chat` calls it on port 8000
    @app.head("/healthz", include_in_schema=False)  # many monitors use HEAD
    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        """200 while the worker accepts requests."""
        alive = engine.batcher.is_alive
        return JSONResponse({"status": "ok" if alive else "stopping"}, 200 if alive else 503)

    @app.get("/metrics")
    async def figures() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return app


def run(engine: InferenceEngine, host: str, port: int, api_key: str | None = None) -> None:
    """Serve until SIGINT or SIGTERM; then refuse new requests and finish the running ones."""
    shutdown_s = int(engine.limits.timeout) + 1
    config = uvicorn.Config(build_app(engine, api_key), host=host, port=port, timeout_graceful_shutdown=shutdown_s)
    uvicorn.Server(config).run()


async def _begin(engine: InferenceEngine, request: Request, question: Question) -> Generation:
    return await _unless_disconnected(request, engine, engine.begin(question, request.scope["deadline"]))


async def _answer(engine: InferenceEngine, request: Request, question: Question) -> Answer:
    async def work() -> Answer:
        return await (await engine.begin(question, request.scope["deadline"])).answer()

    return await _unless_disconnected(request, engine, work())


async def _unless_disconnected(request: Request, engine: InferenceEngine, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; it is cancelled when the caller disconnects or the deadline passes."""

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
        raise timed_out(engine.limits.timeout)
    finally:
        working.cancel()
        hanging_up.cancel()


def _reason(found: Mapping[str, Any]) -> str:
    """pydantic's message; for errors that `payloads` raises, their message alone."""
    return str(found["ctx"]["error"]) if found["type"] == "value_error" else found["msg"]


def _vision_body(answer: Answer, adapter: str) -> dict[str, Any]:
    return {"text": answer.text, "usage": answer.usage, "adapter": adapter, "finish_reason": answer.finish_reason}


def _chunk(item: str | Answer, common: dict[str, Any], with_usage: bool) -> dict[str, Any]:
    last = isinstance(item, Answer)
    choice = {"index": 0, "delta": {} if last else {"role": "assistant", "content": item}}
    choice["finish_reason"] = item.finish_reason if last else None
    usage = {"usage": item.usage if last else None} if with_usage else {}
    return {**common, "object": "chat.completion.chunk", "choices": [choice], **usage}


def _stream(generation: Generation, event: Any) -> StreamingResponse:
    """Server-sent events; an error is an event too, since the status has been sent already."""

    async def lines() -> AsyncIterator[str]:
        try:
            async for item in generation.pieces():
                yield f"data: {json.dumps(event(item))}\n\n"
        except RefusedError as refused:
            yield f"data: {json.dumps(refused.body)}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def _add_errors(app: FastAPI) -> None:
    """All errors have one format: `{"error": {"message": …, "type": …, "code": …}}`."""

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        kind = request.headers.get("content-type", "")
        if "json" not in kind.lower():  # FastAPI does not parse a body with another content type
            message = f"the body's Content-Type is {kind[:100] or 'not given'}; application/json is needed"
            return JSONResponse(RefusedError(422, "invalid_request", message).body, 422)
        # without the values, which may be megabytes
        message = "; ".join(f"{'.'.join(map(str, found['loc']))}: {_reason(found)}" for found in error.errors()[:5])
        return JSONResponse(RefusedError(422, "invalid_request", message[:2000]).body, 422)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        body = RefusedError(error.status_code, "http_error", str(error.detail)).body
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, error: Exception) -> JSONResponse:
        message = f"the worker failed with {type(error).__name__}; its log says where"
        return JSONResponse(RefusedError(500, "internal_error", message).body, 500)
