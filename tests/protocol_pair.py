"""A protocol end fed by hand, and two ends joined in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from handleipc.handles.pending import Held
from handleipc.handles.refusal import Refusal
from handleipc.limits import Invitation, Limits
from handleipc.protocol.channel import ChannelProtocol, State
from handleipc.protocol.deliveries import Deliveries, Received
from handleipc.protocol.stages import Entry
from handleipc.system import InFlight, System
from handleipc.wire import codec
from handleipc.wire.framing import DescriptorSet, LineFramer

INVITED = Invitation(8, 1 << 20)
SWITCH = b'{"cmd":"NODE_HANDLEIPC","native":2,"ack":0,"descriptors":8,"bytes":1048576}\n'


def take_one(deliveries: Deliveries) -> Received:
    """Take the next message, as a listener gets them."""
    return deliveries.take(urgent=bool(deliveries.urgent))


class Thing:
    """A received handle: its descriptors, and whether it was closed."""

    def __init__(self, end: Fed, tag: str, options: Any, fds: list[int]) -> None:
        self.end, self.tag, self.options, self.fds = end, tag, options, fds

    def close(self) -> None:
        self.end.closed += self.fds

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Thing) and (self.tag, self.fds) == (other.tag, other.fds)

    def __repr__(self) -> str:
        return f"{self.tag}{self.fds}"


class Fed:
    """A ``ChannelProtocol`` without a socket: what it is fed, writes and closes is plain data."""

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        slots: int = 99,
        reads: bool = True,
        makes: bool = False,
        **roles: Any,
    ) -> None:
        if makes:  # handles of a run without a question about each
            roles["maker"] = self._maker
        self.now = 0.0
        self.slots = slots
        self.closed: list[int] = []
        self.outbox: list[tuple[bytes, list[int]]] = []
        self.received = 0
        system = System(
            clock=lambda: self.now,
            close=self.closed.append,
            free_slots=lambda most: min(most, self.slots),
            in_flight=InFlight(),
        )
        self.protocol = ChannelProtocol(limits or Limits(), system, self._convert, **roles)
        if reads:  # a reader that has earned everything
            self.protocol.incoming.deliveries.pace = self.protocol.limits.ready
        self.framer = LineFramer(self.protocol.limits.line)

    def _convert(self, tag: str, options: Any, fds: list[int]) -> Thing:
        if tag in ("kind", "type"):
            self.closed += fds
            raise Refusal(tag, f"refused {tag}")
        return Thing(self, tag, options, fds)

    def _maker(self, tag: str, options: Any) -> Callable[[int], Thing]:
        return lambda fd: Thing(self, tag, options, [fd])

    # -- in --------------------------------------------------------------------------------------

    def feed(self, data: bytes, fds: list[int] | None = None, lost: bool = False) -> None:
        """One read: bytes, and the descriptors it brought or lost."""
        sets = []
        if fds or lost:
            fds = fds or []
            end = self.received + len(data)
            sets = [DescriptorSet(fds, self.received, end, lost)]
        self.received += len(data)
        for i, batch in enumerate(self.framer.feed(data)):
            self.protocol.received(batch if i else dataclasses.replace(batch, sets=sets))
        self.end_if_asked()

    def end_if_asked(self) -> None:
        """End the channel as a driver does that is asked to, with nothing left to read."""
        if self.protocol.give_up is not None:
            self.protocol.end(self.protocol.give_up)

    # -- out -------------------------------------------------------------------------------------

    def write(self, limit: int = 1 << 30) -> list[tuple[bytes, list[int]]]:
        """Write everything that may leave; returns pairs of bytes and descriptors."""
        written, self.outbox = self.outbox, []
        while (stage := self.protocol.next_stage()) is not None:
            fds = list(stage.fds)
            data = bytes(stage.data)[stage.offset : stage.offset + limit]
            self.protocol.wrote(len(data))
            written.append((data, fds))
        return written

    def lines(self) -> bytes:
        """Write everything, and return the bytes alone."""
        return b"".join(data for data, _ in self.write())

    def send(self, message: bytes, fds: list[int] | None = None, **options: Any) -> Entry:
        """Queue a message, with a held handle if descriptors are given."""
        pending = None
        if fds:
            pending = Held(
                f"handle {fds}",
                options.pop("tag", "net.Socket"),
                codec.spell(options.pop("details")) if "details" in options else b"",
                read=options.pop("read", lambda: fds),
                fds_needed=len(fds),
                on_delivered=lambda: self.closed.extend(fds),
                **options,
            )
        entry = Entry(message, message.decode(), pending)
        entry.waiter = "somebody"
        self.protocol.send(entry)
        return entry

    def outcomes(self) -> list[tuple[str, str | None]]:
        """What became of the entries that have ended since the last call."""
        found = [
            (entry.message, f"in doubt: {reason}" if entry.in_doubt else reason)
            for entry, reason in self.protocol.outgoing.outcomes
        ]
        self.protocol.outgoing.outcomes.clear()
        return found

    def take(self) -> list[Any]:
        """Take everything that is ready: messages, or pairs of a message and its handle."""
        taken = []
        incoming = self.protocol.incoming
        while True:
            incoming.pump()
            self.outbox = self.write()
            if not (incoming.ready or incoming.deliveries.urgent):
                return taken
            message, handle = take_one(incoming.deliveries)
            taken.append(message if handle is None else (message, handle))

    def wait(self) -> None:
        """Let time pass until the next deadline."""
        deadline = self.protocol.deadline
        assert deadline is not None
        self.now = max(self.now, deadline)
        self.protocol.on_deadline()
        self.end_if_asked()

    @property
    def error(self) -> str:
        """Why the channel ended, in words."""
        self.end_if_asked()
        assert self.protocol.state is State.CLOSED
        return str(self.protocol.error)


def native(limits: Limits | None = None, **options: Any) -> Fed:
    """An end whose both directions are native; it has said so."""
    end = Fed(limits, invited_by=INVITED, **options)
    end.write()
    end.feed(SWITCH)
    end.write()
    return end


def exchange(a: Fed, b: Fed) -> None:
    """Carry everything both ways until neither has more to say."""
    while True:
        moved = False
        for source, target in ((a, b), (b, a)):
            for data, fds in source.write():
                moved = True
                if target.protocol.state is not State.CLOSED:
                    target.feed(data, fds)
        if not moved:
            return
