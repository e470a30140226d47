"""Checks before every request: API key, number of requests in progress, body size and deadline."""

import asyncio
import secrets
import time

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import RefusedError
from .metrics import Metrics


PUBLIC_PATHS = ("/healthz", "/health")  # no key, no limits
KEYLESS_PATH = "/load_model"  # `transformers chat` sends no key there; the limits apply


class RequestLimits:
    """ASGI middleware around the worker.

    It puts `deadline`, in `time.monotonic` seconds, and `has_key` into the scope of a request.

    Args:
        api_key: expected in `Authorization: Bearer …`; None requires no key, nor do [`PUBLIC_PATHS`] and
            [`KEYLESS_PATH`].
        capacity: requests in progress at a time; the next is refused with 503.
        max_body: bytes.
        timeout: seconds from the request's headers to the answer's.
        metrics: counts each request.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        capacity: int,
        max_body: int,
        timeout: float,
        metrics: Metrics,
    ):
        self.app, self.api_key, self.capacity, self.max_body = app, api_key, capacity, max_body
        self.timeout, self.metrics, self.in_progress = timeout, metrics, 0
        metrics.in_progress.set_function(lambda: self.in_progress)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PUBLIC_PATHS:
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            scope["has_key"] = self._has_key(headers.get(b"authorization", b""))
            if not scope["has_key"] and scope["path"] != KEYLESS_PATH:
                raise RefusedError(401, "unauthorized", "Authorization: Bearer … is missing, or holds another key")
            if scope["method"] != "POST":
                await self.app(scope, receive, send)
                return
            self._check_size(headers.get(b"content-length", b"0"))
            if self.in_progress >= self.capacity:
                message = f"{self.in_progress} requests are in progress, which is the limit"
                raise RefusedError(503, "busy", message, retry_after=1)
        except RefusedError as refused:
            self.metrics.answered(scope["path"], refused.status, 0.0)
            await JSONResponse(refused.body, refused.status, refused.headers)(scope, receive, send)
            return
        await self._forward(scope, receive, send)

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        start, status = time.monotonic(), 499  # logged if the caller disconnects
        scope["deadline"] = start + self.timeout
        bytes_left, is_complete = self.max_body, False

        async def counting_receive() -> Message:
            nonlocal bytes_left, is_complete
            if is_complete:
                return await receive()
            try:
                async with asyncio.timeout(scope["deadline"] - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the request's body had not arrived after {self.timeout:g} s") from None
            bytes_left -= len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if bytes_left < 0:
                raise HTTPException(413, f"the request is larger than {self.max_body} bytes")
            return message

        async def recording_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.in_progress += 1
        try:
            await self.app(scope, counting_receive, recording_send)
        finally:
            self.in_progress -= 1
            self.metrics.answered(scope["path"], status, time.monotonic() - start)

    def _has_key(self, authorization: bytes) -> bool:
        if self.api_key is None:
            return True
        kind, _, key = authorization.partition(b" ")
        return kind.lower() == b"bearer" and secrets.compare_digest(key.strip(), self.api_key.encode())

    def _check_size(self, content_length: bytes) -> None:
        if content_length.isdigit() and int(content_length) > self.max_body:
            message = f"the request has {int(content_length)} bytes; {self.max_body} are allowed"
            raise RefusedError(413, "too_large", message)
