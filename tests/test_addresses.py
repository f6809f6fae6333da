"""Addresses to listen on and to ask, and one line for each that cannot be."""

import socket

import pytest

from backend.addresses import (
    AddressError,
    answers,
    free_ports,
    host_and_port,
    host_and_port_of_url,
    ipv4_address,
    is_loopback,
    listening,
)

HOST = "127.0.0.1"


def test_free_ports_differ_and_chosen_ones_stay():
    [free] = free_ports(HOST, [("--a", 0)])
    chosen = free_ports(HOST, [("--a", free), ("--b", 0), ("--c", 0)])
    assert chosen[0] == free and len(set(chosen)) == 3
    for port in chosen:
        listening(HOST, port, "--a").close()


def test_a_port_that_is_taken_is_named_by_its_option():
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AddressError) as raised:
            free_ports(HOST, [("--grpc-port", 0), ("--openai-port", port)])
    reason = "cannot be used (Address already in use)"
    assert str(raised.value) == f"--openai-port: {HOST}:{port} {reason}; pass another --openai-port, or 0"
    with pytest.raises(AddressError, match=f"--b: {HOST}:{port} cannot be used"):
        free_ports(HOST, [("--a", port), ("--b", port)])


def test_an_address_of_another_machine_and_a_name_of_none():
    with pytest.raises(AddressError) as raised:
        listening("203.0.113.1", 0, "--port")
    assert str(raised.value) == "--host: got 203.0.113.1, expected an address of this machine; pass another --host"
    for host in ("nowhere.invalid", "a..b", "a" * 70):
        with pytest.raises(AddressError, match=r"--host: got '.*', which has no IPv4 address \(.+\); pass another --host"):
            ipv4_address(host)
    assert ipv4_address("localhost") == HOST


def test_what_only_this_machine_reaches():
    assert [is_loopback(host) for host in ("127.0.0.1", "127.8.9.1", "0.0.0.0", "10.0.0.1")] == [True, True, False, False]


@pytest.mark.parametrize("text", ["localhost", "localhost:", ":8001", "a:0", "a:65536", "a:b", "http://a:1", "u@a:1", ""])
def test_no_host_and_port(text):
    with pytest.raises(AddressError) as raised:
        host_and_port("--triton", text)
    assert str(raised.value) == f"--triton: got {text!r}, expected host:port, such as localhost:8001"


@pytest.mark.parametrize(
    "url", ["nonsense", "localhost:8002/metrics", "ftp://a/metrics", "http://", "http://a:b/", "http://[a"]
)
def test_no_url(url):
    with pytest.raises(AddressError) as raised:
        host_and_port_of_url("--triton-metrics", url)
    assert str(raised.value) == f"--triton-metrics: got {url!r}, expected a URL such as http://localhost:8002/metrics"


def test_where_a_server_is():
    assert host_and_port("--triton", "localhost:8001") == ("localhost", 8001)
    assert host_and_port("--triton", "[::1]:8001") == ("::1", 8001)
    assert host_and_port_of_url("--triton-metrics", "http://a:8002/metrics") == ("a", 8002)
    assert host_and_port_of_url("--triton-metrics", "https://a/metrics") == ("a", 443)
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]
        assert answers(HOST, port)
    assert not answers(HOST, port) and not answers("nowhere.invalid", 1)
