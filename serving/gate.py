"""What every request passes first: who asks, whether there is room, how large it is and how long it takes to arrive."""

import asyncio
import secrets
import time

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import RefusedError
from .metrics import Metrics


OPEN = ("/healthz", "/health")  # to all, without a key
KEYLESS = "/load_model"  # `transformers chat` sends no key there; room, size and time hold as elsewhere


class Gate:
    """ASGI middleware around the worker.

    It puts `deadline`, by `time.monotonic`, and `has_key` into the scope of a question.

    Args:
        api_key: what `Authorization: Bearer …` has to hold; None asks for none. [`OPEN`] and [`KEYLESS`] need none.
        capacity: questions that are in the house at a time; the next is refused with 503.
        max_body: bytes.
        timeout: seconds from the arrival of a question's head to its answer's.
        metrics: told of each question.
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
        self.timeout, self.metrics, self.inside = timeout, metrics, 0
        metrics.inside.set_function(lambda: self.inside)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            scope["has_key"] = self._has_key(headers.get(b"authorization", b""))
            if not scope["has_key"] and scope["path"] != KEYLESS:
                raise RefusedError(401, "unauthorized", "Authorization: Bearer … is missing, or holds another key")
            if scope["method"] != "POST":
                await self.app(scope, receive, send)
                return
            self._check_size(headers.get(b"content-length", b"0"))
            if self.inside >= self.capacity:
                message = f"{self.inside} questions are being answered, which is all there is room for"
                raise RefusedError(503, "busy", message, retry_after=1)
        except RefusedError as refused:
            self.metrics.answered(scope["path"], refused.status, 0.0)
            await JSONResponse(refused.body, refused.status, refused.headers)(scope, receive, send)
            return
        await self._let_in(scope, receive, send)

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        start, status = time.monotonic(), 499  # what is logged of a caller that hung up
        scope["deadline"] = start + self.timeout
        left, whole = self.max_body, False

        async def counted() -> Message:
            nonlocal left, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout(scope["deadline"] - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the request's body had not arrived after {self.timeout:g} s") from None
            left -= len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if left < 0:
                raise HTTPException(413, f"the request is larger than {self.max_body} bytes")
            return message

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.inside += 1
        try:
            await self.app(scope, counted, noting)
        finally:
            self.inside -= 1
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
