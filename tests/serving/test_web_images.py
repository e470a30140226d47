"""Pictures that somebody else names: no URL leads into this machine or its network, however it is written."""

import base64
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from picture_server import PNG

from lorgnette.serving import web_images
from lorgnette.serving.web_images import download, is_public, read_web_image, refuse_private


@pytest.fixture(scope="module")
def internal():
    """A server on the loopback device; its port, and the paths that anybody has asked it for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            status, _, target = self.path.strip("/").partition("?")
            body = b"" if target else PNG
            self.send_response(int(status or 200))
            self.send_header("Content-Length", str(len(body)))
            if target:
                self.send_header("Location", target)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    yield listener.server_port, asked
    listener.shutdown()
    listener.server_close()


@pytest.fixture
def names(monkeypatch):
    """What names resolve to, one address after another; addresses resolve to themselves."""
    known: dict[str, list[str]] = {}
    look_up = socket.getaddrinfo

    def resolve(host, *args, **kwargs):
        addresses = known.get(host)
        return look_up(addresses.pop(0) if addresses else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return known


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:4700::1111", "::ffff:93.184.215.14", "64:ff9b::5db8:d70e"])
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.9.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "255.255.255.255", "240.0.0.1"),
        *("169.254.169.254", "100.100.100.200", "168.63.129.16", "192.0.0.192", "224.0.0.1", "239.255.255.250"),
        *("::1", "::", "fe80::1", "fe80::1%lo", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "::127.0.0.1"),
        *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "64:ff9b:1::7f00:1", "2002:7f00:1::"),
        "2001:0:7f00:1::",
    ],
)
def test_addresses_of_nobody_else(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "[::1]", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0"],
)
def test_no_way_of_writing_loopback_gets_there(internal, host):
    port, asked = internal
    asked.clear()
    with pytest.raises(PermissionError, match=r"cannot fetch .*is not on the public internet"):
        read_web_image(f"http://{host}:{port}/200", timeout=10)
    assert asked == []


def test_a_name_that_resolves_to_loopback(internal, names):
    port, asked = internal
    asked.clear()
    names["pictures.example"] = ["127.0.0.1"]
    with pytest.raises(PermissionError, match=r"pictures\.example is not on the public internet"):
        read_web_image(f"http://pictures.example:{port}/200", timeout=10)
    assert asked == []


def test_the_address_that_was_asked_about_is_the_one_that_is_connected_to(internal, names):
    """A name server may give another address each time: only one look counts."""
    port, asked = internal
    asked.clear()
    names["rebinding.example"] = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    recorded = []
    _, data = download(f"http://rebinding.example:{port}/200", 10, None, lambda *where: recorded.append(where))
    assert (data, recorded, asked) == (PNG, [("rebinding.example", "127.0.0.1")], ["/200"])
    assert names["rebinding.example"] == ["127.0.0.2", "127.0.0.3"]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_into_the_network(internal, status):
    port, asked = internal
    asked.clear()

    def only_by_name(host: str, address: str) -> None:
        if host != "127.0.0.1":
            refuse_private(host, address)

    with pytest.raises(PermissionError, match="localhost is not on the public internet"):
        read_web_image(f"http://127.0.0.1:{port}/{status}?http://localhost:{port}/200", 10, guard=only_by_name)
    assert asked == [f"/{status}?http://localhost:{port}/200"]


def test_proxies_are_left_out(internal, names, monkeypatch):
    """A proxy would look names up by itself, and reach what this machine must not."""
    port, asked = internal
    asked.clear()
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
    with pytest.raises(PermissionError):
        read_web_image("http://10.0.0.1/200", timeout=10)
    assert asked == []


def test_letters_of_either_case(internal):
    port, _ = internal
    url = f"HTTP://127.0.0.1:{port}/301?HTTP://127.0.0.1:{port}/200"
    assert read_web_image(url, 10, guard=lambda *_: None) == PNG


def test_a_cap_of_bytes(internal):
    port, _ = internal
    with pytest.raises(OSError, match="larger than 100 bytes"):
        read_web_image(f"http://127.0.0.1:{port}/200", 10, 100, guard=lambda *_: None)


@pytest.mark.parametrize(
    "url", ["file:///etc/hostname", "/etc/hostname", "ftp://example.org/a.png", "", "javascript:1"]
)
def test_nothing_but_the_web(url):
    with pytest.raises(ValueError, match="begins with http://, https:// or data:"):
        read_web_image(url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://", "names a host after http://"),
        ("https://:443/a.png", "names a host after http://"),
        ("http://me:secret@127.0.0.1/a.png", "and no user before it"),
        ("http://example.org:99999/a.png", "is no URL: Port out of range"),
        ("http://example.org:-1/a.png", "is no URL: Port"),
        ("http://[zz]/a.png", "is no URL: "),
    ],
)
def test_a_url_that_is_none_is_not_its_hosts_fault(url, message):
    with pytest.raises(ValueError, match=message) as told:
        read_web_image(url)
    assert "secret" not in str(told.value)


def test_data_urls():
    assert read_web_image("data:image/png;base64," + base64.b64encode(PNG).decode()) == PNG
    with pytest.raises(ValueError, match="the data URL is not valid base64"):
        read_web_image("data:image/png;base64,%%%")


def test_a_host_in_letters_beyond_ascii_is_looked_up_by_its_own_name(internal, names):
    port, asked = internal
    asked.clear()
    names["xn--mnchen-3ya.example"], recorded = ["127.0.0.1"], []
    download(f"http://münchen.example:{port}/200", guard=lambda *found: recorded.append(found))
    assert (recorded, asked) == ([("xn--mnchen-3ya.example", "127.0.0.1")], ["/200"])
    with pytest.raises(PermissionError, match=r"127\.0\.0\.1 is not on the public internet"):
        read_web_image(f"http://１２７。0。0。1:{port}/200", timeout=10)  # noqa: RUF001
    assert asked == ["/200"]


def anywhere(host: str, address: str) -> None:
    """A guard that lets every address pass."""


@pytest.mark.parametrize(
    ("path", "cause"),
    [
        ("gone", "404"),
        ("drip", "not complete after 1 s"),
        ("headers_that_drip", "not complete after 1 s"),
        ("slowly_to?/slowly_to?/slowly_to?/slowly_to?/slowly_to?/picture", "(not complete after 1 s|timed out)"),
        ("to?/to?/to?/to?/to?/to?/to?/to?/to?/to?/to?/to?/picture", "redirect"),
    ],
)
def test_no_picture_in_time(server, path, cause):
    """A server that never ends its answer is left; the test would not end otherwise."""
    start = time.monotonic()
    with pytest.raises(OSError, match=rf"cannot fetch .*{path.partition('?')[0]}.*{cause}"):
        download(f"{server}/{path}", 1 if "1 s" in cause else 20, guard=anywhere)
    assert time.monotonic() - start < 15


@pytest.mark.parametrize("scheme", ["ftp", "file", "data", "gopher", "javascript"])
def test_redirects_to_other_schemes(server, visitors, scheme):
    port, recorded = visitors
    target = f"{scheme}://127.0.0.1:{port}/picture.png" if scheme in ("ftp", "gopher") else f"{scheme}:picture"
    with pytest.raises(OSError, match=f"cannot fetch {server}/to.*{scheme}"):
        download(f"{server}/to?{target}", 10, guard=anywhere)
    assert recorded == []


@pytest.mark.parametrize("path", ["picture", "to?/picture", "endlessly_to?/picture"])
def test_huge_answers(server, monkeypatch, path):
    """What a page sends that redirects counts as well."""
    monkeypatch.setattr(web_images, "DOWNLOAD_BYTES", 100)
    with pytest.raises(OSError, match="larger than 100 bytes"):
        download(f"{server}/{path}", guard=anywhere)


def test_letters_and_spaces_in_a_url_are_sent_as_browsers_send_them(server):
    name, sent = download(f"{server}/path_that_was_asked_for?größe=1 2%20&x=[a]#part", guard=anywhere)
    assert sent == b"/path_that_was_asked_for?gr%C3%B6%C3%9Fe=1%202%20&x=[a]"
    assert "größe" in name
