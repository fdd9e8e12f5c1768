"""What a child needs to find its channel, as data; and reading that back in the child.

Knows names of environment variables and arguments. Starts nothing: the fronts do.
"""

from __future__ import annotations

import array
import os
import socket
import stat
import sys
from collections.abc import MutableMapping, Sequence

from handleipc.envelope import VERSION
from handleipc.exceptions import NoChannel
from handleipc.limits import Limits
from handleipc.protocol import Invitation

__all__ = [
    "ChannelVariables",
    "adopt",
    "child_environment",
    "python_command",
    "socket_cookie",
]

NODE_CHANNEL_FD = "NODE_CHANNEL_FD"
NODE_CHANNEL_SERIALIZATION_MODE = "NODE_CHANNEL_SERIALIZATION_MODE"
HANDLEIPC_CHANNEL = "HANDLEIPC_CHANNEL"
_PREFIXES = ("NODE_CHANNEL_", "HANDLEIPC_")

# Linux only: eight bytes, unique since boot. Elsewhere the inode serves: not unique for ever, but
# a variable that leaked names a socket that is still open.
_SO_COOKIE = 57


class ChannelVariables:
    """What the child found in its environment."""

    __slots__ = ("invited_by", "sock")

    def __init__(self, sock: socket.socket, invited_by: Invitation | None) -> None:
        self.sock = sock
        self.invited_by = invited_by


def socket_cookie(sock: socket.socket) -> int:
    """Return a number by which both ends of a fork know the same socket."""
    if sys.platform == "linux":
        raw = sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8)
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
    result = {k: v for k, v in environment.items() if not k.startswith(_PREFIXES)}
    if invite is not None:
        result[HANDLEIPC_CHANNEL] = f"{VERSION} {invite} {limits.window} {limits.bytes}"
    result[NODE_CHANNEL_FD] = str(fd)
    result[NODE_CHANNEL_SERIALIZATION_MODE] = "json"
    return result


def adopt(environment: MutableMapping[str, str]) -> ChannelVariables:
    """Take the channel over that this process was started with, and remove its variables.

    The socket becomes close-on-exec, and the variables go, so that no grandchild believes the
    channel to be its own.

    Raises:
        NoChannel: there is none, or the number does not name what a parent would have passed.
    """
    found = {k: environment.pop(k) for k in list(environment) if k.startswith(_PREFIXES)}
    text = found.get(NODE_CHANNEL_FD, "")
    if not text:
        raise NoChannel(
            f"{NODE_CHANNEL_FD} is not set: start this program with handleipc.fork or spawn,"
            " or from Node with an 'ipc' channel"
        )
    mode = found.get(NODE_CHANNEL_SERIALIZATION_MODE, "json")
    if mode != "json":
        raise NoChannel(
            f"the parent wants serialization {mode!r}, and only 'json' is supported:"
            " leave the option out, or set it to 'json'"
        )
    sock = _adopt_socket(text)
    return ChannelVariables(sock, _read_invitation(found.get(HANDLEIPC_CHANNEL, ""), sock))


def _adopt_socket(text: str) -> socket.socket:
    fd = int(text) if _is_number(text) else -1
    if not 0 <= fd < 1 << 31:
        raise NoChannel(f"{NODE_CHANNEL_FD} is {text[:40]!r}, which is no descriptor number")
    try:
        is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
        inheritable = os.get_inheritable(fd)
    except OSError as error:
        raise NoChannel(
            f"{NODE_CHANNEL_FD} is {fd}, which is not open ({error.strerror}):"
            " the variable leaked here through a program that did not pass the channel on"
        ) from None
    # What a parent passed survived an exec, so it cannot be close-on-exec. A descriptor that is
    # was opened by this process: under asyncio.run a stale number may be the loop's own self-pipe.
    if not (is_socket and inheritable):
        what = "a descriptor of this process's own" if is_socket else "not a socket"
        raise NoChannel(f"{NODE_CHANNEL_FD} is {fd}, which is {what}: the variable is stale")
    sock = socket.socket(fileno=fd)
    try:
        connected = sock.family == socket.AF_UNIX and sock.type == socket.SOCK_STREAM
        sock.getpeername()
    except OSError:
        connected = False
    if not connected:
        sock.detach()
        raise NoChannel(f"{NODE_CHANNEL_FD} is {fd}, which is not a connected Unix stream socket")
    sock.set_inheritable(False)
    sock.setblocking(False)
    return sock


def _read_invitation(text: str, sock: socket.socket) -> Invitation | None:
    """Read an invitation; None if there is none, or it is for another socket or version.

    It may have leaked through a Node process in between, whose own channel this one is not.
    """
    fields = text.split(" ")
    if len(fields) < 4:
        return None
    versions, numbers = fields[0].split(","), fields[1:4]
    if str(VERSION) not in versions or not all(map(_is_number, numbers)):
        return None
    cookie, descriptors, size = map(int, numbers)
    return Invitation(descriptors, size) if cookie == socket_cookie(sock) else None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 20  # 2**64 has as many


def python_command(
    target: str | os.PathLike[str],
    args: Sequence[str],
    executable: str,
    interpreter_args: Sequence[str],
    path: Sequence[str],
) -> list[str]:
    """Return the command line that runs ``target`` in a fresh interpreter.

    Raises:
        ValueError: the target is neither a file, nor a module, nor ``module:function``.
    """
    command = [executable, *interpreter_args]
    if not isinstance(target, str) or target.endswith(".py") or "/" in target:
        path_of_file = os.fspath(target)
        # Not an option of the interpreter, whatever the file is called.
        prefix = "./" if path_of_file.startswith("-") else ""
        return [*command, prefix + path_of_file, *args]
    module, colon, function = target.partition(":")
    names = [*module.split("."), *([function] if colon else [])]
    if not all(name.isidentifier() for name in names):
        raise ValueError(
            f"{target!r} is no target: give the path of a .py file, a dotted module,"
            " or 'module:function'"
        )
    if not colon:
        return [*command, "-m", module, *args]
    if module == "__main__":
        raise ValueError("a function of __main__ cannot be imported elsewhere: move it to a module")
    program = (
        f"import sys; sys.path[:] = {list(path)!r};"
        f" from handleipc.asyncio.target import run; run({module!r}, {function!r})"
    )
    return [*command, "-c", program, *args]
