"""The two system calls that move bytes with descriptors, and accept: skins over the C core.

Together with ``framing`` the only module that may name ``_core``. Called by the fronts alone; no
pure layer sees a socket.
"""

from __future__ import annotations

import enum
import errno
import os

from handleipc._core import ffi, lib
from handleipc.wire.framing import MAX_ENDS, Batch, LineFramer, LongLine

__all__ = [
    "KIND_FIFO",
    "KIND_LISTENING",
    "KIND_OTHER",
    "KIND_SOCKET",
    "Acceptor",
    "Receiver",
    "Refused",
    "adopt",
    "close_received",
    "descriptor_kind",
    "discard",
    "end_stream",
    "exit_with_parent",
    "inherits_signals",
    "reset_signals",
    "send_with_fds",
]

KIND_SOCKET: int = lib.HIPC_KIND_SOCKET
KIND_LISTENING: int = lib.HIPC_KIND_LISTENING
KIND_FIFO: int = lib.HIPC_KIND_FIFO
KIND_OTHER: int = lib.HIPC_KIND_OTHER

DRAINED: int = lib.HIPC_DRAINED
MORE: int = lib.HIPC_MORE
FULL: int = lib.HIPC_FULL
EOF: int = lib.HIPC_EOF

_hipc_send = lib.hipc_send
_hipc_send_parts = lib.hipc_send_parts
_hipc_receive = lib.hipc_receive

# One wake-up of the event loop reads this much, then others get their turn.
READ_BUDGET = 256 * 1024


class Refused(enum.Enum):
    """Why ``send_with_fds`` wrote nothing, and what to wait for."""

    AGAIN = "until the socket is writable"
    IN_FLIGHT = "for a while: too many descriptors in flight"
    NO_MEMORY = "for a while, or for ever: no memory for so much at once"


_REFUSALS = {
    -errno.EAGAIN: Refused.AGAIN,
    -errno.EWOULDBLOCK: Refused.AGAIN,
    -errno.ETOOMANYREFS: Refused.IN_FLIGHT,
    -errno.ENOBUFS: Refused.NO_MEMORY,
    -errno.ENOMEM: Refused.NO_MEMORY,
}


def send_with_fds(fd: int, data: bytes | LongLine, offset: int, fds: list[int]) -> int | Refused:
    """Write ``data[offset:]`` with borrowed descriptors attached to its first byte.

    Returns:
        The number of bytes written, at least 1; or what to wait for.

    Raises:
        OSError: the write failed for good (EPIPE, EBADF, ...); nothing was written.
    """
    if isinstance(data, bytes):
        written = _hipc_send(fd, data, offset, len(data), fds, len(fds))
    else:
        written = _send_parts(fd, data, offset, fds)
    if written >= 0:
        return written
    refused = _REFUSALS.get(written)
    if refused is None:
        raise OSError(-written, os.strerror(-written))
    return refused


def _send_parts(fd: int, line: LongLine, offset: int, fds: list[int]) -> int:
    head, body, tail = line.head, line.body, line.tail
    return _hipc_send_parts(
        fd, head, len(head), body, len(body), tail, len(tail), offset, fds, len(fds)
    )


def descriptor_kind(fd: int) -> int:
    """Return what ``fd`` is (the ``HIPC_KIND_`` values of csrc/hipc_api.h).

    Raises:
        OSError: it is not open, or the system does not tell.
    """
    kind = lib.hipc_kind(fd)
    if kind < 0:
        raise OSError(-kind, os.strerror(-kind))
    return kind


def adopt(fd: int) -> int:
    """Return what a received descriptor is, as ``descriptor_kind``; make a socket non-blocking.

    Raises:
        OSError: it is not open.
    """
    kind = lib.hipc_adopt(fd)
    if kind < 0:
        raise OSError(-kind, os.strerror(-kind))
    return kind


def close_received(fd: int) -> None:
    """Close for the application a descriptor that a peer has had in its hands; never wait for it.

    For whatever was received, or came back from a peer: with the SO_LINGER that its sender may
    have set, ``os.close`` would block until the far end has taken what was written.

    Raises:
        OSError: as ``os.close`` raises it; EINTR counts as closed.
    """
    error = lib.hipc_close(fd)
    if error < 0:
        raise OSError(-error, os.strerror(-error))


def discard(*fds: int) -> None:
    """Close descriptors that nobody is to get, as ``close_received``, and raise nothing.

    Whatever close(2) says of one: the number is free afterwards, and nobody could do anything.
    """
    for fd in fds:
        lib.hipc_close(fd)


def end_stream(fd: int, data: bytes) -> int:
    """Write ``data`` to a connection, send FIN after the last of it, and drop what has come.

    Returns:
        How many bytes were written. Fewer than there are: the socket is full, and has no FIN yet.
        One more than there are: the other end has sent its FIN or is gone, nothing is left to do.

    Raises:
        OSError: the write failed, or the descriptor is not open.
    """
    written = lib.hipc_end(fd, data, len(data))
    if written < 0:
        raise OSError(-written, os.strerror(-written))
    return written


def exit_with_parent(signal: int, parent: int) -> None:
    """Have this process sent ``signal`` when the thread that started it ends.

    To be called in a new process, before it executes its program. Ends it at once if the parent
    has ended already.
    """
    if lib.hipc_exit_with_parent(signal, parent) < 0:
        os._exit(1)


def inherits_signals() -> bool:
    """Whether a program started by this thread would begin with blocked or ignored signals."""
    return bool(lib.hipc_signals_inherited())


def reset_signals() -> None:
    """Set every signal to its default and block none.

    To be called in a new process, before it executes its program.
    """
    lib.hipc_reset_signals()


class Receiver:
    """Reads one channel socket into a framer. Owns what was received and not yet taken."""

    def __init__(self, framer: LineFramer) -> None:
        self._framer = framer
        self.at_eof: bool = False
        self.drained: bool = False
        self.must_go_on: bool = False
        """Whether ``receive`` is to be called again without waiting for the socket.

        The buffer holds lines that the last report had no room for, or a read failed after others
        had succeeded: libuv, for one, stops polling a socket that reported an error.
        """

    def receive(self, fd: int, budget: int = READ_BUDGET, lines: int = MAX_ENDS) -> Batch:
        """Read until the socket is empty or ``budget`` bytes have come; return the lines.

        No more than ``lines`` of them: the rest stays in the buffer, and ``must_go_on`` is set.

        Afterwards ``drained`` says whether the socket was empty, ``at_eof`` whether it has ended.

        Raises:
            OSError: the read failed (ECONNRESET, EBADF, ...), with nothing received before it.
            LineTooLong, LocalProtocolError: as ``LineFramer.grow``.
        """
        framer = self._framer
        self.must_go_on = False
        if framer.is_large:
            framer.shrink()
        framer.reader.max_ends = min(lines, MAX_ENDS)  # the room that the report has
        outcome = _hipc_receive(fd, framer.reader, budget)
        if outcome < 0:
            raise OSError(-outcome, os.strerror(-outcome))
        self.drained = outcome == DRAINED
        self.at_eof = outcome == EOF
        if outcome == FULL:
            framer.grow()  # first: if it raises, what came is not taken, and closed by close()
        batch = framer.take_batch()
        reader = framer.reader
        self.must_go_on = outcome == MORE and (reader.scanned < reader.filled or bool(reader.error))
        return batch

    @property
    def position(self) -> int:
        """Bytes received so far."""
        reader = self._framer.reader
        return int(reader.position + reader.filled)

    def close(self) -> None:
        """Close the descriptors that were received and never taken."""
        for leftover in self._framer.take_sets():
            discard(*leftover.fds)


class Acceptor:
    """Accepts connections in batches, each with the address the kernel gave along."""

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._fds = ffi.new("int32_t[]", batch)
        self._addresses = ffi.new("char[]", batch * lib.HIPC_ADDRESS_SIZE)
        self._lengths = ffi.new("int32_t[]", batch)

    def accept(self, fd: int, limit: int) -> list[tuple[int, bytes]]:
        """Accept at most ``limit`` connections from the listening socket ``fd``.

        Returns:
            Pairs of a descriptor (non-blocking, close-on-exec, the caller's) and the peer's
            address as the kernel's bytes. Empty if nobody is waiting.

        Raises:
            OSError: EMFILE and the like; nothing was accepted.
        """
        count = lib.hipc_accept(
            fd, min(limit, self._batch), self._fds, self._addresses, self._lengths
        )
        if count == -errno.EAGAIN:
            return []
        if count < 0:
            raise OSError(-count, os.strerror(-count))
        size = lib.HIPC_ADDRESS_SIZE
        raw = bytes(ffi.buffer(self._addresses)[: count * size])
        return [
            (self._fds[i], raw[i * size : i * size + self._lengths[i]])  # type: ignore[index]
            for i in range(count)
        ]
