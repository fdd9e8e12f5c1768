"""The registry of this front: Node's kinds as asyncio's objects, and what applications register."""

from __future__ import annotations

import socket
from functools import partial
from typing import TypeVar

from handleipc import conversions
from handleipc.asyncio.connection import Connection
from handleipc.conversions import BoundSocket, Native
from handleipc.fds import FileDescriptor
from handleipc.registry import Conversion, Registry
from handleipc.typing import Options

__all__ = ["default_registry", "register"]

T = TypeVar("T")


def _build_connection(fd: int, kind: int, options: Options | None) -> Connection:
    return Connection(fd, kind, head=conversions.read_unread(options))


default_registry = Registry()
default_registry.add_builder(conversions.NET_SOCKET, _build_connection, Connection)
for _tag in (conversions.DGRAM_SOCKET, conversions.NET_BOUND_SOCKET):
    default_registry.add_builder(_tag, partial(conversions.build_socket, _tag))
for _tag in (conversions.NET_NATIVE, conversions.DGRAM_NATIVE):
    default_registry.add_builder(_tag, partial(conversions.build_native, _tag))
default_registry.add_builder(conversions.FD, conversions.build_fd, lambda fd, _: FileDescriptor(fd))
default_registry.add_pender(Connection, conversions.pend_connection)
default_registry.add_pender(socket.socket, conversions.pend_socket)
default_registry.add_pender(Native, conversions.pend_native)
default_registry.add_pender(BoundSocket, conversions.pend_bound)
default_registry.add_pender(FileDescriptor, conversions.pend_fd)


def register(python_type: type[T], conversion: Conversion[T]) -> None:
    """Send objects of this type, and of its subclasses, by ``conversion``.

    Both ends register a conversion with the same tag; a tag nobody registered there refuses the
    handle, and the sender gets it back. Only a handleipc peer can receive it.

    Raises:
        ValueError: the tag is empty, or a built-in one.
    """
    default_registry.register(python_type, conversion)
