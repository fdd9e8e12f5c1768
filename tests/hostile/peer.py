"""The other end of a channel, with bad intentions: ``python -m tests.hostile.peer FD KIND``.

A raw process that uses nothing of handleipc. KIND is a name of ``KINDS``, or ``echo``, the
neighbour that answers each line with itself.
"""

from __future__ import annotations

import json
import select
import socket
import sys
from collections.abc import Callable, Iterator

MIB = 1 << 20
SWITCH = b'{"cmd":"NODE_HANDLEIPC","native":2,"ack":0,"descriptors":65536,"bytes":1099511627776}\n'
QUESTION = b'{"cmd":"NODE_SOCKET_GET_COUNT","key":"k"}'


class Peer:
    """A socket, and what the other end has granted."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._tail = b""
        self._handles = self._sent = 0
        self._may_descriptors = self._may_bytes = 0

    def lines(self) -> Iterator[bytes]:
        """Read lines."""
        while data := self._sock.recv(MIB):
            *lines, self._tail = (self._tail + data).split(b"\n")
            yield from lines

    def write(self, data: bytes) -> None:
        """Write, whatever is granted."""
        self._sock.sendall(data)

    def flood(self, piece: bytes, more: int = 0) -> None:
        """Write native lines for ever, as they are granted; they count ``more`` than their bytes."""
        while True:
            self._read_grants(lambda: self._sent < self._may_bytes)
            self.write(piece)
            self._sent += len(piece) + more

    def flood_handles(self, fd: int, *, runs: bool) -> None:
        """Write native handles of one descriptor for ever, as they are granted."""
        while True:
            self._read_grants(
                lambda: self._handles < self._may_descriptors and self._sent < self._may_bytes
            )
            count = min(64, self._may_descriptors - self._handles)
            first = self._handles + 1
            head = b"" if runs else b"[1,%d]\n" % count
            rows = [b'[2,%d,1,"net.Socket",1]\n' % (first + n) for n in range(count)]
            if runs:
                rows = [b'[4,%d,"net.Socket",[%b]]\n' % (first, b",".join([b"1"] * count))]
            self._handles += count
            self._sent += sum(map(len, rows))
            data = head + b"".join(rows)
            done = socket.send_fds(self._sock, [data], [fd] * count)
            self.write(data[done:])

    def _read_grants(self, may_go_on: Callable[[], bool]) -> None:
        while not may_go_on() or select.select([self._sock], [], [], 0)[0]:
            data = self._sock.recv(MIB)
            if not data:
                sys.exit()
            *lines, self._tail = (self._tail + data).split(b"\n")
            for line in lines:
                value = json.loads(line)
                if isinstance(value, dict) and "descriptors" in value:
                    self._may_descriptors, self._may_bytes = value["descriptors"], value["bytes"]


def _node(piece: bytes) -> Callable[[Peer], None]:
    def run(peer: Peer) -> None:
        while True:
            peer.write(piece)

    return run


def _native(piece: bytes, more: int = 0) -> Callable[[Peer], None]:
    def run(peer: Peer) -> None:
        peer.write(SWITCH)
        peer.flood(piece, more)

    return run


def _lists(size: int) -> bytes:
    return b"[0,[" + b"[]," * (size // 3) + b"1]]\n"


def _handles(*, runs: bool) -> Callable[[Peer], None]:
    def run(peer: Peer) -> None:
        near, _far = socket.socketpair()
        peer.write(SWITCH)
        peer.flood_handles(near.fileno(), runs=runs)

    return run


def _echo(peer: Peer) -> None:
    for line in peer.lines():
        peer.write(line + b"\n")


KINDS: dict[str, Callable[[Peer], None]] = {
    "node lines": _node(b"1\n" * 30_000),
    "native lines": _native(b"[0,1]\n" * 5_000),
    "native runs": _native(b"[5,[%b]]\n" % b",".join([b"1"] * 64) * 50, 50 * 64 * 5),
    "native handles": _handles(runs=False),
    "native runs of handles": _handles(runs=True),
    "native text of 1 MiB": _native(b'[0,"' + b"x" * MIB + b'"]\n'),
    "native text of 64 MiB": _native(b'[0,"' + b"x" * (64 * MIB) + b'"]\n'),
    "native lists, 8 MiB": _native(_lists(8 * MIB)),
    "native lists, 22 MiB": _native(_lists(22 * MIB)),
    "native lists, 64 MiB": _native(_lists(64 * MIB)),
    "node questions": _node(QUESTION + b"\n"),
    "native questions": _native(b"[0," + QUESTION + b"]\n"),
}


def main(fd: int, kind: str) -> None:
    """Play the peer until the other end has had enough."""
    with socket.socket(fileno=fd) as sock:
        try:
            (_echo if kind == "echo" else KINDS[kind])(Peer(sock))
        except (BrokenPipeError, ConnectionResetError):
            pass


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
