"""Hand live sockets between processes: a message and a descriptor arrive together.

Python and Node.js alike. Start a child with ``fork`` or ``spawn``, get the other end with
``parent``, and ``send`` a message with a handle; see the README.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if sys.platform == "win32":
    raise ImportError(
        "handleipc hands POSIX descriptors over Unix sockets: Windows is not supported"
    )

import handleipc.environment as _environment  # noqa: F401  # takes a channel's variables at once
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
from handleipc.limits import Limits
from handleipc.stats import ChannelStats, Level

if TYPE_CHECKING:
    from handleipc.asyncio.accepting import Door, accepting
    from handleipc.asyncio.channel import Channel
    from handleipc.asyncio.connecting import ChannelListener, connect, listen_channels
    from handleipc.asyncio.connection import Connection
    from handleipc.asyncio.listening import listen, listen_unix
    from handleipc.asyncio.process import Child, fork, parent, spawn
    from handleipc.asyncio.registry import register
    from handleipc.asyncio.server import Server
    from handleipc.asyncio.target import freeze_support
    from handleipc.handles.fds import FileDescriptor
    from handleipc.handles.kinds import BoundSocket, Native
    from handleipc.handles.registry import Conversion
    from handleipc.handles.sockets import Socket

__version__ = "0.1.0"

__all__ = [
    "BoundSocket",
    "Channel",
    "ChannelBroken",
    "ChannelBusy",
    "ChannelClosed",
    "ChannelFull",
    "ChannelListener",
    "ChannelStats",
    "Child",
    "Connection",
    "Conversion",
    "DescriptorReleased",
    "Door",
    "FileDescriptor",
    "ForkedCopy",
    "HandleError",
    "HandleIPCError",
    "HandleInDoubt",
    "HandleNotDelivered",
    "Level",
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
    "accepting",
    "connect",
    "fork",
    "freeze_support",
    "listen",
    "listen_channels",
    "listen_unix",
    "parent",
    "register",
    "spawn",
]

# asyncio, msgspec and orjson are nine tenths of what the whole costs to load, so they come with the
# first name that needs them: all of it at once, because an import may fail when it is wanted most,
# with the table of descriptors full.
_LATER = {
    "asyncio.accepting": ["Door", "accepting"],
    "asyncio.channel": ["Channel"],
    "asyncio.connecting": ["ChannelListener", "connect", "listen_channels"],
    "asyncio.connection": ["Connection"],
    "asyncio.listening": ["listen", "listen_unix"],
    "asyncio.process": ["Child", "fork", "parent", "spawn"],
    "asyncio.registry": ["register"],
    "asyncio.server": ["Server"],
    "asyncio.streams": [],  # for what it registers: asyncio's own objects
    "asyncio.target": ["freeze_support"],
    "handles.fds": ["FileDescriptor"],
    "handles.kinds": ["BoundSocket", "Native"],
    "handles.registry": ["Conversion"],
    "handles.sockets": ["Socket"],
}
# What the C core is, and what it needs to be loaded.
_COMPILED = {"handleipc._core", "_cffi_backend"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module, names in _LATER.items():
        try:
            loaded = importlib.import_module(f"{__name__}.{module}")
        except ImportError as error:
            if error.name not in _COMPILED:
                raise
            raise ImportError(
                f"handleipc's compiled core cannot be loaded ({error}): reinstall handleipc with"
                " this interpreter's pip, or build it in a checkout with `pip install -e .`",
                name=error.name,
            ) from error
        globals().update({one: getattr(loaded, one) for one in names})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
