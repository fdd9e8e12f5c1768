"""Hand live sockets between processes: a message and a descriptor arrive together.

Python and Node.js alike. Start a child with ``fork`` or ``spawn``, get the other end with
``parent``, and ``send`` a message with a handle; see the README.
"""

import sys

if sys.platform == "win32":
    raise ImportError(
        "handleipc hands POSIX descriptors over Unix sockets: Windows is not supported"
    )

from handleipc.asyncio.channel import Channel
from handleipc.asyncio.connection import Connection
from handleipc.asyncio.listening import listen, listen_unix
from handleipc.asyncio.process import Child, fork, parent, spawn
from handleipc.asyncio.registry import register
from handleipc.asyncio.server import Server
from handleipc.asyncio.streams import StreamPending as _StreamPending
from handleipc.asyncio.target import freeze_support
from handleipc.exceptions import (
    ChannelBroken,
    ChannelBusy,
    ChannelClosed,
    ChannelFull,
    DescriptorReleased,
    ForkedCopy,
    HandleError,
    HandleInDoubt,
    HandleIPCError,
    HandleNotDelivered,
    LineTooLong,
    LocalProtocolError,
    MalformedEnvelope,
    MessageNotSerializable,
    NoChannel,
    ProtocolError,
    RemoteProtocolError,
    UnsupportedHandle,
    WorkerExited,
)
from handleipc.handles.connection import Socket
from handleipc.handles.fds import FileDescriptor
from handleipc.handles.kinds import BoundSocket, Native
from handleipc.handles.registry import Conversion
from handleipc.limits import Limits

del _StreamPending  # imported for what its module registers: asyncio's own objects

__version__ = "0.1.0"

__all__ = [
    "BoundSocket",
    "Channel",
    "ChannelBroken",
    "ChannelBusy",
    "ChannelClosed",
    "ChannelFull",
    "Child",
    "Connection",
    "Conversion",
    "DescriptorReleased",
    "FileDescriptor",
    "ForkedCopy",
    "HandleError",
    "HandleIPCError",
    "HandleInDoubt",
    "HandleNotDelivered",
    "Limits",
    "LineTooLong",
    "LocalProtocolError",
    "MalformedEnvelope",
    "MessageNotSerializable",
    "Native",
    "NoChannel",
    "ProtocolError",
    "RemoteProtocolError",
    "Server",
    "Socket",
    "UnsupportedHandle",
    "WorkerExited",
    "__version__",
    "fork",
    "freeze_support",
    "listen",
    "listen_unix",
    "parent",
    "register",
    "spawn",
]
