"""The registry of this front: Node's kinds as asyncio's objects, and what applications register."""

from __future__ import annotations

import socket
from functools import partial
from typing import TypeVar

from handleipc.asyncio.connection import Connection
from handleipc.handles import kinds
from handleipc.handles.fds import FileDescriptor
from handleipc.handles.kinds import BoundSocket, Native
from handleipc.handles.registry import Conversion, Registry
from handleipc.typing import Options

__all__ = ["default_registry", "register"]

T = TypeVar("T")


def _build_connection(fd: int, kind: int, options: Options | None) -> Connection:
    return Connection(fd, kind, head=kinds.read_unread(options))


default_registry: Registry = Registry()
default_registry.add_builder(kinds.NET_SOCKET, _build_connection, Connection)
for _tag in (kinds.DGRAM_SOCKET, kinds.NET_BOUND_SOCKET):
    default_registry.add_builder(_tag, partial(kinds.build_socket, _tag))
for _tag in (kinds.NET_NATIVE, kinds.DGRAM_NATIVE):
    default_registry.add_builder(_tag, partial(kinds.build_native, _tag))
default_registry.add_builder(kinds.FD, kinds.build_fd, kinds.adopt_fd)
default_registry.add_preparer(Connection, kinds.prepare_connection)
default_registry.add_preparer(socket.socket, kinds.prepare_socket)
default_registry.add_preparer(Native, kinds.prepare_native)
default_registry.add_preparer(BoundSocket, kinds.prepare_bound)
default_registry.add_preparer(FileDescriptor, kinds.prepare_fd)


def register(python_type: type[T], conversion: Conversion[T]) -> None:
    """Send objects of this type, and of its subclasses, by ``conversion``.

    Both ends register a conversion with the same tag; a tag nobody registered there refuses the
    handle, and the sender gets it back. Only a handleipc peer can receive it.

    Raises:
        ValueError: the tag is empty, or a built-in one.
    """
    default_registry.register(python_type, conversion)
