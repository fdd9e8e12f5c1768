"""Everything that handleipc raises on purpose.

::

    HandleIPCError
    ├── NoChannel               this process was not started with a channel
    ├── ChannelClosed           you closed it
    │   └── ChannelBroken       the outside did (also a ConnectionError)
    ├── ChannelBusy             two consumers at once, or nobody who reads
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
    │   └── DescriptorReleased  the descriptor is closed, detached or on its way
    └── MessageNotSerializable  not a JSON value (also a TypeError)

Any other exception out of this package, apart from ``OSError``, ``TimeoutError`` and what the
standard library raises for a wrong argument, is a bug: please report it.
"""

from __future__ import annotations

__all__ = [
    "ChannelBroken",
    "ChannelBusy",
    "ChannelClosed",
    "ChannelFull",
    "DescriptorReleased",
    "HandleError",
    "HandleIPCError",
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
    """


class ChannelBusy(HandleIPCError):
    """Two consumers want the same message, or a wait needs somebody to read who does not."""


class ChannelFull(HandleIPCError):
    """More is queued than ``Limits`` allows: wait for ``drain()`` before sending more."""


class WorkerExited(HandleIPCError):
    """The child process ended.

    Attributes:
        code: its exit code, or None if a signal ended it.
        signal: the number of that signal, or None. Both are None if its exit was not seen.
    """

    def __init__(self, code: int | None, signal: int | None) -> None:
        super().__init__(code, signal)
        self.code = code
        self.signal = signal

    def __str__(self) -> str:
        if self.signal is not None:
            return f"the child process was ended by signal {self.signal}"
        if self.code is None:
            return "the child process ended (exit status unknown)"
        return f"the child process exited with code {self.code}"


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
    """The handle did not reach the peer's application.

    Attributes:
        handle: the object given to ``send``, usable again, unless ``reason`` begins with
            ``in doubt`` (then this end's copy is closed, since the peer may own it).
        reason: why, in words.
    """

    def __init__(self, handle: object, reason: str) -> None:
        super().__init__(handle, reason)
        self.handle = handle
        self.reason = reason

    def __str__(self) -> str:
        return f"the handle was not delivered: {self.reason}"


class DescriptorReleased(HandleError, ValueError):
    """The descriptor is no longer this object's: closed, detached, or on its way elsewhere."""


class MessageNotSerializable(HandleIPCError, TypeError):
    """The message is not a JSON value, or reads as a command of the protocol."""
