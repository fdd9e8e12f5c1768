"""``Channel`` and ``Child`` for threads without an event loop."""

from __future__ import annotations

import signal as signals
import socket
from types import TracebackType
from typing import IO, Any, Self

import handleipc.asyncio.channel as front
from handleipc.asyncio.connection import Connection as AsyncConnection
from handleipc.asyncio.process import Child as AsyncChild
from handleipc.asyncio.process import Starting
from handleipc.asyncio.server import Server as AsyncServer
from handleipc.blocking.server import Connection, Server
from handleipc.blocking.taking import Takes, call, look, run, within
from handleipc.exceptions import HandleInDoubt, HandleNotDelivered
from handleipc.stats import ChannelStats
from handleipc.system import close_quietly
from handleipc.typing import JSON
from handleipc.wire.peer import Peer

__all__ = ["Channel", "Child"]

Message = tuple[JSON, Any]


class Channel(Takes[Message]):
    """One end of a channel, and an iterator over its messages as ``(message, handle)``.

    As ``handleipc.Channel``. Made by ``parent``, ``fork`` and ``spawn``.
    """

    def __init__(self, channel: front.Channel) -> None:
        super().__init__()
        self._channel = channel

    @classmethod
    def over(cls, sock: socket.socket, **options: Any) -> Channel:
        """Make a channel of a connected Unix stream socket, as ``handleipc.Channel.over``.

        Raises:
            TypeError, ValueError: as there.
        """

        async def make() -> front.Channel:
            return front.Channel.over(sock, **options)

        return Channel(run(make))

    async def _next(self) -> Message:
        message, handle = await anext(self._channel)
        return message, _ours(handle)

    async def _recv(self) -> Message:
        message, handle = await self._channel.recv()
        return message, _ours(handle)

    def send(
        self,
        message: JSON,
        handle: object = None,
        *,
        keep_open: bool = False,
        transfer: bool = False,
        timeout: float | None = None,
    ) -> None:
        """Send a message, with a handle or without: any thread may, also while another receives.

        Returns when a plain message is in the kernel, or when the peer has acknowledged the handle.

        Raises:
            HandleNotDelivered, HandleInDoubt, ChannelClosed, ChannelBroken, ChannelFull,
            ChannelBusy, ForkedCopy, MessageNotSerializable, UnsupportedHandle, DescriptorReleased,
            TimeoutError: as ``handleipc.Channel.send``. What is on its way when the time is over
                and fails then is closed and logged.
        """
        inner = handle._server if isinstance(handle, Server) else handle
        try:
            run(
                lambda: self._channel.send(
                    message, inner, keep_open=keep_open, transfer=transfer, timeout=timeout
                )
            )
        except (HandleNotDelivered, HandleInDoubt) as error:
            error.handle = handle
            raise

    def recv(self, *, timeout: float | None = None) -> Message:
        """Return the next message as ``(message, handle)``; ``handle`` is None for plain ones.

        Raises:
            ChannelBusy, ChannelClosed, ChannelBroken, RemoteProtocolError, ForkedCopy: as
                ``handleipc.Channel.recv``.
            TimeoutError: ``timeout`` passed, and nothing was taken.
        """
        return self._take(self._recv, timeout)

    def flush(self, *, timeout: float | None = None) -> None:
        """Wait until everything is written and every handle acknowledged, as there."""
        run(lambda: within(timeout, self._channel.flush()))

    def disconnect(self, *, timeout: float | None = None) -> None:
        """End politely: flush, for ``timeout`` seconds at most, and wait until it has ended."""

        async def end() -> None:
            self._channel.disconnect(timeout=timeout)
            await self._channel.wait_disconnected()

        run(end)

    def wait_disconnected(self, *, timeout: float | None = None) -> None:
        """Wait until the channel has ended, whoever ended it."""
        run(lambda: within(timeout, self._channel.wait_disconnected()))

    def abort(self) -> None:
        """End now. Handles not acknowledged come back; what is queued is lost."""
        call(self._channel.abort)

    @property
    def connected(self) -> bool:
        """Whether messages can be sent, after a look at what has come."""
        look()
        return self._channel.connected

    @property
    def dialect(self) -> str:
        """``"node"`` or ``"native"``: how this channel is spelled on the wire, as known so far."""
        return self._channel.dialect

    @property
    def peer(self) -> Peer:
        """Who made the other end: ``pid`` (0: hidden), ``uid``, ``gid`` (None: not known)."""
        return self._channel.peer

    @property
    def connections(self) -> int:
        """Connections of this process's servers that the peer has, after a look at what has come.

        As ``handleipc.Channel.connections``.
        """
        look()
        return self._channel.connections

    def stats(self) -> ChannelStats:
        """Return what the channel holds now: each bounded queue, and its limit."""
        look()
        return self._channel.stats()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is None:
            self.disconnect()
        else:
            self.abort()

    def __repr__(self) -> str:
        return f"<blocking {self._channel!r}>"


class Child(Channel):
    """A child process and the channel to it, as ``handleipc.Child``.

    Leaving a ``with`` block disconnects, and waits until the child has ended; an exception in the
    block kills it first.

    Attributes:
        stdin, stdout, stderr: binary files where ``PIPE`` was asked for, else None. What is written
            to ``stdin`` leaves at once.
    """

    stdin: IO[bytes] | None = None
    stdout: IO[bytes] | None = None
    stderr: IO[bytes] | None = None

    def __init__(self, starting: Starting, child: AsyncChild) -> None:
        super().__init__(child)
        self._starting = starting
        self._child = child

    @property
    def pid(self) -> int:
        """The process id; it stays the child's until its exit has been seen."""
        return self._child.pid

    @property
    def exited(self) -> bool:
        """Whether the process has ended, after a look."""
        look()
        return self._child.exited

    @property
    def returncode(self) -> int | None:
        """The exit code, or minus a signal's number; None while it runs, or if it was not seen."""
        return self._child.returncode if self.exited else None

    @property
    def exit_code(self) -> int | None:
        """The exit code; None while it runs, or if a signal ended it."""
        return self._child.exit_code if self.exited else None

    @property
    def signal(self) -> int | None:
        """The signal that ended it, or None."""
        return self._child.signal if self.exited else None

    def ready(self, *, timeout: float | None = None) -> None:
        """Wait until the child has opened its channel, as there."""
        run(lambda: self._child.ready(timeout))

    def wait(self, *, timeout: float | None = None) -> int | None:
        """Wait until the process has ended, and return ``returncode``."""
        return run(lambda: within(timeout, self._child.wait()))

    def kill(self, sig: int = signals.SIGTERM) -> None:
        """Send a signal (SIGTERM); nothing happens after the exit."""
        self._child.kill(sig)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.kill()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        run(lambda: self._starting.__aexit__(kind, error, traceback))
        close_quietly(*(pipe for pipe in (self.stdin, self.stdout, self.stderr) if pipe))


def _ours(handle: Any) -> Any:
    """Return what this front has in the place of asyncio's."""
    if type(handle) is AsyncConnection:
        return Connection._from(handle)
    return Server(handle) if type(handle) is AsyncServer else handle
