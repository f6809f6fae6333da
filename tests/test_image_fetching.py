"""URLs that clients name: what is fetched, from where never, and how long and how much at most."""

import ipaddress
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from backend.errors import RequestError
from backend.images.fetch import fetch, is_public
from backend.images.limits import ImageLimits

LIMITS = ImageLimits(remote=True, max_bytes=1000)
IMAGE = b"\x89PNG" + bytes(96)


class Handler(BaseHTTPRequestHandler):
    """/image, /large, /endless, /compressed, /identity, /drip, /silent, /to/URL, /again; anything else is not found."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.seen.append((self.headers["Host"], self.path))
        if self.path.startswith("/to/"):
            self.answer(302, location=self.path[4:])
        elif self.path == "/again":
            self.answer(307, location="/again")
        elif self.path == "/image":
            self.answer(200, IMAGE)
        elif self.path == "/large":
            self.answer(200, bytes(1001))
        elif self.path == "/endless":
            self.answer(200, bytes(100), **{"content-length": "10000000000"})
        elif self.path == "/compressed":
            self.answer(200, IMAGE, **{"content-encoding": "gzip"})
        elif self.path == "/identity":
            self.answer(200, IMAGE, **{"content-encoding": "Identity"})
        elif self.path in ("/drip", "/silent"):
            self.drip(self.path == "/drip")
        else:
            self.answer(404)

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"content-length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def drip(self, some: bool) -> None:
        """A byte of a header now and then, or nothing, until the client has gone or the test ends."""
        try:
            while not self.server.ended.wait(0.02):
                if some:
                    self.wfile.write(b"x")
        except OSError:
            pass
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.seen, running.ended = [], threading.Event()
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.ended.set()
        running.shutdown()
        thread.join()


@pytest.fixture
def url(server) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def this_host(address) -> bool:
    """Stands for `is_public` where the server of these tests is to be reached."""
    return str(address) == "127.0.0.1"


def refusal(url: str, limits: ImageLimits = LIMITS, **options) -> str:
    with pytest.raises(RequestError) as caught:
        fetch("image[0]", url, limits, **options)
    message = str(caught.value)
    assert caught.value.code == "INVALID_ARGUMENT"
    assert message.startswith("image[0]: ") and "\n" not in message and len(message) < 300
    return message


def test_an_image_is_fetched(url):
    for path in ("image", "identity"):
        assert fetch("image[0]", f"{url}/{path}", LIMITS, allowed=this_host) == IMAGE


def test_nothing_is_fetched_unless_the_operator_allows_it(server, url):
    server.seen.clear()
    assert "this server fetches none" in refusal(f"{url}/image", ImageLimits(), allowed=this_host)
    assert server.seen == []


@pytest.mark.parametrize(
    "scheme", ["file:///etc/passwd", "ftp://example.com/a.png", "gopher://x", "http:///a.png", "http://u:p@example.com/a.png"]
)
def test_what_is_no_plain_url_is_refused(scheme):
    assert "expected http or https, a host, and no user" in refusal(scheme)


def test_a_malformed_url_is_refused():
    assert "InvalidURL" in refusal("http://[::1/a.png")


PRIVATE = [
    "127.0.0.1", "127.1", "2130706433", "0x7f000001", "localhost", "0.0.0.0", "10.0.0.1", "172.16.3.4", "192.168.1.1",
    "100.64.0.1", "169.254.169.254", "192.0.2.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "[::1]", "[::]",
    "[fe80::1]",
    "[fc00::1]", "[ff02::1]", "[::ffff:127.0.0.1]", "[::ffff:10.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]",
    "[2001:db8::1]", "[fec0::1]", "[3fff::1]", "[64:ff9b:1::7f00:1]", "192.0.0.192", "168.63.129.16",
]  # fmt: skip


@pytest.mark.parametrize("host", PRIVATE)
def test_a_private_address_is_never_connected_to(server, host):
    server.seen.clear()
    assert "expected one with public addresses" in refusal(f"http://{host}:{server.server_port}/image")
    assert server.seen == []


@pytest.mark.parametrize(
    ("address", "public"),
    [("8.8.8.8", True), ("2606:4700::1111", True), ("::ffff:8.8.8.8", True), ("2001:0:53aa:64c::1", False)],
)
def test_which_addresses_are_public(address, public):
    assert is_public(ipaddress.ip_address(address)) is public


def test_one_private_address_among_public_ones_is_enough(monkeypatch):
    answers(monkeypatch, "93.184.216.34", "10.1.2.3")
    assert "expected one with public addresses" in refusal("http://images.example/image")


def test_the_connection_goes_to_the_address_that_was_checked(server, monkeypatch):
    """A name is looked up once, so that a second answer cannot lead elsewhere; the server still hears the name."""
    looked_up = answers(monkeypatch, "127.0.0.1")
    server.seen.clear()
    url = f"http://images.example:{server.server_port}/image"
    assert fetch("image[0]", url, LIMITS, allowed=this_host) == IMAGE
    assert looked_up == ["images.example"]
    assert server.seen == [(f"images.example:{server.server_port}", "/image")]


def test_an_address_where_nobody_listens_is_passed_over(server, monkeypatch):
    answers(monkeypatch, "127.0.0.3", "127.0.0.1")
    url = f"http://images.example:{server.server_port}/image"
    assert fetch("image[0]", url, LIMITS, allowed=lambda address: address.is_loopback) == IMAGE


def answers(monkeypatch, *addresses: str) -> list[str]:
    """Has every name resolve to `addresses`; returns the list that collects the names."""
    names, resolve = [], socket.getaddrinfo

    def getaddrinfo(host, port, *args, **options):
        if host in addresses:  # the connection itself
            return resolve(host, port, *args, **options)
        names.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return names


def test_a_refusal_does_not_tell_which_names_the_network_has(monkeypatch, caplog):
    """The operator reads it in the log."""

    def getaddrinfo(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    answers(monkeypatch, "10.1.2.3")
    known = refusal("http://images.example/image")
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert known == refusal("http://images.example/image")
    assert known == "image[0]: got the host 'images.example', expected one with public addresses; send the image itself"
    assert [record.getMessage() for record in caplog.records if record.name == "backend.images.fetch"] == [
        "image[0]: the host 'images.example' is refused, 10.1.2.3",
        "image[0]: the host 'images.example' is refused, it has no address",
    ]


def test_redirects_are_followed_and_checked_again(server, url):
    assert fetch("image[0]", f"{url}/to//image", LIMITS, allowed=this_host) == IMAGE
    assert fetch("image[0]", f"{url}/to/{url}/to//image", LIMITS, allowed=this_host) == IMAGE
    server.seen.clear()
    elsewhere = f"http://127.0.0.2:{server.server_port}/image"
    assert "'127.0.0.2', expected one with public addresses" in refusal(f"{url}/to/{elsewhere}", allowed=this_host)
    assert "expected http or https" in refusal(f"{url}/to/file:///etc/passwd", allowed=this_host)
    assert "more than 3 redirects" in refusal(f"{url}/again", allowed=this_host)
    assert [path for _, path in server.seen if path == "/image"] == []


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/missing", "status 404"),
        ("/large", "more than 1000 bytes"),
        ("/compressed", "a compressed answer"),
        ("/endless", "cannot be fetched"),
    ],
)
def test_an_answer_that_is_no_image_of_the_allowed_size(url, path, words):
    assert words in refusal(f"{url}{path}", allowed=this_host)


@pytest.mark.parametrize("path", ["/silent", "/drip"])
def test_a_slow_server_holds_nothing_longer_than_the_limit(url, path):
    limits = ImageLimits(remote=True, remote_timeout_s=0.3)
    assert "did not answer within 0.3 s" in refusal(f"{url}{path}", limits, allowed=this_host)


def test_tls_is_not_left_out(server):
    """A server that speaks no TLS is not an https server."""
    assert "cannot be fetched" in refusal(f"https://127.0.0.1:{server.server_port}/image", allowed=this_host)


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert "cannot be fetched (ConnectError)" in refusal(f"http://127.0.0.1:{port}/image", allowed=this_host)
