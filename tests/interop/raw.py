"""A hand-written peer: JSON lines and descriptors on a blocking socket, with no rules at all."""

from __future__ import annotations

import array
import contextlib
import inspect
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

PATIENCE = 20.0

ACK = {"cmd": "NODE_HANDLE_ACK"}
NACK = {"cmd": "NODE_HANDLE_NACK"}

PRELUDE = """
import asyncio, gc, json, logging, os, socket, sys, time
import handleipc
from child import run

"""


def envelope(kind: str, message: Any, **more: Any) -> dict[str, Any]:
    """Return what Node writes for a handle."""
    return {"cmd": "NODE_HANDLE", "type": kind, "msg": message, **more}


class RawPeer:
    """Reads and writes lines. Descriptors must come with the first byte of a line."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(PATIENCE)

    def send(self, message: Any, *fds: int) -> None:
        """Write one line: ``bytes`` as they are, anything else as JSON."""
        line = message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n"
        if fds:
            sent = socket.send_fds(self.sock, [line], list(fds))
            line = line[sent:]
        self.sock.sendall(line)

    def recv_line(self) -> tuple[bytes, list[int]]:
        """Read one line and the descriptors of its first byte; ``b""`` at the end."""
        try:
            line, fds = self._recv(1)
            while line and not line.endswith(b"\n"):
                more = self.sock.recv(65536, socket.MSG_PEEK)
                if not more:
                    raise EOFError(line)
                chunk, late = self._recv(more.find(b"\n") + 1 or len(more))
                assert not late, f"descriptors with byte {len(line)} of {line[:100]!r}"
                line += chunk
        except ConnectionResetError:
            return b"", []
        return line, fds

    def _recv(self, size: int) -> tuple[bytes, list[int]]:
        space = socket.CMSG_SPACE(16 * 4)
        data, ancillary, flags, _ = self.sock.recvmsg(size, space, socket.MSG_CMSG_CLOEXEC)
        assert not flags & socket.MSG_CTRUNC
        fds = array.array("i")
        for _, _, content in ancillary:
            fds.frombytes(content)
        return data, list(fds)

    def recv(self) -> Any:
        """Read a line that comes without a descriptor."""
        line, fds = self.recv_line()
        assert not fds, fds
        if not line:
            raise EOFError
        return json.loads(line)

    def recv_handle(self) -> tuple[Any, int]:
        """Read a line that comes with one descriptor."""
        line, fds = self.recv_line()
        assert len(fds) == 1, (line[:200], fds)
        return json.loads(line), fds[0]

    def rest(self) -> list[Any]:
        """Read until the end."""
        lines: list[Any] = []
        while True:
            line, fds = self.recv_line()
            for fd in fds:
                os.close(fd)
            if not line:
                return lines
            lines.append(json.loads(line))

    def disconnect(self) -> list[Any]:
        """Say that nothing more comes, and read what the other end had still to say."""
        self.sock.shutdown(socket.SHUT_WR)
        return self.rest()


class RawParent(RawPeer):
    """The raw parent of a Python child."""

    process: subprocess.Popen[str]

    def finish(self, returncode: int = 0) -> str:
        """Close the channel, wait for the child, and return what it printed."""
        self.sock.close()
        output, errors = self.process.communicate(timeout=PATIENCE)
        assert (self.process.returncode, errors) == (returncode, "")
        return output


@contextlib.contextmanager
def raw_parent(folder: Path, text: str, *argv: str) -> Iterator[RawParent]:
    """Start the Python child of a raw parent. ``text`` defines ``main(parent)``."""
    path = folder / "program.py"
    path.write_text(PRELUDE + inspect.cleandoc(text) + "\n\nrun(main)\n")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        raw = RawParent(ours)
        raw.process = subprocess.Popen(
            [sys.executable, "-W", "error", path, *argv],
            env={
                **os.environ,
                "PYTHONPATH": str(HERE),
                "NODE_CHANNEL_FD": str(theirs.fileno()),
                "NODE_CHANNEL_SERIALIZATION_MODE": "json",
            },
            pass_fds=[theirs.fileno()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with raw.process:
            theirs.close()
            try:
                yield raw
            except BaseException:
                raw.process.kill()
                _, errors = raw.process.communicate()
                print("the child's errors:", errors, sep="\n")
                raise
            finally:
                raw.process.kill()


@contextlib.contextmanager
def tcp_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected, blocking TCP sockets: a client, and what a server accepted from it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname(), timeout=PATIENCE)
        accepted, _ = server.accept()
    with client, accepted:
        yield client, accepted
