"""What has arrived and is acknowledged, on its way to the application.

A handle is given only when its acknowledgement is in the kernel: at every moment one end owns it,
and never both. What is acknowledged together makes one *chunk*, which waits for the control stage
that says so; everything behind it waits too, since order is kept. With nothing to wait for, a
message is ready at once.

Acknowledging ahead of the application is earned by reading, since a process that is killed takes
with it what it acknowledged and had not taken: nothing before the first reader; then one handle;
twice as much each time a reader finds nothing ready; back to one when all of it was left lying for
a turn. While something here waits for the peer, ``ready`` at once: two ends that each wait for the
other to take a handle before they read must not hang.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from handleipc.protocol.front import Faults
from handleipc.typing import JSON
from handleipc.wire.envelope import is_internal

__all__ = ["MESSAGE_COST", "Deliveries", "Internal", "Received", "as_received"]

Received = tuple[JSON, Any]
"""A message as the application gets it, with its handle or None."""


class Internal(tuple[JSON, Any]):
    """The same, of a message for ``internal_message`` listeners."""

    __slots__ = ()


def as_received(message: JSON, handle: object) -> Received:
    """Return a message with its handle, as one for listeners alone if it is internal."""
    return Internal((message, handle)) if is_internal(message) else (message, handle)


class _Chunk:
    """What one control stage acknowledges, with the plain messages behind it."""

    __slots__ = ("has_internal", "messages", "number", "sizes")

    def __init__(self) -> None:
        self.messages: list[Received] = []
        self.sizes: list[int] = []
        self.has_internal = False
        self.number = 0

    def add(self, received: Received, size: int) -> None:
        """Add a message and its size."""
        self.messages.append(received)
        self.sizes.append(size)
        if type(received) is Internal:
            self.has_internal = True


# What a message takes in memory beside its bytes, for the sake of limits: a tuple, a small object,
# places in two deques.
MESSAGE_COST = 256


class Deliveries:
    """The messages of one direction that are acknowledged and not yet taken.

    Args:
        ready: descriptors of acknowledged handles that may wait, if nobody takes them at once.
        faults: where handles go that nobody is to get, and whose own ``close`` raised.
    """

    __slots__ = (
        "_chunk",
        "_faults",
        "_heavy",
        "_passed",
        "_ready",
        "_refilling",
        "_sizes",
        "_staged",
        "_staged_chunks",
        "_took_handles",
        "bytes",
        "bytes_taken",
        "bytes_waiting",
        "holds_back",
        "is_awaited",
        "pace",
        "ready",
        "takes_all",
        "urgent",
        "waiting_descriptors",
        "was_taken",
    )

    def __init__(self, ready: int, faults: Faults) -> None:
        self._ready = max(1, ready)
        self._faults = faults
        self.pace: int = 0
        """Descriptors that may be acknowledged ahead: 0 before the first reader."""
        self.takes_all: bool = False
        """Whether somebody takes everything as soon as it is ready: a listener, or ``batches``."""
        self.is_awaited: bool = False
        """Whether something of ours waits for the peer, which may wait for us to take a handle."""
        self.holds_back: bool = True
        """Whether plain messages wait for a reader; internal ones then overtake them. To be set by
        ``hold_back``."""
        self.ready: deque[Received] = deque()
        """The application's to take."""
        self.urgent: deque[tuple[Internal, int]] = deque()
        """Internal messages that overtake, with their sizes."""
        self._sizes: deque[int] = deque()
        self.bytes: int = 0
        """In ``ready`` and ``urgent``."""
        self.bytes_waiting: int = 0
        """Behind acknowledgements that the kernel does not have yet."""
        self.bytes_taken: int = 0
        self.waiting_descriptors: int = 0
        """Of acknowledged handles that nobody has taken."""
        # How many descriptors a handle has, by its id, of those that have more than one. A
        # conversion may make the same object of many.
        self._heavy: dict[int, list[int]] = {}
        self._refilling = True
        self._took_handles = False
        self.was_taken: bool = False
        """Whether anything was in this turn of the loop."""
        # Of the next control stage, and of those that the kernel does not have yet.
        self._chunk = _Chunk()
        self._staged_chunks: list[_Chunk] = []
        self._staged = self._passed = 0

    @property
    def bytes_held(self) -> int:
        """Of all that has arrived and was not taken."""
        return self.bytes + self.bytes_waiting

    @property
    def count(self) -> int:
        """Of all messages that have arrived and were not taken."""
        count = len(self.ready) + len(self.urgent) + len(self._chunk.messages)
        for chunk in self._staged_chunks:
            count += len(chunk.messages)
        return count

    @property
    def cost(self) -> int:
        """What they take in memory, about: small messages take many times their bytes."""
        return self.bytes + self.bytes_waiting + MESSAGE_COST * self.count

    @property
    def _last_chunk(self) -> _Chunk | None:
        """What the next message stands behind; None if it need not wait."""
        if self._chunk.messages:
            return self._chunk
        return self._staged_chunks[-1] if self._staged_chunks else None

    # -- in --------------------------------------------------------------------------------------

    def may_add_handle(self, descriptors: int = 1) -> bool:
        """Say whether one more handle, of so many descriptors, may be acknowledged now.

        Refilled from half on, so that acknowledgements go in batches. One that is larger than what
        is allowed passes alone.
        """
        if self.takes_all:
            return True
        limit = self._ready if self.is_awaited else self.pace
        waiting = self.waiting_descriptors
        if not waiting:
            self._refilling = limit > 0
        elif self._refilling or waiting <= limit // 2:
            self._refilling = waiting + descriptors <= limit
        return self._refilling

    def room(self, most: int) -> int:
        """Return how many handles of one descriptor each, up to ``most``, may be acknowledged now.

        As many as ``may_add_handle`` would let pass one after the other.
        """
        if self.takes_all:
            return most
        limit = self._ready if self.is_awaited else self.pace
        waiting = self.waiting_descriptors
        if waiting and not (self._refilling or waiting <= limit // 2):
            return 0
        room = max(0, limit - waiting)
        self._refilling = room > 0
        return min(room, most)

    def reader_came(self) -> None:
        """Somebody reads: from now on one handle may be acknowledged ahead."""
        self.pace = self.pace or 1

    def found_nothing(self) -> None:
        """A reader that has taken handles found nothing ready: twice as much may be."""
        if self._took_handles:
            self._took_handles = False
            self.pace = min(2 * self.pace, self._ready)

    def begin_turn(self, *, reader_waits: bool) -> None:
        """Look at what was taken since the last turn of the event loop, and whether more could be.

        All of it left lying for a whole turn was too much, unless a reader waits, who takes it as
        soon as it runs.
        """
        if self.was_taken:
            self.was_taken = False
        elif self.waiting_descriptors and not reader_waits and self.pace > 1:
            self.pace = 1
        if reader_waits and not self.ready:
            self.reader_came()
            self.found_nothing()

    def add_handle(self, received: Received, size: int, descriptors: int = 1) -> None:
        """Add a handle whose acknowledgement goes with the next control stage."""
        chunk = self._chunk
        chunk.messages.append(received)
        chunk.sizes.append(size)
        if type(received) is Internal:
            chunk.has_internal = True
        self.bytes_waiting += size
        if received[1] is not None:  # a conversion may make nothing of a handle
            self.waiting_descriptors += descriptors
            if descriptors > 1:
                self._heavy.setdefault(id(received[1]), []).append(descriptors)

    def add_handles(self, run: list[Received], sizes: list[int]) -> None:
        """As ``add_handle`` of each, with one descriptor."""
        chunk = self._chunk
        chunk.messages += run
        chunk.sizes += sizes
        if not chunk.has_internal:
            chunk.has_internal = any(type(received) is Internal for received in run)
        self.bytes_waiting += sum(sizes)
        self.waiting_descriptors += len(run)

    def add_plain(self, received: Received, size: int) -> None:
        """Add a message, behind the acknowledgements before it."""
        chunk = self._last_chunk
        if chunk is None:
            self._make_ready(received, size)
        else:
            chunk.add(received, size)
            self.bytes_waiting += size

    def add_run(self, run: list[Received], sizes: list[int]) -> None:
        """As ``add_plain`` of each, none of which is internal; leaves both lists empty."""
        chunk = self._last_chunk
        if chunk is None:
            self.bytes += sum(sizes)
            self.ready.extend(run)
            self._sizes.extend(sizes)
        else:
            chunk.messages += run
            chunk.sizes += sizes
            self.bytes_waiting += sum(sizes)
        run.clear()
        sizes.clear()

    def drop(self, size: int) -> None:
        """Count what was refused, or came too late, as taken."""
        self.bytes_taken += size

    # -- what the kernel has ---------------------------------------------------------------------

    def hold_back(self, on: bool) -> None:
        """Say whether plain messages wait for a reader.

        Internal messages that stood behind them for the sake of order overtake them from now on:
        a reader is not to get those.
        """
        if on and not self.holds_back:
            waiting = list(zip(self.ready, self._sizes, strict=True))
            self.urgent.extend((one, size) for one, size in waiting if type(one) is Internal)
            if self.urgent:
                kept = [item for item in waiting if type(item[0]) is not Internal]
                self.ready.clear()
                self.ready.extend(one for one, _ in kept)
                self._sizes = deque(size for _, size in kept)
        self.holds_back = on

    def control_staged(self) -> int:
        """Everything due is in a control stage now; return its number, for ``control_passed``."""
        self._staged += 1
        if self._chunk.messages:
            self._chunk.number = self._staged
            self._staged_chunks.append(self._chunk)
            self._chunk = _Chunk()
        return self._staged

    def control_passed(self, number: int) -> None:
        """The kernel has the whole of that control stage."""
        self._passed = number
        self.pump()

    def pump(self) -> None:
        """Make ready what may be."""
        chunks = self._staged_chunks
        while chunks and chunks[0].number <= self._passed:
            chunk = chunks.pop(0)
            size = sum(chunk.sizes)
            self.bytes_waiting -= size
            if self.holds_back and chunk.has_internal:
                for received, size in zip(chunk.messages, chunk.sizes, strict=True):
                    self._make_ready(received, size)
            else:
                self.ready.extend(chunk.messages)
                self._sizes.extend(chunk.sizes)
                self.bytes += size

    def _make_ready(self, received: Received, size: int) -> None:
        self.bytes += size
        if self.holds_back and type(received) is Internal:
            self.urgent.append((received, size))
        else:
            self.ready.append(received)
            self._sizes.append(size)

    # -- out -------------------------------------------------------------------------------------

    def take(self, *, urgent: bool = False) -> Received:
        """Take the next message that is ready.

        Args:
            urgent: the next that overtakes, which is for listeners alone, never for a reader.
        """
        if urgent:
            received: Received
            received, size = self.urgent.popleft()
        else:
            received, size = self.ready.popleft(), self._sizes.popleft()
        self.bytes -= size
        self.bytes_taken += size
        self.was_taken = True
        handle = received[1]
        if handle is not None:
            self._took_handles = True
            self.waiting_descriptors -= self._weight(handle) if self._heavy else 1
        return received

    def take_all(self) -> list[Received]:
        """Take everything that is ready, but for what overtakes."""
        taken = list(self.ready)
        size = sum(self._sizes)
        self.ready.clear()
        self._sizes.clear()
        self.bytes -= size
        self.bytes_taken += size
        self.was_taken = self._took_handles = True
        heavy = self._heavy
        if self.settled and not self.urgent:
            self.waiting_descriptors = 0
            heavy.clear()
        else:
            for _, handle in taken:
                if handle is not None:
                    self.waiting_descriptors -= self._weight(handle) if heavy else 1
        return taken

    def _weight(self, handle: object) -> int:
        weights = self._heavy.get(id(handle))
        if weights is None:
            return 1
        weight = weights.pop(0)
        if not weights:
            del self._heavy[id(handle)]
        return weight

    # -- ends ------------------------------------------------------------------------------------

    @property
    def settled(self) -> bool:
        """Whether nothing waits for an acknowledgement to leave."""
        return not (self._chunk.messages or self._staged_chunks)

    def settle(self, *, deliver_unacked: bool) -> None:
        """No control stage passes any more.

        Args:
            deliver_unacked: whether handles whose acknowledgement did not leave are ours all the
                same; if not, they are closed.
        """
        self.pump()
        waiting = [*self._staged_chunks, self._chunk]
        self._staged_chunks.clear()
        self._chunk = _Chunk()
        self.bytes_waiting = 0
        for chunk in waiting:
            for received, size in zip(chunk.messages, chunk.sizes, strict=True):
                self._settle(received, size, deliver_unacked)

    def _settle(self, received: Received, size: int, deliver_unacked: bool) -> None:
        handle = received[1]
        if handle is None or deliver_unacked:
            self._make_ready(received, size)
            return
        close = getattr(handle, "close", None)
        if close is not None:
            try:
                close()
            except Exception as error:  # the application's; the others are closed all the same
                self._faults.closes.append((handle, error))
