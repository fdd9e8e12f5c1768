"""Sees the process at the other end of a socket pair end, though copies of it hold its descriptors.

A forked copy of a parent (a process pool's worker) keeps the parent's end of the channel open, so
there is no EOF when the parent is killed. The kernel says which process made the socket pair; never
``getppid()``, since a shell may stand between.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from typing import NamedTuple

__all__ = ["Peer", "peer_of", "peer_pidfd"]

# asm-generic/socket.h, Linux 6.5: a pidfd of the process that SO_PEERCRED names.
_SO_PEERPIDFD = 77
_UCRED = "3i"


class Peer(NamedTuple):
    """The process that made the other end of a socket, as the kernel knows it.

    Attributes:
        pid: 0 where the system hides it, as in another PID namespace.
        uid, gid: whom it ran as then; None where the system does not say.
    """

    pid: int
    uid: int | None
    gid: int | None


def peer_of(sock: socket.socket) -> Peer:
    """Return who made the other end: called connect or listen, or made the socket pair."""
    if sys.platform != "linux":
        return Peer(0, None, None)
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(_UCRED))
    except OSError:
        return Peer(0, None, None)
    return Peer(*struct.unpack(_UCRED, raw))


def peer_pidfd(sock: socket.socket) -> int:
    """Return a pidfd of the process that made the other end; -1 if there is none to watch.

    There is none on other systems than Linux, in another PID namespace (the pid is 0), of this
    process itself, and when that process has ended already: somebody else has its end then. The
    descriptor is close-on-exec, and the caller's.
    """
    pid = peer_of(sock).pid
    if pid in (0, os.getpid()):
        return -1
    try:
        try:
            # Of just that process, even if the number has another one since.
            fd = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
        except OSError:
            return os.pidfd_open(pid)
        os.set_inheritable(fd, False)
        return fd
    except OSError:
        return -1
