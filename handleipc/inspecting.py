"""The channels of another process, as the kernel shows them: whose the other ends are, what waits.

Linux: the sockets are those of /proc, and who is joined to whom is asked by netlink (sock_diag(7),
UNIX_DIAG). Nothing of the process is touched or stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from handleipc.environment import NODE_CHANNEL_FD
from handleipc.texts import readable

__all__ = ["End", "command_of", "ends_of", "parse_sockets"]

# Of linux/netlink.h, linux/sock_diag.h and linux/unix_diag.h.
NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLM_F_REQUEST_DUMP = 0x301
NLMSG_ERROR, NLMSG_DONE = 2, 3
UDIAG_SHOW_PEER, UDIAG_SHOW_RQLEN = 0x04, 0x10
UNIX_DIAG_PEER, UNIX_DIAG_RQLEN = 2, 4
ESTABLISHED = 1
HEADER = struct.Struct("=IHHII")
REQUEST = struct.Struct("=BBHIIIII")
SOCKET = struct.Struct("=BBBxI8x")
ATTRIBUTE = struct.Struct("=HH")
NUMBER = struct.Struct("=I")
ERROR = struct.Struct("=i")
ANSWER_BYTES = 1 << 16
# The kernel answers at once.
PATIENCE = 5.0


@dataclasses.dataclass(frozen=True, slots=True)
class End:
    """One connected Unix stream socket of a process.

    ``peers`` are the processes that have the other end open, as far as this user may see: none, if
    they are another user's. ``unread`` are bytes that it has not read, ``unread_there`` those that
    the other end has not.
    """

    fd: int
    to: str
    """``"parent"`` or ``"child"``, if it is a channel that a child was started with."""
    peers: list[int]
    unread: int
    unread_there: int

    def __str__(self) -> str:
        what = f"channel to its {self.to}" if self.to else "socket"
        names = ", ".join(f"{pid} ({command_of(pid)})" for pid in self.peers)
        return (
            f"fd {self.fd}, {what}: {names or 'a process that you may not see'};"
            f" {self.unread} bytes wait here, {self.unread_there} there"
        )


def ends_of(pid: int) -> list[End]:
    """Return the connected Unix stream sockets of a process, in the order of their numbers.

    But for those that join the process to itself, as an event loop has one to wake it.

    Raises:
        ProcessLookupError: there is no such process.
        PermissionError: it is another user's.
        OSError: the kernel does not tell.
    """
    try:
        numbers = dict(_socket_inodes(pid))
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None
    sockets = _unix_sockets()
    peers = {sockets[inode][0] for inode in numbers.values() if inode in sockets}
    holders = _holders(peers)
    own = _channel_number(pid)
    ends = []
    for fd, inode in sorted(numbers.items()):
        if inode not in sockets or sockets[inode][0] not in sockets:
            continue
        peer, unread = sockets[inode]
        others = holders.get(peer, {})
        if list(others) == [pid]:
            continue
        to = ""
        if fd == own:
            to = "parent"
        elif any(_channel_number(other) == number for other, number in others.items()):
            to = "child"
        ends.append(End(fd, to, sorted(others), unread, sockets[peer][1]))
    return ends


def command_of(pid: int) -> str:
    """Return the command line of a process, shortened; ``"?"`` if it has gone."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "?"
    return readable(b" ".join(words).decode(errors="replace").strip(), 60)


def _socket_inodes(pid: int) -> Iterator[tuple[int, int]]:
    """Yield number and inode of each socket that a process has open."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(f"/proc/{pid}/fd/{name}"))
            if found:
                yield int(name), int(found[1])


def _holders(inodes: set[int]) -> dict[int, dict[int, int]]:
    """Return, by inode, the processes that have one of these sockets open, and its number there."""
    holders: dict[int, dict[int, int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):  # another user's, or gone
                for fd, inode in _socket_inodes(int(name)):
                    if inode in inodes:
                        holders.setdefault(inode, {})[int(name)] = fd
    return holders


def _channel_number(pid: int) -> int | None:
    """Return the number under which a process was given its channel, if it was given one."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    prefix = f"{NODE_CHANNEL_FD}=".encode()
    for variable in variables:
        if variable.startswith(prefix) and variable[len(prefix) :].isdigit():
            return int(variable[len(prefix) :])
    return None


def _unix_sockets() -> dict[int, tuple[int, int]]:
    """Return, by inode, the inode of the peer and the bytes unread of connected stream sockets."""
    if not hasattr(socket, "AF_NETLINK"):
        raise OSError(errno.EPROTONOSUPPORT, os.strerror(errno.EPROTONOSUPPORT))
    request = REQUEST.pack(
        socket.AF_UNIX, 0, 0, 1 << ESTABLISHED, 0, UDIAG_SHOW_PEER | UDIAG_SHOW_RQLEN, 0, 0
    )
    header = HEADER.pack(HEADER.size + len(request), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST_DUMP, 1, 0)
    sockets: dict[int, tuple[int, int]] = {}
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(PATIENCE)
        netlink.send(header + request)
        while not parse_sockets(netlink.recv(ANSWER_BYTES), sockets):
            pass
    return sockets


def parse_sockets(data: bytes, sockets: dict[int, tuple[int, int]]) -> bool:
    """Add the sockets of one answer of the kernel. Returns whether it was the last.

    Raises:
        OSError: the kernel refuses, or its answer is cut off.
    """
    at = 0
    while at + HEADER.size <= len(data):
        length, kind, *_ = HEADER.unpack_from(data, at)
        if kind == NLMSG_DONE:
            return True
        if kind == NLMSG_ERROR:
            code = -ERROR.unpack_from(data, at + HEADER.size)[0]
            raise OSError(code, os.strerror(code))
        if not HEADER.size + SOCKET.size <= length <= len(data) - at:
            raise OSError(errno.EBADMSG, "its answer is cut off")
        _, type_, _, inode = SOCKET.unpack_from(data, at + HEADER.size)
        numbers = _attributes(data[at + HEADER.size + SOCKET.size : at + length])
        if type_ == socket.SOCK_STREAM and UNIX_DIAG_PEER in numbers:
            sockets[inode] = numbers[UNIX_DIAG_PEER], numbers.get(UNIX_DIAG_RQLEN, 0)
        at += (length + 3) & ~3
    return False


def _attributes(data: bytes) -> dict[int, int]:
    """Return the attributes of one socket that are numbers: the first number of each."""
    found: dict[int, int] = {}
    at = 0
    while at + ATTRIBUTE.size <= len(data):
        length, kind = ATTRIBUTE.unpack_from(data, at)
        if length < ATTRIBUTE.size:
            break
        if length >= ATTRIBUTE.size + NUMBER.size:
            found[kind] = NUMBER.unpack_from(data, at + ATTRIBUTE.size)[0]
        at += (length + 3) & ~3
    return found
