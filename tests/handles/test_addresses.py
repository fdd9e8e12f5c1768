"""Addresses out of the kernel's bytes, as the socket module spells them."""

from __future__ import annotations

import socket
import struct
import tempfile
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handleipc.handles import addresses
from handleipc.wire.syscalls import Acceptor


def accepted_from(listener: socket.socket, client: socket.socket) -> tuple[object, object]:
    """Connect, accept with the core, and return (parsed address, what Python says)."""
    listener.listen()
    listener.setblocking(False)
    client.connect(listener.getsockname())
    ((fd, raw),) = Acceptor(1).accept(listener.fileno(), 1)
    with socket.socket(fileno=fd) as connection:
        return addresses.parse(raw), connection.getpeername()


@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
)
def test_parse_of_internet_addresses(family: socket.AddressFamily, host: str) -> None:
    """IPv4 and IPv6 addresses are the tuples that getpeername returns."""
    with socket.socket(family) as listener, socket.socket(family) as client:
        try:
            listener.bind((host, 0))
        except OSError:
            pytest.skip(f"{host} is not to be had here")
        parsed, wanted = accepted_from(listener, client)
        assert parsed == wanted == client.getsockname()


@pytest.mark.parametrize("name", ["", "/client", "\0abstract", "/ä\udcff", "/" + "x" * 40])
def test_parse_of_unix_addresses(name: str) -> None:
    """Unix addresses are paths, bytes if abstract, and empty if there is none."""
    with (
        tempfile.TemporaryDirectory(prefix="hipc") as folder,  # short: a path has 107 bytes at most
        socket.socket(socket.AF_UNIX) as listener,
        socket.socket(socket.AF_UNIX) as client,
    ):
        bound = f"{folder}{name}" if name.startswith("/") else name.replace("\0", f"\0{folder}-")
        listener.bind(f"\0{folder}")
        if bound:
            client.bind(bound)
        parsed, wanted = accepted_from(listener, client)
        assert parsed == wanted == client.getsockname()


def test_parse_of_longest_path() -> None:
    """A path that fills its field has no zero at the end."""
    name = b"/" + b"x" * 107
    raw = struct.pack("=H", socket.AF_UNIX) + name
    assert addresses.parse(raw) == name.decode()
    assert addresses.parse(raw[:20] + b"\0" * 5) == name[:18].decode()


@pytest.mark.parametrize("raw", [b"", b"\1"])
def test_parse_of_no_address(raw: bytes) -> None:
    """What is too short for a family is no address."""
    assert addresses.parse(raw) == ""


@given(
    st.ip_addresses(v=6),
    st.integers(0, 65535),
    st.integers(0, 2**20 - 1),
    st.integers(0, 2**32 - 1),
)
def test_parse_of_any_ipv6_address(host: object, port: int, flow: int, scope: int) -> None:
    """Flow is in network order and scope is not, as in the kernel's structure."""
    packed = socket.inet_pton(socket.AF_INET6, str(host))
    raw = struct.pack("=H", socket.AF_INET6) + struct.pack("!HI", port, flow) + packed
    parsed = addresses.parse(raw + struct.pack("=I", scope))
    assert parsed == (socket.inet_ntop(socket.AF_INET6, packed), port, flow, scope)


@given(st.ip_addresses(v=4), st.integers(0, 65535))
def test_parse_of_any_ipv4_address(host: object, port: int) -> None:
    """Address and port come out as they went in, whatever pads the structure."""
    raw = struct.pack("=H", socket.AF_INET) + struct.pack("!H", port) + socket.inet_aton(str(host))
    assert addresses.parse(raw) == addresses.parse(raw + bytes(8)) == (str(host), port)


def test_accept_and_getpeername_agree_for_many() -> None:
    """The addresses of one batch are not mixed up."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.setblocking(False)
        clients = [
            stack.enter_context(socket.create_connection(listener.getsockname())) for _ in range(5)
        ]
        for (fd, raw), client in zip(
            Acceptor(8).accept(listener.fileno(), 8), clients, strict=True
        ):
            connection = stack.enter_context(socket.socket(fileno=fd))
            assert addresses.parse(raw) == connection.getpeername() == client.getsockname()
