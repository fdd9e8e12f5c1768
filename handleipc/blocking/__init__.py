"""Channels for plain scripts and threads: each call waits, and no event loop is in sight.

The names, arguments, errors and promises are those of ``handleipc``; what waits there takes
``timeout`` here, in seconds, None for ever, and raises ``TimeoutError``.

Any thread may call: one runs what the others wait for (``asyncio.runner``). Between two calls this
end is silent. What the peer sends waits in the kernel, and the peer may wait for our answers: for
the acknowledgement of a handle, for the number of connections here. An end that is to answer at any
time is an asyncio program, or has a thread that waits in ``recv()``. The end of the program flushes
for a second.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from typing import IO, Any, Unpack

import handleipc.asyncio.streams  # noqa: F401  # for what it registers, as handleipc does
from handleipc.asyncio import connecting, listening, process
from handleipc.asyncio.runner import close_first
from handleipc.asyncio.starting import STREAMS, Options
from handleipc.blocking.channel import Channel, Child
from handleipc.blocking.server import Connection, Server
from handleipc.blocking.taking import run
from handleipc.limits import Limits
from handleipc.system import close_quietly

__all__ = [
    "Channel",
    "Child",
    "Connection",
    "Server",
    "connect",
    "fork",
    "listen",
    "listen_unix",
    "parent",
    "spawn",
]


def spawn(*argv: str | os.PathLike[str], **options: Unpack[Options]) -> Child:
    """Start any program that speaks the channel, as ``handleipc.spawn``.

    Raises:
        FileNotFoundError, PermissionError, ValueError, TypeError, OSError: as there.
    """
    return _start(lambda given: process.spawn(*argv, **given), options)


def fork(
    target: str | os.PathLike[str],
    *args: str,
    executable: str | None = None,
    interpreter_args: tuple[str, ...] = (),
    **options: Unpack[Options],
) -> Child:
    """Start a fresh Python interpreter with a channel, as ``handleipc.fork``.

    The child may use ``handleipc.blocking.parent()`` or asyncio; ``"module:function"`` is called in
    an event loop, with asyncio's channel.

    Raises:
        FileNotFoundError, PermissionError, ValueError, TypeError, RuntimeError: as there.
    """
    return _start(
        lambda given: process.fork(
            target, *args, executable=executable, interpreter_args=interpreter_args, **given
        ),
        options,
    )


def _start(start: Callable[[Options], process.Starting], options: Options) -> Child:
    """Start a child whose pipes are files here, and no streams of an event loop."""
    ours: dict[str, IO[bytes]] = {}
    theirs: list[int] = []
    given: dict[str, Any] = dict(options)
    try:
        for name in STREAMS:
            if given.get(name) == subprocess.PIPE:
                reading, writing = os.pipe()
                mine, given[name] = (writing, reading) if name == "stdin" else (reading, writing)
                theirs.append(given[name])
                # What is read is buffered, as subprocess does; what is written has left at once.
                ours[name] = os.fdopen(mine, "wb", 0) if name == "stdin" else os.fdopen(mine, "rb")

        async def begin() -> Child:
            starting = start(given)  # type: ignore[arg-type]
            return Child(starting, await starting.__aenter__())

        child = run(begin, starts=True)
    except BaseException:
        close_quietly(*ours.values())
        raise
    finally:
        close_quietly(*theirs)
    for name, file in ours.items():
        setattr(child, name, file)
    return child


def parent(*, limits: Limits | None = None, accept_handles: bool = True) -> Channel:
    """Return the channel to the process that started this one, as ``handleipc.parent``.

    Raises:
        NoChannel, ChannelBusy, ValueError, TypeError: as there.
    """
    global _parent
    inner = run(lambda: process.parent(limits=limits, accept_handles=accept_handles))
    close_first()  # what is queued leaves before the end of the program lets go of the channel
    if _parent is None or _parent._channel is not inner:
        _parent = Channel(inner)
    return _parent


_parent: Channel | None = None


def connect(path: str | bytes | os.PathLike[str], **options: Any) -> Channel:
    """Connect to a process that has called ``listen_channels``, as ``handleipc.connect``.

    Raises:
        PermissionError, TimeoutError, OSError, TypeError: as there.
    """
    return Channel(run(lambda: connecting.connect(path, **options)))


def listen(host: str | None, port: int, **options: Any) -> Server:
    """Listen for TCP connections, as ``handleipc.listen``, whose options it takes.

    Raises:
        ValueError, TypeError, OSError: as there.
    """
    return Server(run(lambda: listening.listen(host, port, **options).__aenter__()))


def listen_unix(path: str | bytes | os.PathLike[str], **options: Any) -> Server:
    """Listen at a path, as ``handleipc.listen_unix``, whose options it takes.

    Raises:
        ValueError, TypeError, OSError: as there.
    """
    return Server(run(lambda: listening.listen_unix(path, **options).__aenter__()))
