"""Download pictures from callers' URLs: public hosts only, http and https only, with limits on time and size.

This file imports only the standard library: an exported folder holds it next to `handler.py`. `urlopen` by itself
follows redirects to ftp, reads a page that redirects to its end, and restarts its timeout with every packet; so this
module counts what a server sends where it arrives, and checks an address where the socket connects to it.
"""

import base64
import binascii
import io
import ipaddress
import socket
import string
import time
from collections.abc import Callable
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.error import URLError
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import HTTPHandler, HTTPRedirectHandler, HTTPSHandler, ProxyHandler, Request, build_opener


DOWNLOAD_SECONDS = 20.0
DOWNLOAD_BYTES = 100 * 2**20
# (host as in the URL, resolved address) -> raises PermissionError if the address is not allowed
Guard = Callable[[str, str], None]

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Python counts these as public: Azure's metadata and DNS; protocol assignments, with Oracle's metadata
_CLOUD_SERVICES = [ipaddress.ip_network(name) for name in ("168.63.129.16/32", "192.0.0.0/24")]


_URL_SAFE_ALPHABET = str.maketrans("-_", "+/", "\r\n\t")


def read_web_image(
    url: str, timeout: float | None = None, max_bytes: int | None = None, guard: Guard | None = None
) -> bytes:
    """Download a caller's URL; addresses of this machine and its network are refused.

    Args:
        url: http, https or base64 data.
        timeout, max_bytes: see [`download`].
        guard: see [`download`]; [`refuse_private`] by default.

    Raises:
        ValueError: a URL of another kind or without a host, base64 that is not valid.
        OSError: see [`download`].
    """
    if is_web(url):
        _check_url(url)
        return download(url, timeout, max_bytes, refuse_private if guard is None else guard)[1]
    if url[:5].lower() != "data:":
        raise ValueError(f"an image's URL begins with http://, https:// or data:, not with {url[:20]!r}")
    try:
        return decode_base64(url.partition(",")[2])
    except binascii.Error as error:
        raise ValueError(f"the data URL is not valid base64: {error}") from error


def decode_base64(text: str) -> bytes:
    """Decode base64 with line breaks, percent encoding, missing padding, or the URL-safe alphabet.

    Raises:
        binascii.Error: invalid base64.
    """
    digits = unquote(text).strip().translate(_URL_SAFE_ALPHABET).rstrip("=")
    return base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)


def is_web(source: str) -> bool:
    """Whether it begins with `http://` or `https://`, in letters of either case."""
    return source[:8].lower().startswith(("http://", "https://"))


def download(
    url: str, timeout: float | None = None, max_bytes: int | None = None, guard: Guard | None = None
) -> tuple[str, bytes]:
    """Fetch a URL of http or https.

    Args:
        timeout: seconds in total, 20 by default; DNS lookup and connecting may take as long again.
        max_bytes: limit on received bytes, 100 MiB by default.
        guard: called with every address before the socket connects to it, those of redirects too. The socket connects
            to that address; no proxy is used, since a proxy looks names up by itself.

    Returns:
        its name for messages, with the server's content type; its bytes.

    Raises:
        OSError: the download fails or exceeds a limit, or the server redirects to neither http nor https.
        TimeoutError: the time is up.
        PermissionError: `guard` refuses an address.
    """
    allowance, data = _Allowance(DOWNLOAD_SECONDS if timeout is None else timeout, max_bytes, guard), bytearray()
    opener = build_opener(_Http(allowance), _Https(allowance), _Redirects(allowance), *allowance.proxies)
    try:
        request = Request(_encode_url(url), headers={"User-Agent": "lorgnette"})
        with opener.open(request, timeout=allowance.seconds) as response:
            while chunk := response.read1(2**16):
                data += chunk
            return f"{url[:200]} ({response.headers.get_content_type()})", bytes(data)
    except (OSError, HTTPException, ValueError) as error:
        cause = error.reason if isinstance(error, URLError) and isinstance(error.reason, OSError) else error
        kind = next((kind for kind in (PermissionError, TimeoutError) if isinstance(cause, kind)), OSError)
        raise kind(f"cannot fetch {url[:200]}: {str(cause)[:300]}") from error


def _encode_url(url: str) -> str:
    """Percent-encode spaces and non-ASCII characters, and encode the host as IDNA; urllib does neither."""
    parts = urlsplit(url)
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    return quote(urlunsplit(parts._replace(netloc=host)), safe=string.punctuation)


class _Allowance:
    """Time and size limits over all connections of one download."""

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
    """A socket's raw stream that enforces an allowance."""

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
    """Replaces `socket.create_connection`, which would resolve the name again."""
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


def _check_url(url: str) -> None:
    """Raise a ValueError for an invalid URL, before any connection."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # both may raise
    except ValueError as error:
        raise ValueError(f"{url[:200]} is no URL: {error}") from error
    if not host or parts.username is not None:
        raise ValueError("an image's URL names a host after http:// or https://, and no user before it")


def is_public(address: str) -> bool:
    """Whether a numeric address is publicly routable.

    Private, loopback, link-local (with it the metadata services of clouds), shared, reserved and multicast addresses
    are not, nor is an IPv6 address that stands for such an IPv4 one (mapped, 6to4, Teredo, NAT64).
    """
    found = ipaddress.ip_address(address.partition("%")[0])
    return all(
        each.is_global
        and not (each.is_multicast or each.is_reserved or getattr(each, "is_site_local", False))
        and not any(each in network for network in _CLOUD_SERVICES)
        for each in _ipv4_of(found)
    )


def refuse_private(host: str, address: str) -> None:
    """A guard for [`download`]: raises PermissionError, without the address, unless it [`is_public`]."""
    if not is_public(address):
        raise PermissionError(f"{host} is not on the public internet")


def _ipv4_of(address: _Address) -> list[_Address]:
    """The IPv4 addresses embedded in an IPv6 one, or the address itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    if address.ipv4_mapped is not None:
        return [address.ipv4_mapped]
    if address.sixtofour is not None:
        return [address.sixtofour]
    if address.teredo is not None:
        return list(address.teredo)
    if address in _NAT64:
        return [ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)]
    return [address]
