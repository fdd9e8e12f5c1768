"""What a child needs to find its channel, as data; and reading that back in the child.

Knows names of environment variables and arguments. Starts nothing: the fronts do.
"""

from __future__ import annotations

import array
import os
import socket
import sys
from collections.abc import MutableMapping, Sequence
from typing import NamedTuple

from handleipc.envelope import VERSION
from handleipc.environment import (
    HANDLEIPC_CHANNEL,
    NODE_CHANNEL_FD,
    NODE_CHANNEL_SERIALIZATION_MODE,
    PREFIXES,
    inherited_channel,
    is_number,
    taken,
)
from handleipc.exceptions import NoChannel
from handleipc.limits import Limits
from handleipc.protocol import Invitation

__all__ = [
    "FORK_MARKER",
    "ChannelVariables",
    "Target",
    "adopt",
    "child_environment",
    "frozen_command",
    "python_command",
    "read_target",
    "socket_cookie",
]

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
    versions, numbers = fields[0].split(","), fields[1:4]
    if str(VERSION) not in versions or not all(map(is_number, numbers)):
        return None
    cookie, descriptors, size = map(int, numbers)
    return Invitation(descriptors, size) if cookie == socket_cookie(sock) else None


class Target(NamedTuple):
    """What ``fork`` runs: a file, or a module, or a function of one."""

    file: str | None = None
    module: str = ""
    function: str = ""


def read_target(target: str | os.PathLike[str]) -> Target:
    """Return what a target means.

    Raises:
        ValueError: it is neither a file, nor a module, nor ``module:function``.
        TypeError: it is no text and no path.
    """
    if callable(target) and hasattr(target, "__qualname__"):
        raise TypeError(
            f"a child imports what it runs: give its name, {_name_of(target)}, not the object"
        )
    if not isinstance(target, str | os.PathLike):
        raise TypeError(f"target={target!r}: {_TARGETS}")
    if not isinstance(target, str) or target.endswith(".py") or "/" in target:
        return Target(file=os.fspath(target))
    module, colon, function = target.partition(":")
    names = [*module.split("."), *([function] if colon else [])]
    if not all(name.isidentifier() for name in names):
        raise ValueError(f"{target!r} is no target: {_TARGETS}")
    if module == "__main__" and colon:
        raise ValueError(f"{_MAIN}: move it to a module")
    return Target(None, module, function)


_TARGETS = "give the path of a .py file, a dotted module, or 'module:function'"
_MAIN = "a function of __main__ cannot be imported elsewhere"


def _name_of(function: object) -> str:
    module = getattr(function, "__module__", None) or "module"
    name = getattr(function, "__qualname__", "")
    if not name.isidentifier():
        return "'module:function' (of one at the top of a module, which this is not)"
    if module == "__main__":
        return f"'module:{name}' ({_MAIN}: move it to a module first)"
    return repr(f"{module}:{name}")


def python_command(
    target: str | os.PathLike[str],
    args: Sequence[str],
    executable: str,
    interpreter_args: Sequence[str],
    path: Sequence[str],
) -> list[str]:
    """Return the command line that runs ``target`` in a fresh interpreter.

    Args:
        target: a file, a dotted module, or ``module:function``.
        args: the program's own arguments.
        executable: the interpreter.
        interpreter_args: its options.
        path: what a function's module is looked up in. What is relative there is meant from here,
            wherever the child begins.

    Raises:
        ValueError, TypeError: as ``read_target``.
    """
    file, module, function = read_target(target)
    command = [executable, *interpreter_args]
    if file is not None:
        # Not an option of the interpreter, whatever the file is called.
        prefix = "./" if file.startswith("-") else ""
        return [*command, prefix + file, *args]
    if not function:
        return [*command, "-m", module, *args]
    # A terminal's Ctrl-C ends a child that is still being imported without a traceback; then
    # `run` sets it right.
    program = (
        "import signal, sys\n"
        "if signal.getsignal(signal.SIGINT) is signal.default_int_handler:\n"
        "    signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        f"sys.path[:] = {list(map(_from_here, path))!r}\n"
        "from handleipc.asyncio.target import run\n"
        f"run({module!r}, {function!r})"
    )
    return [*command, "-c", program, *args]


def _from_here(entry: str) -> str:
    # What does not exist is no directory, but perhaps the name by which an import hook knows its
    # entry (setuptools' editable installs have such).
    try:
        return os.path.abspath(entry) if not entry or os.path.exists(entry) else entry
    except OSError:
        return entry  # the current directory is gone, and so is what was in it


FORK_MARKER = "--handleipc-fork"


def frozen_command(
    target: str | os.PathLike[str], args: Sequence[str], executable: str
) -> list[str]:
    """Return the command line that has a frozen program run ``target``, in ``freeze_support()``.

    Raises:
        ValueError, TypeError: as ``read_target``.
    """
    file, module, function = read_target(target)
    if file is None:
        text = f"{module}:{function}" if function else module
    else:
        text = file if file.endswith(".py") or "/" in file else f"./{file}"
    return [executable, FORK_MARKER, text, *args]
