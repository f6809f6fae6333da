"""Addresses that this machine may listen on, and those of servers elsewhere, checked before anything long begins."""

import errno
import ipaddress
import os
import socket
from collections.abc import Iterable
from contextlib import ExitStack
from urllib.parse import urlsplit

_PORTS = {"http": 80, "https": 443}
_TIMEOUT_S = 1.0


class AddressError(ValueError):
    """An address that cannot be used; one line."""


def ipv4_address(host: str) -> str:
    """The numbers of a host's name: Triton's HTTP services take nothing else. Raises AddressError if it has none."""
    try:
        return socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that no domain name can be
        reason = getattr(error, "strerror", None) or "not a host's name"
        raise AddressError(f"--host: got {host!r}, which has no IPv4 address ({reason}); pass another --host") from None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it. host: numbers."""
    return ipaddress.ip_address(host).is_loopback


def free_ports(host: str, ports: Iterable[tuple[str, int]]) -> list[int]:
    """ports: each with the option that chooses it. Gives them with every 0 replaced by a free one.

    host: numbers. Raises AddressError for a port that is taken, by another program or by another of these options."""
    chosen = []
    with ExitStack() as sockets:  # all held until the last is chosen, so that no port is chosen twice
        for option, port in ports:
            chosen.append(sockets.enter_context(listening(host, port, option)).getsockname()[1])
    return chosen


def listening(host: str, port: int, option: str) -> socket.socket:
    """A socket that listens there; the caller closes it. option: what chooses the port. Raises AddressError if none can."""
    address = ipv4_address(host)
    try:
        return socket.create_server((address, port))
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise AddressError(f"--host: got {host}, expected an address of this machine; pass another --host") from None
        reason = os.strerror(error.errno)  # without the address, which create_server adds
        raise AddressError(f"{option}: {address}:{port} cannot be used ({reason}); pass another {option}, or 0") from None


def host_and_port(option: str, text: str) -> tuple[str, int]:
    """What host:port says. Raises AddressError if it is none."""
    try:
        found = urlsplit(f"//{text}")
        if found.hostname and found.port and text == found.netloc and "@" not in text:
            return found.hostname, found.port
    except ValueError:  # a port that is none
        pass
    raise AddressError(f"{option}: got {text!r}, expected host:port, such as localhost:8001")


def host_and_port_of_url(option: str, url: str) -> tuple[str, int]:
    """Where an http or https URL leads. Raises AddressError if it is none."""
    try:
        found = urlsplit(url)
        if found.hostname and found.scheme in _PORTS:
            return found.hostname, found.port or _PORTS[found.scheme]
    except ValueError:
        pass
    raise AddressError(f"{option}: got {url!r}, expected a URL such as http://localhost:8002/metrics")


def answers(host: str, port: int) -> bool:
    """Whether something takes connections there."""
    try:
        socket.create_connection((host, port), timeout=_TIMEOUT_S).close()
    except (OSError, UnicodeError):  # UnicodeError: see above
        return False
    return True
