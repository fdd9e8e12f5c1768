"""Everything that handleipc raises on purpose.

::

    HandleIPCError
    ├── NoChannel               this process was not started with a channel
    ├── ChannelClosed           you closed it
    │   └── ChannelBroken       the outside did (also a ConnectionError)
    ├── ForkedCopy              it belongs to the process this one was forked from
    ├── ChannelBusy             two consumers at once, another loop's, or nobody who reads
    ├── ChannelFull             more queued than Limits allows
    ├── WorkerExited            the child process ended
    ├── ProtocolError
    │   ├── LocalProtocolError  this end asked for something the protocol has no words for
    │   └── RemoteProtocolError the peer broke a rule; its channel ends
    │       ├── LineTooLong
    │       └── MalformedEnvelope
    ├── HandleError
    │   ├── UnsupportedHandle   this object cannot be sent
    │   ├── HandleNotDelivered  it did not arrive, and is yours again
    │   ├── HandleInDoubt       nobody can say whether it arrived; our copy is closed
    │   └── DescriptorReleased  the descriptor is closed, detached or on its way
    └── MessageNotSerializable  not a JSON value (also a TypeError)

Any other exception out of this package, apart from ``OSError``, ``TimeoutError`` and what the
standard library raises for a wrong argument, is a bug: please report it.
"""

from __future__ import annotations

import signal as signals

__all__ = [
    "ChannelBroken",
    "ChannelBusy",
    "ChannelClosed",
    "ChannelFull",
    "DescriptorReleased",
    "ForkedCopy",
    "HandleError",
    "HandleIPCError",
    "HandleInDoubt",
    "HandleNotDelivered",
    "LineTooLong",
    "LocalProtocolError",
    "MalformedEnvelope",
    "MessageNotSerializable",
    "NoChannel",
    "ProtocolError",
    "RemoteProtocolError",
    "UnsupportedHandle",
    "WorkerExited",
]


class HandleIPCError(Exception):
    """Base of all exceptions of this package."""


class NoChannel(HandleIPCError):
    """This process has no channel to a parent: it was not started by ``fork`` or ``spawn``."""


class ChannelClosed(HandleIPCError):
    """The channel was closed by this end, so nothing more can be sent."""


class ChannelBroken(ChannelClosed, ConnectionError):
    """The channel was ended by the outside: the peer closed it, died, or broke the protocol.

    A ``ChannelClosed`` too, for programs that only ask whether the channel still works.

    Attributes:
        exit_code: of a child process that has ended: its exit code, or None.
        signal: the number of the signal that ended it, or None.
        opened: whether the peer had said anything, which a handleipc peer does as soon as it
            opens its channel.
    """

    def __init__(
        self,
        text: str,
        *,
        exit_code: int | None = None,
        signal: int | None = None,
        opened: bool = True,
    ) -> None:
        super().__init__(text)
        self.exit_code = exit_code
        self.signal = signal
        self.opened = opened

    def __str__(self) -> str:
        # As an OSError of one argument it would print the tuple that it keeps.
        return str(self.args[0])


class ForkedCopy(HandleIPCError):
    """This object belongs to the process that the present one was forked from (fork(2)).

    A forked copy writes, shuts down, unlinks and reaps nothing. It may start channels of its own.
    """

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} belongs to the process that this one was forked from with fork(2), and only"
            " that one may use it: start a channel of this process's own with handleipc.fork or"
            " spawn, or fork before the channel is opened"
        )


class ChannelBusy(HandleIPCError):
    """Two consumers want the same message, another event loop has it, or nobody reads.

    The text says which, and what to do.
    """


class ChannelFull(HandleIPCError):
    """More is queued than ``Limits`` allows: wait for ``drain()`` before sending more."""


class WorkerExited(HandleIPCError):
    """The child process ended.

    Attributes:
        code: its exit code; None if a signal ended it, or if nobody could learn it.
        signal: the number of that signal, or None.
        opened: whether it had said anything on its channel.
    """

    def __init__(self, code: int | None, signal: int | None, *, opened: bool = True) -> None:
        super().__init__(code, signal)
        self.code = code
        self.signal = signal
        self.opened = opened

    def __str__(self) -> str:
        if self.signal is not None:
            how = f"was ended by signal {self.signal}{_signal_name(self.signal)}"
        elif self.code is not None:
            how = f"exited with code {self.code}"
        else:
            how = "ended (exit status unknown: somebody else reaped it, or SIGCHLD is ignored)"
        return f"the child process {how}{'' if self.opened else NEVER_OPENED}"


# A Node.js program opens its channel before it begins, and says nothing by that.
NEVER_OPENED = (
    " and never opened its channel, or said nothing on it (its own output says why, if any does)"
)


def _signal_name(number: int) -> str:
    try:
        return f" ({signals.Signals(number).name})"
    except ValueError:
        return ""


class ProtocolError(HandleIPCError):
    """A rule of the wire was broken; the subclasses say by whom."""


class LocalProtocolError(ProtocolError):
    """This end used the channel in a way the protocol has no words for."""


class RemoteProtocolError(ProtocolError):
    """The peer broke a rule of the wire. Its channel has ended; nothing else is touched."""


class LineTooLong(RemoteProtocolError):
    """A line of the peer is longer than ``Limits.line``, which ends the channel.

    Attributes:
        limit: the limit in bytes.
    """

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.limit = limit

    def __str__(self) -> str:
        return f"the peer sent a line of more than {self.limit} bytes (Limits.line)"


class MalformedEnvelope(RemoteProtocolError):
    """A line of the peer is not JSON, or not an envelope this dialect knows."""


class HandleError(HandleIPCError):
    """Something about one handle; the channel goes on."""


class UnsupportedHandle(HandleError, TypeError):
    """This object cannot be sent, or not to this peer. Nothing was sent; it is still yours."""


class HandleNotDelivered(HandleError):
    """The handle did not reach the peer's application, and is yours again.

    After the end of the channel its ``__cause__`` is the ``ChannelBroken`` or ``ChannelClosed``.

    Attributes:
        handle: the object given to ``send``, usable again.
        reason: why, in words.
    """

    def __init__(self, handle: object, reason: str) -> None:
        super().__init__(handle, reason)
        self.handle = handle
        self.reason = reason

    def __str__(self) -> str:
        return f"the handle was not delivered, and is yours again: {self.reason}"


class HandleInDoubt(HandleError):
    """The channel ended before anybody could learn whether the handle had arrived.

    The peer may own it, and lives; two owners are worse than none, so our copy is closed.

    Attributes:
        handle: the object given to ``send``; it owns nothing any more.
        reason: why the channel ended, in words.
    """

    def __init__(self, handle: object, reason: str) -> None:
        super().__init__(handle, reason)
        self.handle = handle
        self.reason = reason

    def __str__(self) -> str:
        return f"the handle may have been delivered, and our copy is closed: {self.reason}"


class DescriptorReleased(HandleError, ValueError):
    """The descriptor is no longer this object's: closed, detached, or on its way elsewhere."""


class MessageNotSerializable(HandleIPCError, TypeError):
    """The message is not a JSON value, or reads as a command of the protocol."""
