"""A URL that a client names → the bytes it leads to, without giving the client a way into the operator's network.

1. The URL is http or https, has a host and names no user. 2. Its host is resolved; every address must be a public one: not
private, loopback, link-local, reserved, multicast, nor one that tunnels to another address. 3. The connection goes to the
address that was checked, so that no second look-up can lead elsewhere; TLS is verified for the host's name. 4. A redirect
starts again at 1. 5. The answer has the status 200 and is read up to the limit. All this until one deadline; only the look-up
of a name has the system's own time limit. Proxies of the environment are not used, and nothing is kept.

What is refused raises RequestError INVALID_ARGUMENT, one line.
"""

import ipaddress
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

import httpcore2
import httpx2

from backend.errors import refused
from backend.images.limits import ImageLimits
from backend.parameters import shown

_logger = logging.getLogger(__name__)
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_REDIRECTS = (301, 302, 303, 307, 308)
# What some release of Python, or all, counts as global: translations to IPv4, site-local addresses, documentation, and the
# services of clouds that only their own machines reach, some of which tell credentials.
_NOT_PUBLIC = tuple(
    map(ipaddress.ip_network, "64:ff9b::/96 fec0::/10 3fff::/20 192.0.0.0/24 192.88.99.0/24 168.63.129.16/32".split())
)
_HEADERS = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "diffusiongemma-engine"}


def is_public(address: Address) -> bool:
    """Whether anybody on the internet can reach this address, and not another one through it."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address.sixtofour is not None or address.teredo is not None:
            return False
    barred = address.is_multicast or address.is_reserved or any(address in network for network in _NOT_PUBLIC)
    return address.is_global and not barred


def fetch(name: str, url: str, limits: ImageLimits, *, allowed: Callable[[Address], bool] = is_public) -> bytes:
    """`name` is what messages call the image; `allowed` says which addresses may be connected to."""
    if not limits.remote:
        raise refused(f"{name}: got a URL, but this server fetches none; send the image itself, in base64 or as a data URL")
    deadline_s = time.monotonic() + limits.remote_timeout_s
    backend = _CheckedBackend(name, allowed, deadline_s)
    with httpcore2.ConnectionPool(network_backend=backend, max_keepalive_connections=0) as pool:
        try:
            for _ in range(limits.max_redirects + 1):
                parsed = _checked_url(name, url)  # 1.
                answer = _get(pool, name, parsed, limits)
                if isinstance(answer, bytes):
                    return answer
                url = str(parsed.join(answer))  # 4.
        except (httpcore2.TimeoutException, TimeoutError):
            raise refused(f"{name}: {shown(url)} did not answer within {limits.remote_timeout_s:g} s; send the image") from None
        except (httpcore2.NetworkError, httpcore2.ProtocolError, httpx2.InvalidURL) as error:
            raise refused(f"{name}: {shown(url)} cannot be fetched ({type(error).__name__}); send the image itself") from None
    raise refused(f"{name}: got more than {limits.max_redirects} redirects, the last to {shown(url)}; send the image itself")


def _checked_url(name: str, url: str) -> httpx2.URL:
    parsed = httpx2.URL(url)
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo:
        raise refused(f"{name}: got the URL {shown(url)}, expected http or https, a host, and no user")
    return parsed


def _get(pool: httpcore2.ConnectionPool, name: str, url: httpx2.URL, limits: ImageLimits) -> bytes | str:
    """The body, or where a redirect leads."""
    target = httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
    with pool.stream("GET", target, headers=_HEADERS) as response:
        headers = {key.lower(): value.decode("latin-1") for key, value in response.headers}
        if response.status in _REDIRECTS and b"location" in headers:
            return headers[b"location"]
        if response.status != 200 or headers.get(b"content-encoding", "identity").strip().lower() != "identity":  # 5.
            got = f"status {response.status}" if response.status != 200 else "a compressed answer"
            raise refused(f"{name}: got {got} from {shown(str(url))}, expected an image; send the image itself")
        body = bytearray()
        for chunk in response.iter_stream():
            body += chunk
            if len(body) > limits.max_bytes:
                raise refused(f"{name}: got more than {limits.max_bytes} bytes from {shown(str(url))}; scale the image down")
    return bytes(body)


class _CheckedBackend(httpcore2.NetworkBackend):
    """Connects to public addresses alone, and to none after the deadline."""

    def __init__(self, name: str, allowed: Callable[[Address], bool], deadline_s: float):
        self._name, self._allowed, self._deadline_s = name, allowed, deadline_s
        self._sockets = httpcore2.SyncBackend()

    def connect_tcp(self, host: str, port: int, *args: Any, **options: Any) -> httpcore2.NetworkStream:
        addresses = self._resolved(host)  # 2.
        barred = [address for address in addresses if not self._allowed(address)]
        if barred or not addresses:
            # One message for both, so that no client finds out which names there are in the operator's network.
            reason = ", ".join(map(str, barred)) or "it has no address"
            _logger.warning("%s: the host %s is refused, %s", self._name, shown(host), reason)
            line = f"{self._name}: got the host {shown(host)}, expected one with public addresses; send the image itself"
            raise refused(line)
        for address in addresses:  # 3.
            try:
                connected = self._sockets.connect_tcp(str(address), port, _left_s(self._deadline_s))
                return _TimedStream(connected, self._deadline_s)
            except httpcore2.ConnectError as error:
                failure = error
        raise failure

    def _resolved(self, host: str) -> list[Address]:
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            return []
        return [ipaddress.ip_address(entry[4][0].partition("%")[0]) for entry in found]


class _TimedStream(httpcore2.NetworkStream):
    """A connection of which every operation ends at the deadline: a server that sends a byte now and then cannot hold it."""

    def __init__(self, stream: httpcore2.NetworkStream, deadline_s: float):
        self._stream, self._deadline_s = stream, deadline_s

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left_s(self._deadline_s))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _left_s(self._deadline_s))

    def start_tls(self, ssl_context, server_hostname: str | None = None, timeout: float | None = None) -> "_TimedStream":
        secured = self._stream.start_tls(ssl_context, server_hostname, _left_s(self._deadline_s))
        return _TimedStream(secured, self._deadline_s)

    def close(self) -> None:
        self._stream.close()

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _left_s(deadline_s: float) -> float:
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s
