"""The boundary is enough: a second front, of a few lines and without an event loop, on it alone."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

import handleipc
from handleipc.asyncio.registry import default_registry
from handleipc.exceptions import ChannelBroken, HandleNotDelivered
from handleipc.limits import Invitation, Limits
from handleipc.protocol.channel import ChannelProtocol, State
from handleipc.protocol.stages import Entry
from handleipc.system import System, close_quietly
from handleipc.wire import codec
from handleipc.wire.link import Link
from handleipc.wire.syscalls import Refused


class Plain:
    """One end of a channel for a script: every call polls until it is done."""

    def __init__(self, sock: socket.socket, limits: Limits | None = None, **role: Any) -> None:
        system = System(close=close_quietly)
        self.protocol = ChannelProtocol(
            limits or Limits(), system, default_registry.convert, **role
        )
        self._clock = system.clock
        self._link = Link(sock, self.protocol.limits.line, lambda: 0)
        self.protocol.hooks.settling = self._link.stop_receiving
        self.protocol.hooks.peer_has_read = self._link.peer_has_read

    def send(self, message: Any, handle: object = None) -> None:
        """Send, and wait until it is written, or the peer's."""
        pending = None if handle is None else default_registry.prepare(handle, False)
        entry = Entry(codec.encode(message, self.protocol.limits.shape), message, pending)
        entry.waiter = self
        self.protocol.send(entry)
        self._until(lambda: bool(self.protocol.outcomes))
        _, reason = self.protocol.outcomes.popleft()
        if reason is not None and pending is not None:
            raise HandleNotDelivered(handle, reason)
        if reason is not None:
            raise ChannelBroken(reason)

    def recv(self) -> tuple[Any, Any]:
        """Return the next message, with its handle or None."""
        self._until(lambda: bool(self.protocol.ready), reads=True)
        if not self.protocol.ready:
            raise ChannelBroken(str(self.protocol.error or "the peer closed it"))
        return self.protocol.take()

    def disconnect(self) -> None:
        """Flush, and end."""
        self.protocol.disconnect(10)
        self._until(lambda: False)

    def _until(self, is_done: Callable[[], bool], *, reads: bool = False) -> None:
        protocol, link = self.protocol, self._link
        while protocol.state is not State.CLOSED:
            protocol.begin_turn(reader_waits=reads)
            protocol.on_deadline()
            writing = self._write()
            may_go_on = protocol.watch_waits(for_peer=not reads, for_kernel=not reads)
            if protocol.finished or protocol.give_up is not None:
                self._end(protocol.give_up)
            elif may_go_on:
                continue
            elif is_done():
                return
            elif protocol.want_read(waiting=not reads):
                deadline = protocol.deadline
                wait = 10.0 if deadline is None else max(0.0, deadline - self._clock())
                if link.wait(min(wait, 10.0), writing=writing) or link.must_go_on:
                    self._read()

    def _read(self) -> None:
        try:
            self.protocol.received(self._link.read())
        except ConnectionError:  # it closed with something of ours unread
            self._end(None)
        else:
            if self._link.at_eof:
                self._end(None)

    def _write(self) -> bool:
        while (stage := self.protocol.next_stage()) is not None:
            outcome: int | Refused | OSError
            try:
                outcome = self._link.write(stage.data, stage.offset, stage.fds)
            except OSError as error:
                outcome = error
            if outcome is Refused.AGAIN:
                return True
            if self.protocol.wrote(outcome) is not None:
                return False
        return False

    def _end(self, error: Any) -> None:
        self._link.stop_receiving()
        while not self._link.at_eof:
            self.protocol.received(self._link.read_rest())
        self.protocol.end(error, politely=self.protocol.finished)
        self._link.close()


def serve(end: Plain) -> None:
    """Answer each connection that comes, and send it back, until the peer disconnects."""
    try:
        while True:
            message, connection = end.recv()
            end.send({"echo": message}, connection)
    except ChannelBroken:
        end.disconnect()


def connections() -> tuple[handleipc.Connection, socket.socket]:
    """Return a connection, and its client."""
    ours, client = socket.socketpair()
    return handleipc.Connection.from_socket(ours), client


@pytest.mark.parametrize("dialect", ["node", "native"])
def test_two_plain_fronts(dialect: str) -> None:
    """Messages and connections there and back, and a polite end, in both dialects."""
    native = dialect == "native"
    one, two = socket.socketpair()
    parent = Plain(one, inviting=native)
    child = Plain(two, invited_by=Invitation(256, 1 << 20) if native else None)
    thread = threading.Thread(target=serve, args=(child,))
    thread.start()
    for number in range(50):
        connection, client = connections()
        with client:
            parent.send(number, connection)
            assert connection.closed
            message, back = parent.recv()
            assert message == {"echo": number}
            client.sendall(b"x")
            with back.socket() as sock:
                assert sock.recv(1) == b"x"
        parent.send("plain")
        assert parent.recv() == ({"echo": "plain"}, None)
    assert parent.protocol.dialect == dialect
    parent.disconnect()
    thread.join(10)
    assert not thread.is_alive()
    assert child.protocol.error is None


def test_a_plain_front_and_asyncio() -> None:
    """The two fronts understand each other: a parent on asyncio, a child without a loop."""
    one, two = socket.socketpair()
    thread = threading.Thread(target=lambda: serve(Plain(two, invited_by=Invitation(256, 1 << 20))))
    thread.start()

    async def main() -> None:
        channel = handleipc.Channel.over(one, role="parent")
        made = [connections() for _ in range(200)]
        for number, (connection, _) in enumerate(made):
            channel.send_nowait(number, connection)
        for number, (_, client) in enumerate(made):
            message, back = await channel.recv()
            assert message == {"echo": number}
            back.close()
            assert select.select([client], [], [], 10)[0]
            client.close()
        assert channel.dialect == "native"
        channel.disconnect()
        await channel.wait_disconnected()

    asyncio.run(main())
    thread.join(10)
    assert not thread.is_alive()


def test_a_peer_that_goes_gives_back() -> None:
    """What was not acknowledged is the sender's, usable, whatever front it has."""
    one, two = socket.socketpair()
    parent = Plain(one)
    connection, client = connections()
    with two, client:

        def leave() -> None:
            select.select([two], [], [], 10)
            two.close()

        thread = threading.Thread(target=leave)
        thread.start()
        with pytest.raises(HandleNotDelivered) as caught:
            parent.send("never taken", connection)
    thread.join()
    assert caught.value.handle is connection
    assert os.get_blocking(connection.fileno()) is False
    connection.close()
