"""The receiving direction of a channel: which descriptors belong to which line, and who gets them.

Theory of operation
-------------------

A handle goes through three queues::

    held       in stream order; a handle without descriptors (a *hole*) stops all behind it
    release    acknowledged in our control queue; waits until that is in the kernel
    ready      the application's to take

Acknowledging before giving, and giving only what is acknowledged, leaves no moment in which both
ends own a handle, or neither.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from handleipc import envelope
from handleipc.codec import DECODE_ERRORS
from handleipc.deliveries import Deliveries, Internal, Received
from handleipc.exceptions import HandleError, MalformedEnvelope, RemoteProtocolError
from handleipc.framing import Batch
from handleipc.holes import HeldLine, Holes
from handleipc.limits import Limits
from handleipc.pairing import Pairing
from handleipc.replies import Replies
from handleipc.system import System
from handleipc.typing import JSON, Options

__all__ = ["Convert", "Direct", "Incoming", "Invitation", "Refusal"]

Handle, Message = envelope.Handle, envelope.Message
_decode, _decode_carefully = envelope.decode_line, envelope.decode_native

# (tag, options, descriptors owned, their kinds) -> handle. Owns the descriptors whatever happens.
Convert = Callable[[str, Options | None, list[int], list[int]], object]
# (tag, kind) -> what makes a handle of one descriptor that came without options.
Direct = Mapping[tuple[str, int], Callable[[int, int], object]]


class Refusal(HandleError):
    """A handle cannot become an object here.

    Attributes:
        code: ``kind`` or ``type``, as the wire spells it.
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(code, text)
        self.code = code

    def __str__(self) -> str:
        return str(self.args[1])


@dataclasses.dataclass(frozen=True, slots=True)
class Invitation:
    """What a parent tells its child about the native dialect before it starts."""

    handles: int
    bytes: int


class Incoming:
    """The receiving half of ``ChannelProtocol``, which is its only caller.

    Args:
        limits: the bounds of the channel.
        system: the clock, and the way to close descriptors.
        convert: makes a handle of descriptors, or raises ``Refusal``.
        direct: the same for what has been found to be convertible without a question.
        gave: what an invitation granted from the start.
    """

    def __init__(
        self,
        limits: Limits,
        system: System,
        convert: Convert,
        direct: Direct | None,
        gave: Invitation,
    ) -> None:
        self._limits = limits
        self._shape = limits.shape
        self._system = system
        self._convert = convert
        self._direct = direct if direct is not None else {}
        self.on_internal: Callable[[Any], None] = lambda _: None
        """Called with each internal message when its line is read; it is delivered as well."""
        self.native = False
        self.closing = False
        self.deliveries = Deliveries(limits.ready)
        self.pairing = Pairing(system.close)
        self._held: deque[HeldLine] = deque()
        self._seen = 0
        self.holes = Holes(limits, system, self._held)

        self.ready = self.deliveries.ready
        """Messages that the application may take."""

        # What is due to be said.
        self.ack_out = 0
        self.replies = Replies(limits, system)
        self.refusals: list[list[object]] = []
        self.owes = False

        self.bytes_in = 0
        self.gave_handles = gave.handles
        self.gave_bytes = gave.bytes
        self._window = limits.window
        self.wants_more = False
        """Whether a local wait needs us to go on reading although nobody takes what comes."""
        self.errors: list[Exception] = []
        """Faults that cost one handle and not the channel, for the ``error`` event."""

    @property
    def takes_runs(self) -> bool:
        """Whether messages without a command are simply added to ``deliveries``, many at once."""
        return not (self._held or self.closing)

    def message(self, message: JSON, size: int) -> None:
        """Take a plain message of either dialect; ``size`` counts the bytes of its line."""
        received: Received = (message, None)
        if type(message) is dict and "cmd" in message and envelope.is_internal(message):
            received = Internal(received)
        if self._held:
            self._held.append(HeldLine(size, message))
        elif self.closing:
            self.deliveries.drop(size)
        else:
            self.deliveries.add_plain(received, size)
        if type(received) is Internal:
            self.on_internal(message)

    # -- lines of the native dialect -------------------------------------------------------------

    def native_lines(
        self, batch: Batch, index: int, command: Callable[[dict[str, Any], int, int], None]
    ) -> None:
        """Take the lines of a batch from number ``index`` on.

        ``command`` is called with each that is for somebody else, its offset and its size.

        Raises:
            MalformedEnvelope, RemoteProtocolError: the peer broke the protocol.
        """
        view, offset, start = batch.view, batch.offset, batch.start_of(index)
        shape, pairing, deliveries = self._shape, self.pairing, self.deliveries
        short = shape.short
        sets = pairing.sets
        run: list[Received] = []
        sizes: list[int] = []
        at_once = self.takes_runs
        line: envelope.NativeLine
        try:
            for end in batch.ends[index:]:
                if sets:
                    pairing.check_claimed(offset + start)
                raw, size = view[start : end - 1], end - start
                try:
                    # A line this short cannot be beyond the bounds.
                    line = _decode(raw) if size <= short else _decode_carefully(raw, shape)
                except DECODE_ERRORS:
                    line = _decode_carefully(raw, shape)
                kind = type(line)
                if kind is Message:
                    message = line.message  # type: ignore[union-attr]
                    self._count_bytes(size)
                    if at_once and not (type(message) is dict and "cmd" in message):
                        run.append((message, None))
                        sizes.append(size)
                        start = end
                        continue
                if run:
                    deliveries.add_run(run, sizes)
                if kind is Handle:
                    self.handle(line, size)  # type: ignore[arg-type]
                elif kind is Message:
                    self.message(message, size)
                elif isinstance(line, envelope.DescriptorCount):
                    self.descriptor_count(line, offset + start)
                elif isinstance(line, envelope.Again):
                    self.again(line)
                elif envelope.is_command(line):
                    command(line, offset + start, size)  # type: ignore[arg-type]
                else:
                    raise MalformedEnvelope("the peer sent an object that is no command")
                start, at_once = end, self.takes_runs
        finally:
            if run:
                deliveries.add_run(run, sizes)

    def descriptor_count(self, line: envelope.DescriptorCount, at: int) -> None:
        """Take ``[1,n]``: claim the front set.

        Raises:
            RemoteProtocolError: there is none here, it holds another number, or the last one was
                not used up.
        """
        if self.pairing.declare(line.count, at):
            self._window = max(1, self._window // 2)

    def handle(self, line: envelope.Handle, size: int) -> None:
        """Take ``[2,...]``, the line of a handle.

        Raises:
            RemoteProtocolError: its number is out of order or beyond the grant.
        """
        sequence = line.sequence
        if sequence != self._seen + 1:
            raise RemoteProtocolError(f"the peer sent handle {sequence} after {self._seen}")
        if sequence > self.gave_handles:
            raise RemoteProtocolError(
                f"the peer sent handle {sequence}, and was granted {self.gave_handles}"
            )
        self._seen = sequence
        self._count_bytes(size)
        # Nothing is in the way: the rule.
        if not (self._held or self.closing) and self.deliveries.may_add_handle():
            if line.fds == 1 and line.options is None:
                fd, fd_kind = self.pairing.claim_one()
                make = self._direct.get((line.tag, fd_kind))
                if make is not None and fd >= 0:
                    # Most of the work of a busy channel.
                    message = line.message
                    received: Received = (message, make(fd, fd_kind))
                    if type(message) is dict and "cmd" in message:
                        received = _received(*received)
                    self.deliveries.add_handle(received, size)
                    self.ack_out = sequence
                    self.owes = True
                    return
                fds, kinds = ([fd], [fd_kind]) if fd >= 0 else (None, [])
            else:
                fds, kinds = self.pairing.claim(line.fds)
            if fds is not None:
                self._release_handle(line, size, fds, kinds)
                return
        else:
            fds, kinds = self.pairing.claim(line.fds)
        item = HeldLine(size, line.message, sequence, line.fds, line.tag, line.options, fds, kinds)
        self._held.append(item)
        if self.closing:
            self._refuse(item, "closing")
        elif self.holes.first is not None:
            # Kept, they would occupy the slots that the hole needs.
            self._close(fds)
            item.fds = None
        elif fds is None:
            self.holes.open(item)

    def again(self, line: envelope.Again) -> None:
        """Take ``[3,s,f]``: descriptors we asked for.

        Raises:
            RemoteProtocolError: we did not ask.
        """
        fds, kinds = self.pairing.claim(line.fds)
        used = False
        try:
            used = self.holes.answer(line.sequence, fds, kinds)
        finally:
            if not used:
                self._close(fds)

    def _count_bytes(self, size: int) -> None:
        # A counted line may start while bytes sent < granted, so one line may overshoot.
        if self.bytes_in >= self.gave_bytes:
            raise RemoteProtocolError(
                f"the peer sent {self.bytes_in} bytes, and was granted {self.gave_bytes}"
            )
        self.bytes_in += size

    # -- lines of the node dialect ---------------------------------------------------------------

    def node_handle(
        self, tag: str, message: JSON, options: Options | None, at: int, size: int
    ) -> None:
        """Take a NODE_HANDLE line, unwrapped: exactly one reply is due for it.

        Raises:
            RemoteProtocolError: the peer does not wait for our replies.
        """
        self.replies.check_room()
        found = self.pairing.front_set(at)
        if found is None or (not found.fds and not found.truncated):
            self._reject("the peer sent a handle without its descriptor")
            return
        if self.closing or len(found.fds) != 1:
            lost = found.truncated and not self.closing and not found.fds
            self._close(found.fds)
            if lost:
                if self.replies.nack_when_free():
                    self._report_lost()
            elif self.closing:
                self.replies.nack()
            else:
                self._reject(f"the peer sent a handle with {len(found.fds)} descriptors")
            return
        try:
            handle = self._convert(tag, options, found.fds, found.kinds)
        except Refusal as refusal:
            self._reject(str(refusal), refusal)
            return
        # One queue with the plain messages, so that order holds; node acks at arrival.
        self._drain_held()
        self.replies.ack()
        self.deliveries.add_handle(_received(message, handle), size)

    def on_nack_time(self) -> None:
        """Send the NACK of a lost descriptor, if there is a free slot for the next try."""
        if self.replies.on_time():
            self._report_lost()

    def _report_lost(self) -> None:
        why = "a descriptor was lost: this process has no free slot (RLIMIT_NOFILE); asked again"
        self.errors.append(RemoteProtocolError(why))

    def _reject(self, why: str, error: Exception | None = None) -> None:
        self.errors.append(error or RemoteProtocolError(why))
        self.replies.nack()

    # -- handles without descriptors -------------------------------------------------------------

    def on_ask_time(self) -> None:
        """Ask for lost descriptors again, or give the handle up that lacks them."""
        hole = self.holes.first
        code = self.holes.on_ask_time()
        if hole is not None and code is not None:
            why = "no free descriptor slot" if code == "descriptors" else "denied by the system"
            self.errors.append(HandleError(f"refused handle {hole.sequence} of the peer: {why}"))
            self._refuse(hole, code)
            self.holes.next()

    def _refuse(self, item: HeldLine, code: str) -> None:
        """Give a handle back to its sender; its place in the order goes on without it."""
        self._close(item.fds)
        item.fds = None
        item.is_refused = True
        self._refuse_sequence(item.sequence, code)

    def _refuse_sequence(self, sequence: int, code: str) -> None:
        last = self.refusals[-1] if self.refusals else None
        if last is not None and last[2] == code and int(last[0]) + int(last[1]) == sequence:  # type: ignore[call-overload]
            last[1] = int(last[1]) + 1  # type: ignore[call-overload]
        else:
            self.refusals.append([sequence, 1, code])
        self.owes = True

    # -- acknowledge, then give ------------------------------------------------------------------

    def pump(self) -> None:
        """Move what may be moved: held to release, release to ready."""
        self._drain_held()
        self.deliveries.pump()

    @property
    def holds(self) -> bool:
        """Whether lines wait: for descriptors, or for room among what is acknowledged."""
        return bool(self._held)

    def _drain_held(self) -> None:
        held = self._held
        while held:
            item = held[0]
            if not item.sequence:
                held.popleft()
                self._release_plain(item)
            elif item.is_refused:
                held.popleft()
                self.deliveries.drop(item.size)
                self._acknowledge(item.sequence)
            elif item.fds is None or not self.deliveries.may_add_handle():
                return
            else:
                held.popleft()
                self._release_handle(item, item.size, item.fds, item.kinds)

    def _release_plain(self, item: HeldLine) -> None:
        if self.closing:
            self.deliveries.drop(item.size)
        else:
            self.deliveries.add_plain(_received(item.message, None), item.size)

    def _release_handle(
        self, line: envelope.Handle | HeldLine, size: int, fds: list[int], kinds: list[int]
    ) -> None:
        try:
            handle = self._convert(line.tag, line.options, fds, kinds)
        except Refusal as refusal:
            self.errors.append(refusal)
            self._refuse_sequence(line.sequence, refusal.code)
            self.deliveries.drop(size)
        else:
            self.deliveries.add_handle(_received(line.message, handle), size)
        self._acknowledge(line.sequence)

    def _acknowledge(self, sequence: int) -> None:
        self.ack_out = sequence
        self.owes = True

    # -- what to say -----------------------------------------------------------------------------

    def grants(self) -> tuple[int, int]:
        """Return how far the peer may number handles and send bytes, as of now."""
        limits = self._limits
        # A closing end stores nothing more, and crossing disconnects must not wait for credit.
        base = self.bytes_in if self.closing else self.deliveries.bytes_taken
        size = limits.held_hard if self.wants_more else limits.bytes
        return max(self.gave_handles, self.ack_out + self._window), max(
            self.gave_bytes, base + size
        )

    @property
    def grant_due(self) -> bool:
        """Whether enough bytes became free to be worth a line (native-dialect rule 6.4)."""
        base = self.bytes_in if self.closing else self.deliveries.bytes_taken
        size = self._limits.held_hard if self.wants_more else self._limits.bytes
        return base + size - self.gave_bytes >= max(1, self._limits.bytes // 2)

    def take_control(self) -> dict[str, object]:
        """Return the fields of the control line that is due now, and count them as said."""
        fields: dict[str, object] = {}
        if self.refusals:
            fields["refuse"], self.refusals = self.refusals, []
        handles, size = self.grants()
        fields.update(ack=self.ack_out, handles=handles, bytes=size)
        if self.holes.ask is not None:
            fields["again"], self.holes.ask = list(self.holes.ask), None
        self._window = min(self._limits.window, self._window + 1)
        self.gave_handles, self.gave_bytes = handles, size
        self.owes = False
        return fields

    # -- ends ------------------------------------------------------------------------------------

    def close(self) -> None:
        """This end disconnects: refuse what is held and what still comes."""
        self.closing = True
        for item in self._held:
            if item.sequence and not item.is_refused:
                self._refuse(item, "closing")
        self.holes.close()
        self.replies.close()

    @property
    def settled(self) -> bool:
        """Whether nothing more is to be said or released."""
        return self.deliveries.settled and self.replies.settled and not (self.owes or self.refusals)

    def settle(self, *, deliver_unacked: bool) -> None:
        """Nothing more comes: give what arrived whole, close what is not ours.

        Args:
            deliver_unacked: True if the sender cannot have handles back: it speaks node and never
                takes one back, or it is known to be dead.
        """
        self.deliveries.settle(deliver_unacked=deliver_unacked)
        whole = deliver_unacked and not self.closing
        for item in self._held:
            whole = whole and (not item.sequence or item.fds is not None)
            self._settle_held(item, whole)
        self._held.clear()
        self.pairing.close()
        self.holes.close()
        self.replies.nack_at = None

    def _settle_held(self, item: HeldLine, deliver_handle: bool) -> None:
        handle = None
        if item.sequence:
            if item.fds is None:
                return
            if not deliver_handle:
                self._close(item.fds)
                return
            try:
                handle = self._convert(item.tag, item.options, item.fds, item.kinds)
            except Refusal as refusal:
                self.errors.append(refusal)
                return
        if not self.closing:
            self.deliveries.add_plain(_received(item.message, handle), item.size)

    def _close(self, fds: list[int] | None) -> None:
        for fd in fds or ():
            self._system.close(fd)


def _received(message: JSON, handle: object) -> Received:
    return Internal((message, handle)) if envelope.is_internal(message) else (message, handle)
