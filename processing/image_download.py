"""A picture from the web: over http and https alone, in so much time and no more bytes than that.

`urlopen` by itself follows redirects to ftp, reads the page that redirects to its end, however long that is, and starts
its timeout anew with every packet. What a server sends is therefore counted where it arrives.
"""

import io
import time
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.request import HTTPHandler, HTTPRedirectHandler, HTTPSHandler, Request, build_opener


DOWNLOAD_SECONDS = 20.0
DOWNLOAD_BYTES = 100 * 2**20
WEB = ("http://", "https://")


def download(url: str, timeout: float | None = None) -> tuple[str, bytes]:
    """Fetch a URL that begins as [`WEB`] does.

    Args:
        timeout: seconds for all of it, 20 by default; a connection that is not made yet may take as long again.

    Returns:
        its name for messages, with the content type that the server says; its bytes, at most 100 MiB.

    Raises:
        OSError: it cannot be fetched within that, or the server redirects to what is not http or https.
    """
    allowance, data = _Allowance(DOWNLOAD_SECONDS if timeout is None else timeout), bytearray()
    opener = build_opener(_Http(allowance), _Https(allowance), _Redirects(allowance))
    try:
        request = Request(url, headers={"User-Agent": "lorgnette"})
        with opener.open(request, timeout=allowance.seconds) as response:
            while chunk := response.read1(2**16):
                data += chunk
            return f"{url} ({response.headers.get_content_type()})", bytes(data)
    except (OSError, HTTPException, ValueError) as error:
        raise OSError(f"cannot fetch {url}: {error}") from error


class _Allowance:
    """What all connections of one download may take together."""

    def __init__(self, seconds: float):
        self.seconds, self.deadline, self.bytes = seconds, time.monotonic() + seconds, DOWNLOAD_BYTES

    def check(self) -> None:
        if time.monotonic() > self.deadline:
            raise TimeoutError(f"not complete after {self.seconds:g} s")
        if self.bytes < 0:
            raise OSError(f"larger than {DOWNLOAD_BYTES} bytes")


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
    return connection


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
        if not url.startswith(WEB):
            raise OSError(f"redirected to {url[:200]}, which is neither http nor https")
        return super().redirect_request(request, file, code, message, headers, url)
