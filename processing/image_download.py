"""A picture from the web: over http and https alone, in so much time and no more bytes than that.

`urlopen` by itself follows redirects to ftp, reads the page that redirects to its end, however long that is, and starts
its timeout anew with every packet. What a server sends is therefore counted where it arrives.
"""

import io
import socket
import string
import time
from collections.abc import Callable
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.error import URLError
from urllib.parse import quote, urlsplit, urlunsplit
from urllib.request import HTTPHandler, HTTPRedirectHandler, HTTPSHandler, ProxyHandler, Request, build_opener


DOWNLOAD_SECONDS = 20.0
DOWNLOAD_BYTES = 100 * 2**20
# (host as in the URL, address that it resolves to) -> raises PermissionError where that is not to be visited
Guard = Callable[[str, str], None]


def is_web(source: str) -> bool:
    """Whether it begins with `http://` or `https://`, in letters of either case."""
    return source[:8].lower().startswith(("http://", "https://"))


def download(
    url: str, timeout: float | None = None, max_bytes: int | None = None, guard: Guard | None = None
) -> tuple[str, bytes]:
    """Fetch a URL of http or https.

    Args:
        timeout: seconds for all of it, 20 by default; to look a name up, and a connection that is not made yet, may
            take as long again.
        max_bytes: how many may come in, 100 MiB by default.
        guard: asked about every address before it is connected to, those of redirects too. The address that it was
            asked about is the one that is connected to, and no proxy is used, which would look names up by itself.

    Returns:
        its name for messages, with the content type that the server says; its bytes.

    Raises:
        OSError: it cannot be fetched within that, or the server redirects to what is not http or https: a TimeoutError
            where time was too short, a PermissionError where `guard` says no.
    """
    allowance, data = _Allowance(DOWNLOAD_SECONDS if timeout is None else timeout, max_bytes, guard), bytearray()
    opener = build_opener(_Http(allowance), _Https(allowance), _Redirects(allowance), *allowance.proxies)
    try:
        request = Request(_as_browsers_send(url), headers={"User-Agent": "lorgnette"})
        with opener.open(request, timeout=allowance.seconds) as response:
            while chunk := response.read1(2**16):
                data += chunk
            return f"{url[:200]} ({response.headers.get_content_type()})", bytes(data)
    except (OSError, HTTPException, ValueError) as error:
        cause = error.reason if isinstance(error, URLError) and isinstance(error.reason, OSError) else error
        kind = next((kind for kind in (PermissionError, TimeoutError) if isinstance(cause, kind)), OSError)
        raise kind(f"cannot fetch {url[:200]}: {str(cause)[:300]}") from error


def _as_browsers_send(url: str) -> str:
    """Spaces and letters beyond ASCII in percent of their UTF-8, those of a host as `xn--`: urllib sends neither."""
    parts = urlsplit(url)
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    return quote(urlunsplit(parts._replace(netloc=host)), safe=string.punctuation)


class _Allowance:
    """What all connections of one download may take together."""

    def __init__(self, seconds: float, max_bytes: int | None, guard: Guard | None):
        self.seconds, self.deadline, self.guard = seconds, time.monotonic() + seconds, guard
        self.max_bytes = self.bytes = DOWNLOAD_BYTES if max_bytes is None else max_bytes
        self.proxies = [] if guard is None else [ProxyHandler({})]

    def check(self) -> None:
        if time.monotonic() > self.deadline:
            raise TimeoutError(f"not complete after {self.seconds:g} s")
        if self.bytes < 0:
            raise OSError(f"larger than {self.max_bytes} bytes")


class _Metered(io.RawIOBase):
    """What comes in from a socket, within an allowance."""

    def __init__(self, raw: io.RawIOBase, allowance: _Allowance):
        self.raw, self.allowance = raw, allowance

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        count = self.raw.readinto(buffer)
        self.allowance.bytes -= count or 0
        self.allowance.check()
        return count

    def close(self) -> None:
        self.raw.close()
        super().close()


class _Response(HTTPResponse):
    def __init__(self, allowance: _Allowance, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.fp = io.BufferedReader(_Metered(self.fp.detach(), allowance))


def _connect(kind: type[HTTPConnection], allowance: _Allowance, *args: Any, **kwargs: Any) -> HTTPConnection:
    connection = kind(*args, **kwargs)
    connection.response_class = partial(_Response, allowance)
    if allowance.guard is not None:
        connection._create_connection = partial(_connect_guarded, allowance)
    return connection


def _connect_guarded(allowance: _Allowance, where: tuple[str, int], *_: Any) -> socket.socket:
    """In place of `socket.create_connection`, which would look the name up once more."""
    host, port = where
    addresses = dict.fromkeys(found[4][0] for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    for address in addresses:
        allowance.guard(host, address)
    failure = OSError(f"{host} has no address")
    for address in addresses:
        allowance.check()
        try:
            return socket.create_connection((address, port), max(allowance.deadline - time.monotonic(), 0.001))
        except OSError as error:
            failure = error
    raise failure


class _Http(HTTPHandler):
    def __init__(self, allowance: _Allowance):
        super().__init__()
        self.connect = partial(_connect, HTTPConnection, allowance)

    def http_open(self, request: Request) -> HTTPResponse:
        return self.do_open(self.connect, request)


class _Https(HTTPSHandler):
    def __init__(self, allowance: _Allowance):
        super().__init__()
        self.connect = partial(_connect, HTTPSConnection, allowance)

    def https_open(self, request: Request) -> HTTPResponse:
        return self.do_open(self.connect, request, context=self._context)


class _Redirects(HTTPRedirectHandler):
    def __init__(self, allowance: _Allowance):
        self.allowance = allowance

    def redirect_request(
        self, request: Request, file: Any, code: int, message: str, headers: Any, url: str
    ) -> Request | None:
        self.allowance.check()
        if not is_web(url):
            raise OSError(f"redirected to {url[:200]}, which is neither http nor https")
        return super().redirect_request(request, file, code, message, headers, url)
