"""A driver that keeps count of connections which came or went through its channel.

Joins the socket lists to what a channel does: a connection counts where its application is, from
the acknowledgement on.
"""

from __future__ import annotations

import socket
from functools import partial
from typing import Any

from handleipc import codec
from handleipc.asyncio.driver import Driver
from handleipc.asyncio.handles import default_registry
from handleipc.connection import BaseConnection
from handleipc.conversions import NET_SOCKET
from handleipc.exceptions import RemoteProtocolError
from handleipc.pending import PendingHandle
from handleipc.protocol import ChannelProtocol, State
from handleipc.socketlist import Group, SocketLists
from handleipc.typing import JSON, Options

__all__ = ["CountingDriver"]


class CountingDriver(Driver):
    """A driver with socket lists.

    Args:
        sock: this end of the socket pair; the driver's from here on.
        protocol: the state machine to drive.
    """

    def __init__(self, sock: socket.socket, protocol: ChannelProtocol) -> None:
        self.lists = SocketLists(self._send_internal, self, self._schedule_turn)
        super().__init__(sock, protocol)

    def _follow(self, handle: object, pending: PendingHandle, keep_open: bool) -> None:
        """Have a connection that is to be sent counted at the peer, once it is the peer's."""
        group = getattr(handle, "group", None)
        if group is not None and not keep_open and pending.tag == NET_SOCKET:
            pending.on_handed_on = partial(self._handed_on, handle, group)

    def _handed_on(self, handle: Any, group: Group) -> None:
        """The peer owns a connection that was counted here: it counts there from now on."""
        handle.group = None
        reports = self._protocol.incoming.native
        group.handed_on(self.lists.sender(group, reports=reports))

    def _convert(
        self, tag: str, options: Options | None, fds: list[int], kinds: list[int]
    ) -> object:
        handle = default_registry.convert(tag, options, fds, kinds)
        key = options.get("key") if options else None
        if isinstance(key, str) and isinstance(handle, BaseConnection):
            handle.group = self.lists.receiver(key)
            handle.group.opened_here()
        return handle

    def _send_internal(self, message: JSON) -> None:
        """Queue a message of our own, which the public ``send`` would refuse as forged."""
        protocol = self._protocol
        if protocol.state is not State.OPEN:
            return
        if protocol.outgoing.unsent_bytes > self._limits.queued_bytes:
            self._abort(RemoteProtocolError("the peer asks, and does not read the answers"))
            return
        protocol.send(codec.spell(message))
        self._schedule_turn()

    def _take_count(self, message: JSON) -> None:
        """Take what the peer says of connections; a fault costs nothing but an ``error`` event."""
        fault = self.lists.received(message)
        if fault is not None:
            self._protocol.incoming.errors.append(RemoteProtocolError(fault))

    def _report_closes(self) -> None:
        if self._protocol.outgoing.native:
            self.lists.flush_reports()
        else:
            self.lists.discard_reports()
