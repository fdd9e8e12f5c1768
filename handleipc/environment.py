"""The variables that name a process's channel: given to a child, taken by it as early as can be.

Programs that run before ``await parent()`` would otherwise inherit them with the descriptor: a Node
program then believes the channel to be its own, and takes what was meant for this process. So they
are taken when the package is imported, if what they name is a channel, and kept in ``found``. A
process forked from this one (fork(2)) does not own what was found here; it may be given variables
of its own, as the children of a zygote are.

Knows names and descriptors. Speaks no protocol, and starts nothing.
"""

from __future__ import annotations

import array
import contextlib
import logging
import os
import socket
import stat
import sys
from collections.abc import Mapping, MutableMapping
from types import MappingProxyType

from handleipc.exceptions import NoChannel
from handleipc.limits import Invitation, Limits
from handleipc.texts import quoted
from handleipc.wire import VERSION

__all__ = [
    "ChannelVariables",
    "Taken",
    "adopt",
    "child_environment",
    "found",
    "inherited_channel",
    "is_number",
    "socket_cookie",
    "taken",
]

NODE_CHANNEL_FD = "NODE_CHANNEL_FD"
NODE_CHANNEL_SERIALIZATION_MODE = "NODE_CHANNEL_SERIALIZATION_MODE"
NODE_UNIQUE_ID = "NODE_UNIQUE_ID"
HANDLEIPC_CHANNEL = "HANDLEIPC_CHANNEL"
PREFIXES = ("NODE_CHANNEL_", "HANDLEIPC_")
# Linux only: eight bytes, unique since boot. Elsewhere the inode serves: not unique for ever, but
# a variable that leaked names a socket that is still open.
SO_COOKIE = 57


class Taken:
    """What was taken out of the environment, and the process that it belongs to."""

    def __init__(self) -> None:
        self._variables: dict[str, str] = {}
        self.variables: Mapping[str, str] = MappingProxyType(self._variables)
        self._owner: int | None = None
        self._inode: tuple[int, int] | None = None
        """Of the socket, while it waits to be adopted: its number may be used again."""

    def take_early(self, environment: MutableMapping[str, str]) -> None:
        """Take the variables if they name a channel; else touch nothing. Raises nothing.

        The descriptor becomes close-on-exec. Nothing else about it changes.
        """
        with contextlib.suppress(NoChannel, OSError):
            sock = inherited_channel(environment.get(NODE_CHANNEL_FD, ""))
            try:
                sock.set_inheritable(False)
                self._inode = _inode(sock.fileno())
            finally:
                sock.detach()
            self._keep(_take(environment), environment)
            os.register_at_fork(after_in_child=self._leave_to_the_original)

    def claim(self, environment: MutableMapping[str, str]) -> tuple[Mapping[str, str], int | None]:
        """Return the variables of this process's channel, and its number if it was found early.

        What was found early comes first; then what the environment names now, which is taken.

        Raises:
            NoChannel: nothing names one.
        """
        if self._inode is not None and self._owner == os.getpid():
            number = int(self._variables[NODE_CHANNEL_FD])
            if _inode(number) != self._inode:
                raise NoChannel(
                    f"the channel that this process was started with was descriptor {number}, which"
                    " this program closed before it called parent()"
                )
            return self.variables, number
        variables = _take(environment)
        if variables.get(NODE_CHANNEL_FD):
            return variables, None
        if self._owner not in (None, os.getpid()):
            raise NoChannel(
                f"this process was forked (fork(2)) from process {self._owner}, whose channel it"
                " is: a copy owns none. Start it with handleipc.fork or spawn instead, or let the"
                " original speak for it"
            )
        raise NoChannel(
            f"{NODE_CHANNEL_FD} is not set: start this program with handleipc.fork or spawn,"
            " or from Node with an 'ipc' channel"
        )

    def adopted(self, variables: Mapping[str, str], environment: MutableMapping[str, str]) -> None:
        """Keep the variables of the channel that this process has adopted.

        Its descriptor has an owner now, who closes it in copies of this process.
        """
        self._inode = None
        if variables is not self.variables:
            self._keep(variables, environment)

    def _keep(self, variables: Mapping[str, str], environment: MutableMapping[str, str]) -> None:
        self._variables.clear()
        self._variables.update(variables)
        if NODE_UNIQUE_ID in environment:
            self._variables[NODE_UNIQUE_ID] = environment.pop(NODE_UNIQUE_ID)
        self._owner = os.getpid()

    def _leave_to_the_original(self) -> None:
        """In a process that was just forked: its end must not seem open because of us."""
        if self._inode is not None:
            number = int(self._variables[NODE_CHANNEL_FD])
            if _inode(number) == self._inode:
                os.close(number)
            self._inode = None


def _take(environment: MutableMapping[str, str]) -> dict[str, str]:
    return {k: environment.pop(k) for k in list(environment) if k.startswith(PREFIXES)}


def _inode(number: int) -> tuple[int, int] | None:
    try:
        status = os.fstat(number)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def inherited_channel(text: str) -> socket.socket:
    """Return the socket that a parent passed as this number. Nothing about it is changed.

    Raises:
        NoChannel: the number does not name what a parent would have passed; it is left alone.
    """
    number = int(text) if is_number(text) else -1
    if not 0 <= number < 1 << 31:
        raise NoChannel(f"{NODE_CHANNEL_FD} is {text[:40]!r}, which is no descriptor number")
    try:
        is_socket = stat.S_ISSOCK(os.fstat(number).st_mode)
        inheritable = os.get_inheritable(number)
    except OSError as error:
        raise NoChannel(
            f"{NODE_CHANNEL_FD} is {number}, which is not open ({error.strerror}):"
            " the variable leaked here through a program that did not pass the channel on"
        ) from None
    # What a parent passed survived an exec, so it cannot be close-on-exec. A descriptor that is
    # was opened by this process: under asyncio.run a stale number may be the loop's own self-pipe.
    if not (is_socket and inheritable):
        what = "a descriptor of this process's own" if is_socket else "not a socket"
        raise NoChannel(f"{NODE_CHANNEL_FD} is {number}, which is {what}: the variable is stale")
    sock = socket.socket(fileno=number)
    try:
        connected = sock.family == socket.AF_UNIX and sock.type == socket.SOCK_STREAM
        sock.getpeername()
    except OSError:
        connected = False
    if not connected:
        sock.detach()
        raise NoChannel(
            f"{NODE_CHANNEL_FD} is {number}, which is not a connected Unix stream socket"
        )
    return sock


def is_number(text: str) -> bool:
    """Whether this is a plain decimal number, of no more digits than 2**64 has."""
    return text.isascii() and text.isdigit() and len(text) <= 20


taken: Taken = Taken()
taken.take_early(os.environ)

found: Mapping[str, str] = taken.variables
"""The variables of this process's channel, NODE_UNIQUE_ID among them: empty if it has none.

For programs that play Node's ``cluster`` by hand. Read-only.
"""


class ChannelVariables:
    """What the child found in its environment."""

    __slots__ = ("invited_by", "sock")

    def __init__(self, sock: socket.socket, invited_by: Invitation | None) -> None:
        self.sock: socket.socket = sock
        self.invited_by: Invitation | None = invited_by


def socket_cookie(sock: socket.socket) -> int:
    """Return a number by which both ends of a fork know the same socket."""
    if sys.platform == "linux":
        raw = sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8)
        return array.array("Q", raw)[0]
    return os.fstat(sock.fileno()).st_ino


def child_environment(
    environment: MutableMapping[str, str], fd: int, limits: Limits, invite: int | None
) -> dict[str, str]:
    """Return the child's environment: the given one, without a channel of ours, with its own.

    Node appends its two variables last, so that they win (node-wire.md 1.1).

    Args:
        environment: what the child gets otherwise.
        fd: the number of its channel.
        limits: the parent's, the first grants of the invitation.
        invite: the cookie of the child's end, or None to speak node.
    """
    result = {k: v for k, v in environment.items() if not k.startswith(PREFIXES)}
    if invite is not None:
        result[HANDLEIPC_CHANNEL] = f"{VERSION} {invite} {limits.window} {limits.bytes}"
    result[NODE_CHANNEL_FD] = str(fd)
    result[NODE_CHANNEL_SERIALIZATION_MODE] = "json"
    return result


def adopt(environment: MutableMapping[str, str]) -> ChannelVariables:
    """Take the channel over that this process was started with, and remove its variables.

    The socket becomes close-on-exec, and the variables go (to ``environment.found``), so that no
    grandchild believes the channel to be its own.

    Raises:
        NoChannel: there is none, or the number does not name what a parent would have passed.
        OSError: the system refuses. Nothing was taken.
    """
    variables, number = taken.claim(environment)
    mode = variables.get(NODE_CHANNEL_SERIALIZATION_MODE, "json")
    if mode != "json":
        raise NoChannel(
            f"the parent wants serialization {mode!r}, and only 'json' is supported:"
            " leave the option out, or set it to 'json'"
        )
    sock: socket.socket | None = None
    try:
        if number is None:
            sock = inherited_channel(variables[NODE_CHANNEL_FD])
        else:
            sock = socket.socket(fileno=number)
        invited_by = _read_invitation(variables.get(HANDLEIPC_CHANNEL, ""), sock)
        sock.setblocking(False)
        sock.set_inheritable(False)
    except OSError:
        if sock is not None:
            sock.detach()
        if number is None:
            environment.update(variables)
        raise
    taken.adopted(variables, environment)
    return ChannelVariables(sock, invited_by)


def _read_invitation(text: str, sock: socket.socket) -> Invitation | None:
    """Read an invitation; None if there is none, or it is for another socket or version.

    It may have leaked through a Node process in between, whose own channel this one is not.
    """
    fields = text.split(" ")
    if len(fields) < 4:
        return None
    versions, numbers = fields[0], fields[1:4]
    if not all(map(is_number, numbers)):
        return None
    cookie, descriptors, size = map(int, numbers)
    if cookie != socket_cookie(sock):
        return None
    if str(VERSION) not in versions.split(","):
        logging.getLogger("handleipc").warning(
            "the parent speaks version %s of the native dialect and this process version %d, so"
            " they speak Node's: use the same version of handleipc in both",
            quoted(versions, 40),
            VERSION,
        )
        return None
    return Invitation(descriptors, size)
