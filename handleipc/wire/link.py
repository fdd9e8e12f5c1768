"""The socket of one channel: what the kernel takes and gives, and in what order its sides close.

Knows bytes, descriptors and errors of the kernel. Knows no protocol and no event loop: a front
says when to read and write, ``protocol`` what.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import select
import socket
import sys
import termios
from collections.abc import Callable

from handleipc.system import close_quietly
from handleipc.wire.envelope import RUN_BYTES
from handleipc.wire.framing import MAX_ENDS, Batch, LineFramer, LongLine
from handleipc.wire.gaps import Gaps
from handleipc.wire.peer import Peer, peer_of, peer_pidfd
from handleipc.wire.syscalls import READ_BUDGET, Receiver, Refused, send_with_fds

__all__ = ["Link"]

# The kernel keeps four bytes of buffer accounting or fewer for each byte it can hold.
BUFFER_FACTOR = 4
# Where the size of the buffer cannot be learnt.
USUAL_BUFFER = 1 << 20


class Link:
    """One end of the socket pair; owns it, and closes it if it cannot be used.

    Args:
        sock: the connected Unix stream socket.
        line_limit: longest line in bytes; a run of the native dialect may be longer.
        node_pid: returns the id of a peer's process that may be another program than this package.

    Raises:
        OSError, MemoryError: the system has no room for it.
    """

    def __init__(
        self, sock: socket.socket, line_limit: int, node_pid: Callable[[], int] = lambda: 0
    ) -> None:
        self._sock = sock
        self.fd: int = sock.fileno()
        self.peer: Peer = peer_of(sock)
        try:
            sock.setblocking(False)
            self._receiver = Receiver(LineFramer(max(line_limit, RUN_BYTES)))
        except BaseException:
            self.forget()
            raise
        self._gaps = Gaps(node_pid, self.peer_has_read)
        self._receives = True
        self.at_eof: bool = False
        self.must_go_on: bool = False
        """Of the last read: whether nothing can follow, and whether to read again without waiting
        for the socket; see ``Receiver``."""
        self.has_more: bool = False
        """Whether the last read left anything, there or in the socket, as far as it knows. To be
        read without waiting for the socket: libuv, for one, stops polling one with an error behind
        what is left to read."""
        self._is_finite = False
        """Whether nothing can be added to what is there to be read."""

    @property
    def _has_read(self) -> bool:
        return self._receiver.position > 0

    def fileno(self) -> int:
        """Return the descriptor, borrowed; -1 once closed."""
        return self._sock.fileno()

    def read(self, lines: int = MAX_ENDS, budget: int = READ_BUDGET) -> Batch:
        """Read up to so many lines and bytes. Raises as ``Receiver.receive``."""
        receiver = self._receiver
        self.must_go_on = self.has_more = False
        batch = receiver.receive(self.fd, budget, lines)
        self.at_eof, self.must_go_on = receiver.at_eof, receiver.must_go_on
        self.has_more = not (receiver.drained or receiver.at_eof)
        return batch

    def read_rest(self) -> Batch:
        """Read as ``read``, at an end: what is there, then EOF.

        That the peer closed with something of ours unread (ECONNRESET) the kernel says once, and
        then EOF. Should it say so for ever, nobody knows what was left.
        """
        try:
            return self.read()
        except ConnectionError:
            return self.read()

    def write(self, data: bytes | LongLine, offset: int, fds: list[int]) -> int | Refused:
        """Write ``data`` from ``offset`` on, and descriptors. As ``send_with_fds``."""
        gaps = self._gaps
        if fds and gaps.matter is not False and gaps.must_be_left(has_spoken=self._has_read):
            return Refused.IN_FLIGHT
        return send_with_fds(self.fd, data, offset, fds)

    def wait(self, seconds: float, *, writing: bool) -> bool:
        """Block until the socket is readable, or with ``writing`` writable, or the time is over.

        Returns:
            Whether there may be something to read.
        """
        poll = select.poll()
        poll.register(self.fd, select.POLLIN | (select.POLLOUT if writing else 0))
        return any(events & ~select.POLLOUT for _, events in poll.poll(int(seconds * 1000) + 1))

    def peer_lives(self) -> bool:
        """Say whether the peer has half closed at most: else POLLHUP is set (Linux, BSD)."""
        poll = select.poll()
        poll.register(self.fd, 0)
        try:
            return not any(events & select.POLLHUP for _, events in poll.poll(0))
        except OSError:  # no memory: who may live is not taken for dead
            return True

    def peer_has_read(self) -> bool:
        """Say whether the peer has read all that was written (SIOCOUTQ; true where unknown)."""
        if sys.platform != "linux":
            return True
        size = array.array("i", [0])
        try:
            fcntl.ioctl(self.fd, termios.TIOCOUTQ, size)  # SIOCOUTQ is the same number
        except OSError:
            return False
        return size[0] == 0

    def peer_pidfd(self) -> int:
        """Return a pidfd of the process that made the peer's end, or -1; the caller's."""
        return peer_pidfd(self._sock)

    # -- the end ---------------------------------------------------------------------------------

    def stop_receiving(self) -> None:
        """Shut the reading side down: what the peer writes from now on fails there.

        What it has written stays readable on Linux; BSD drops it, so it is to be read before.
        """
        if self._receives:
            self._receives = False
            with contextlib.suppress(OSError):  # ENOTCONN: the peer is gone
                self._sock.shutdown(socket.SHUT_RD)
                self._is_finite = True

    def rest(self) -> int:
        """Return up to which position there may be something to read, that is there now."""
        try:
            size = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) * BUFFER_FACTOR
        except OSError:
            size = USUAL_BUFFER
        return self._receiver.position + size

    def has_rest(self, most: int) -> bool:
        """Say whether there may be more, up to the position that ``rest`` returned.

        Up to the end where the reading side is shut down, however much the peer was allowed.
        """
        receiver = self._receiver
        if receiver.at_eof or receiver.drained:
            return False
        return self._is_finite or receiver.position <= most

    def close(self) -> None:
        """Shut both sides down and close the socket, with all that was received and not taken.

        Shut down first: a forked copy of this process may hold the socket open, and the peer is to
        learn of the end all the same.
        """
        self._receiver.close()
        with contextlib.suppress(OSError):  # ENOTCONN: the peer is gone
            self._sock.shutdown(socket.SHUT_RDWR)
        self.forget()

    def forget(self) -> None:
        """Close this process's copy of the socket, and leave the channel itself as it is."""
        close_quietly(self._sock)
