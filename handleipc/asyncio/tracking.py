"""A driver that keeps count of connections which came or went through its channel.

Joins the socket lists to what a channel does: a connection counts where its application is, from
the acknowledgement on.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial
from typing import Any

from handleipc.asyncio.driver import Driver
from handleipc.asyncio.registry import default_registry
from handleipc.asyncio.server import Server
from handleipc.exceptions import RemoteProtocolError, UnsupportedHandle
from handleipc.handles.connection import BaseConnection
from handleipc.handles.group import STATEMENTS, Group, is_key
from handleipc.handles.kinds import NET_SOCKET
from handleipc.handles.pending import Held, PendingHandle
from handleipc.handles.tracking import SocketLists
from handleipc.protocol.channel import ChannelProtocol, State
from handleipc.protocol.node import PEER_SPEAKS_NODE
from handleipc.protocol.stages import LATE_SIZE, Late
from handleipc.typing import JSON, Options
from handleipc.wire import codec

__all__ = ["TrackingDriver"]


_prepare = default_registry.prepare

# How long the report of a close may wait for something to leave with. Without it each connection
# that closes wakes both processes once more: a quarter of what a short one costs at a steady rate.
# Shorter than anybody notices who waits for a server to be empty. Not tuned.
REPORT_WITHIN = 0.002


class TrackingDriver(Driver):
    """A driver with socket lists.

    Args:
        sock: this end of the socket pair; the driver's from here on.
        protocol: the state machine to drive.
    """

    def __init__(self, sock: socket.socket, protocol: ChannelProtocol) -> None:
        self.lists: SocketLists = SocketLists(
            self._send_internal,
            self,
            self._report_soon,
            lambda: protocol.peer_is_native,
            self._send_late,
            post=self._post,  # a connection closes on whatever thread its object dies
        )
        self._answers = 0
        """Messages of our own that have not been written."""
        self._report_is_timed = False
        protocol.hooks.internal = self._take_statement
        super().__init__(sock, protocol)

    def _prepare_handle(self, handle: object, keep_open: bool, transfer: bool) -> PendingHandle:
        """Prepare a handle to be sent. Raises as ``send``."""
        pending = _prepare(handle, keep_open)
        if isinstance(handle, Server):
            pending.on_handed_on = partial(handle._share, self.lists)
        if transfer:
            if not (isinstance(handle, Server) and isinstance(pending, Held)):
                pending.returned()
                raise UnsupportedHandle("transfer=True is for a Server: others have no listener")
            handle._transfer(pending)
        if not keep_open and pending.tag == NET_SOCKET:
            self._follow(handle, pending)
        if pending.native_only and not self._protocol.may_become_native:
            pending.returned()
            raise UnsupportedHandle(PEER_SPEAKS_NODE)
        return pending

    def _follow(self, handle: object, pending: PendingHandle) -> None:
        """Have a connection that is to be sent counted at the peer, once it is the peer's."""
        group = getattr(handle, "_group", None)
        if group is not None:
            pending.on_handed_on = partial(self._handed_on, handle, group)

    def _handed_on(self, handle: Any, group: Group) -> None:
        """The peer owns a connection that was counted here: it counts there from now on."""
        handle._group = None
        group.handed_on(self.lists.sender(group, reports=self._protocol.peer_is_native))

    def _convert(self, tag: str, options: Options | None, fds: list[int]) -> object:
        handle = default_registry.convert(tag, options, fds)
        if isinstance(handle, Server):
            handle._share(self.lists, options)
        if options is None:
            return handle
        key = options.get("key")
        if is_key(key) and isinstance(handle, BaseConnection):
            handle._group = self.lists.receiver(key)
            handle._group.opened_here()
        return handle

    def _maker(self, tag: str, options: Options | None) -> Callable[[int], object] | None:
        """Return what makes the handles of a run, as ``_convert`` would; None if that is to."""
        make = default_registry.maker(tag)
        if make is None or options is None:
            return make
        key = options.get("key")
        if tag != NET_SOCKET or len(options) != 1 or not is_key(key):
            return None
        group = self.lists.receiver(key)

        def counted(fd: int) -> object:
            connection: Any = make(fd)
            connection._group = group
            group.opened_here()
            return connection

        return counted

    def _report_soon(self) -> None:
        """Have closes reported with what leaves next, or alone after ``REPORT_WITHIN``.

        Every turn reports what it finds (``_prepare``), and so does the end of the loop.
        """
        if not (self._report_is_timed or self._loop.is_closed()):
            self._report_is_timed = True
            self._loop.call_later(REPORT_WITHIN, self._report_now)

    def _report_now(self) -> None:
        self._report_is_timed = False
        if self.lists.reports:
            self._turn()

    def _attach(self) -> None:
        self._report_is_timed = False  # the last loop took its timers with it
        super()._attach()
        self.lists.take_closes()  # which the last loop had no time for

    def _send_internal(self, message: JSON) -> None:
        """Queue a message of our own, which the public ``send`` would refuse as forged."""
        self._send_late(lambda: message, lambda: None)

    def _send_late(self, make: Callable[[], JSON], ended: Callable[[], None]) -> None:
        """Queue a message that is made when its line is written."""
        if self._protocol.state is not State.OPEN:
            ended()
            return
        if self._answers * LATE_SIZE > self._limits.queued_bytes:
            self._end(RemoteProtocolError("the peer asks, and does not read the answers"))
            ended()
            return

        def gone() -> None:
            self._answers -= 1
            ended()

        self._answers += 1
        self._protocol.send(Late(lambda: codec.spell(make()), gone))
        self._schedule_turn()

    def _take_statement(self, message: JSON) -> bool:
        """Take what the peer says of connections it was handed, in the order it was written.

        Returns whether it was such a statement.
        """
        is_statement = message["cmd"] in STATEMENTS
        if is_statement:
            self._take_count(message)
        return is_statement

    def _take_question(self, message: JSON) -> None:
        """Take what the peer asks of connections it handed to us, behind those that it did."""
        if message["cmd"] not in STATEMENTS:
            self._take_count(message)

    def _take_count(self, message: JSON) -> None:
        """Take either; a fault costs nothing but an ``error`` event."""
        fault = self.lists.received(message)
        if fault is not None:
            self._protocol.faults.errors.append(RemoteProtocolError(fault))
