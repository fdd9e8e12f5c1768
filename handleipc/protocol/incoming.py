"""The receiving direction of a channel: which descriptors belong to which line, and who gets them.

Theory of operation
-------------------

A handle goes through three queues::

    held       in stream order; a handle without descriptors (a *hole*) stops all behind it
    release    acknowledged in our control queue; waits until that is in the kernel
    ready      the application's to take

Acknowledging before giving, and giving only what is acknowledged, leaves no moment in which both
ends own a handle, or neither. Handles have numbers; what is granted and counted is descriptors,
which is what a process runs out of.
"""

from __future__ import annotations

import copy
from collections import deque

from handleipc.exceptions import HandleError
from handleipc.handles.refusal import Check, Convert, Maker, Refusal, accept_any, make_none
from handleipc.limits import Invitation, Limits
from handleipc.protocol.credit import Credit
from handleipc.protocol.deliveries import MESSAGE_COST, Deliveries, Internal, Received, as_received
from handleipc.protocol.front import Faults, Hooks
from handleipc.protocol.lost import HeldLine, HeldLines, Lost
from handleipc.protocol.news import News
from handleipc.protocol.node import NodeHandles
from handleipc.protocol.pairing import Pairing
from handleipc.protocol.timers import Timers
from handleipc.system import System
from handleipc.typing import JSON, Options
from handleipc.wire import envelope

__all__ = ["Incoming"]


class Incoming:
    """The receiving half of ``ChannelProtocol``, which is its only caller.

    Args:
        limits: the bounds of the channel.
        system: the clock, and the way to close descriptors.
        timers: of the channel.
        convert: makes a handle of descriptors, or raises ``Refusal``.
        gave: what an invitation granted from the start.
        hooks: are told of internal messages.
        faults: where those go that cost one handle and not the channel.
        maker: says what makes the handles of a run without a question about each.
        check: says of a handle that must wait whether it would be refused in any case.
    """

    def __init__(
        self,
        limits: Limits,
        system: System,
        timers: Timers,
        convert: Convert,
        gave: Invitation,
        *,
        hooks: Hooks,
        faults: Faults,
        maker: Maker | None = None,
        check: Check | None = None,
    ) -> None:
        self._limits = limits
        self._system = system
        self._convert = convert
        self._hooks = hooks
        self._maker = maker or make_none
        self._check = check or accept_any
        self.native = False
        self.closing: bool = False
        self.listens_internal: bool = False
        """Whether somebody waits for internal messages, which may stand behind unread others."""
        self.deliveries: Deliveries = Deliveries(limits.ready, faults)
        self.pairing: Pairing = Pairing(system.close)
        self.held: HeldLines = HeldLines()
        """Lines that wait: for descriptors, or for room among what is acknowledged."""
        self.lost: Lost = Lost(limits, system, timers, self.held)

        self.ready: deque[Received] = self.deliveries.ready
        """Messages that the application may take."""

        # What is due to be said.
        self._errors = faults.errors
        self.node: NodeHandles = NodeHandles(
            limits,
            system,
            timers,
            convert=convert,
            deliveries=self.deliveries,
            pairing=self.pairing,
            errors=faults.errors,
        )
        self.credit: Credit = Credit(limits, gave.descriptors, gave.bytes)
        self.news: News = News(self.credit, self.lost, self._granted_from)
        self.wants_more = False
        """Whether a local wait needs us to go on reading although nobody takes what comes."""

    @property
    def is_clear(self) -> bool:
        """Whether nothing is in the way of what comes: no line waits, and none is refused."""
        return not (self.held or self.closing)

    def message(self, message: JSON, size: int) -> None:
        """Take a plain message of either dialect; ``size`` counts the bytes of its line."""
        received = as_received(message, None)
        is_internal = type(received) is Internal
        if is_internal and self._hooks.internal(message):
            self.deliveries.drop(size)
        elif self.held and not (is_internal and self._may_overtake()):
            self.held.append(HeldLine(size, message))
        elif self.closing:
            self.deliveries.drop(size)
        else:
            self.deliveries.add_plain(received, size)

    def messages(self, messages: list[JSON], size: int) -> None:
        """Take ``[5,...]``, a line of ``size`` bytes with several plain messages."""
        size += envelope.RUN_MESSAGE_COST * len(messages)
        self.credit.take_bytes(size)
        sizes = _shares(size, len(messages))
        if self.is_clear:
            run: list[Received] = [
                (message, None)
                for message in messages
                if not (type(message) is dict and "cmd" in message)
            ]
            if len(run) == len(messages):
                self.deliveries.add_run(run, sizes)
                return
        for message, share in zip(messages, sizes, strict=True):
            self.message(message, share)

    def _may_overtake(self) -> bool:
        """Say whether an internal message may pass what is held: handles that nobody takes yet.

        Those are the sender's until then, and it counts them. A hole is not passed, nor another
        internal message.
        """
        first = self.held[0]
        return self.listens_internal and first.fds is not None and not self.held.internal

    # -- lines of the native dialect -------------------------------------------------------------

    def descriptor_count(self, count: int, at: int) -> None:
        """Take ``[1,n]``, or the beginning of a run: claim the front set.

        Raises:
            RemoteProtocolError: there is none here, it holds another number, or the last one was
                not used up.
        """
        self.credit.check_set(count, self.lost.awaited)
        if self.pairing.declare(count, at):
            self.credit.lost_some()

    def check_unfinished(self, at: int) -> None:
        """Judge the sets that are left when all lines were taken; there is one.

        An unfinished line, or none yet, begins at stream offset ``at``.

        Raises:
            RemoteProtocolError: more descriptors are here than can belong to that line.
        """
        pairing = self.pairing
        pairing.check_unfinished(at)
        if self.native:
            self.credit.check_set(len(pairing.sets[0].fds), self.lost.awaited)
        else:
            pairing.keep_two()

    def handle(self, line: envelope.Handle, size: int) -> None:
        """Take ``[2,...]``, the line of a handle.

        Raises:
            RemoteProtocolError: its number is out of order or beyond the grant.
        """
        self.credit.take_handles(line.sequence, 1, line.fds)
        self.credit.take_bytes(size)
        self._take_handle(line, size, self.pairing.claim(line.fds))

    def run(self, line: envelope.Run, at: int, size: int) -> None:
        """Take ``[4,...]``, the line of a run of handles, which begins at stream offset ``at``.

        Raises:
            RemoteProtocolError: as of ``descriptor_count`` and ``handle``.
        """
        tag, options, messages, first = line.tag, line.options, line.messages, line.sequence
        count = len(messages)
        self.descriptor_count(count, at)
        self.credit.take_handles(first, count, count)
        self.credit.take_bytes(size)
        fds = self.pairing.claim_rest()
        sizes = _shares(size, count)
        try:
            for i in range(self._make_run(line, fds, sizes), count):
                # A conversion may keep its description, or take it apart: each has its own.
                one = envelope.Handle(first + i, 1, tag, messages[i], copy.deepcopy(options))
                own = [fds.pop(0)] if fds else None
                self._take_handle(one, sizes[i], own)
        finally:
            self._close(fds)  # a signal handler raised

    def _make_run(self, line: envelope.Run, fds: list[int], sizes: list[int]) -> int:
        """Make as many handles of a run as may be acknowledged, without a question about each.

        Takes their descriptors out of ``fds``. Returns how many: none if there are questions.
        """
        if not (self.is_clear and fds):
            return 0
        messages = line.messages
        most = min(self.deliveries.room(len(messages)), len(fds))
        make = self._maker(line.tag, line.options) if most else None
        if make is None:
            return 0
        run: list[Received] = []
        try:
            for message in messages[:most]:
                # Out of the list first: what is being made may have it, if a signal handler raises.
                received: Received = (message, make(fds.pop(0)))
                if type(message) is dict and "cmd" in message:
                    received = as_received(*received)
                run.append(received)
        finally:
            # Then the channel ends, too, and closes what was not acknowledged.
            self.deliveries.add_handles(run, sizes[: len(run)])
        self.news.acknowledge(line.sequence + most - 1, most)
        return most

    def _take_handle(self, line: envelope.Handle, size: int, fds: list[int] | None) -> None:
        """Take a handle with its descriptors, None if some were lost: it is released, or waits."""
        sequence, count = line.sequence, line.fds
        if fds is not None and self.is_clear and self.deliveries.may_add_handle(count):
            self._release_handle(line, count, size, fds)
            return
        item = HeldLine(size, line.message, sequence, count, line.tag, line.options, fds)
        self.held.append(item)
        if self.closing:
            self._refuse(item, "closing")
        elif (refusal := self._check(line.tag, count)) is not None:
            # What can never be taken is not worth a place in the table until its turn comes.
            self._errors.append(refusal)
            self._refuse(item, refusal.code)
        elif self.lost.first is not None:
            # Kept, they would occupy the slots that the hole needs.
            self._close(fds)
            item.fds = None
        elif fds is None:
            self.lost.open(item)

    def again(self, line: envelope.Again) -> None:
        """Take ``[3,s,f]``, descriptors we asked for. Raises RemoteProtocolError if we did not."""
        fds = self.pairing.claim(line.fds)
        used = False
        try:
            used = self.lost.answer(line.sequence, fds)
        finally:
            if not used:
                self._close(fds)

    # -- lines of the node dialect ---------------------------------------------------------------

    def node_handle(
        self, tag: str, message: JSON, options: Options | None, at: int, size: int
    ) -> None:
        """Take a NODE_HANDLE line, unwrapped, which begins at stream offset ``at``.

        Raises:
            RemoteProtocolError: the peer does not wait for our replies.
        """
        item = HeldLine(size, message, 0, 1, tag, options)
        if self.node.take(item, at):
            self.held.append(item)
            self._drain_held()

    # -- handles without descriptors -------------------------------------------------------------

    def on_ask_time(self) -> None:
        """Ask for lost descriptors again, or give the handle up that lacks them."""
        hole = self.lost.first
        code = self.lost.on_ask_time()
        if hole is not None and code is not None:
            why = "no free descriptor slot" if code == "descriptors" else "denied by the system"
            self._errors.append(HandleError(f"refused handle {hole.sequence} of the peer: {why}"))
            self._refuse(hole, code)
            self.lost.next()

    def _refuse(self, item: HeldLine, code: str) -> None:
        """Give a handle back to its sender; its place in the order goes on without it."""
        self._close(item.fds)
        item.fds = None
        item.is_refused = True
        self.news.refuse(item.sequence, code)

    # -- acknowledge, then give ------------------------------------------------------------------

    def pump(self) -> None:
        """Move what may be moved: held to release, release to ready."""
        if self.held:
            self._drain_held()
        self.deliveries.pump()

    @property
    def cost(self) -> int:
        """What all that was not taken is counted for, in bytes of memory."""
        return self.deliveries.cost + self.held.bytes + MESSAGE_COST * len(self.held)

    @property
    def is_full(self) -> bool:
        """Whether as much is held as is, while nothing here waits for more."""
        size = self.deliveries.bytes + self.held.bytes
        count = len(self.ready) + len(self.held)
        return size >= self._limits.held_bytes or count >= self._limits.held_messages

    @property
    def waits_for_a_reader(self) -> bool:
        """Whether a handle of the peer waits for nothing but that others are taken."""
        return bool(
            self.held and self.held[0].fds is not None and self.deliveries.waiting_descriptors
        )

    def _drain_held(self) -> None:
        held = self.held
        while held:
            item = held[0]
            if item.is_refused:
                if item.sequence:
                    self.deliveries.drop(item.size)
                    self.news.acknowledge(item.sequence, item.n_fds)
            elif not item.sequence:
                if item.fds is None:
                    self._release_plain(item)
                elif not self.node.may_release:
                    return
                else:
                    held.popleft()  # first: what is being converted is the conversion's
                    self.node.release(item)
                    continue
            elif item.fds is None or not (
                self.deliveries.may_add_handle(item.n_fds)
                # An internal one has a reader of its own, who takes it at once.
                or (self.listens_internal and envelope.is_internal(item.message))
            ):
                return
            else:
                held.popleft()
                self._release_handle(item, item.n_fds, item.size, item.fds)
                continue
            held.popleft()

    def _release_plain(self, item: HeldLine) -> None:
        if self.closing:
            self.deliveries.drop(item.size)
        else:
            self.deliveries.add_plain(as_received(item.message, None), item.size)

    def _release_handle(
        self,
        line: envelope.Handle | HeldLine,
        count: int,
        size: int,
        fds: list[int],
    ) -> None:
        sequence = line.sequence
        try:
            handle = self._convert(line.tag, line.options, fds)
        except BaseException as error:
            # If a signal handler raised: the conversion has closed them, and the sender keeps its.
            code = error.code if isinstance(error, Refusal) else "kind"
            self.news.refuse(sequence, code)
            self.deliveries.drop(size)
            self.news.acknowledge(sequence, count)
            if not isinstance(error, Refusal):
                raise
            self._errors.append(error)
        else:
            self.deliveries.add_handle(as_received(line.message, handle), size, count)
            self.news.acknowledge(sequence, count)

    # -- what to say -----------------------------------------------------------------------------

    def _granted_from(self) -> int:
        """Return the bytes that count as taken, when more is to be granted."""
        # A closing end stores nothing more, and crossing disconnects must not wait for credit. And
        # while a local wait depends on what comes, it may come, as long as it can be held.
        if self.closing or (self.wants_more and self.cost < self._limits.held_hard):
            return self.credit.bytes_in
        return self.deliveries.bytes_taken

    # -- who takes -------------------------------------------------------------------------------

    def set_taker(self, *, listens: bool, takes_all: bool, listens_internal: bool) -> None:
        """Say who takes what is ready: to be called when that changes, before ``next_stage``.

        Args:
            listens: listeners do, at once; else a reader may come.
            takes_all: a reader does, as soon as it is ready.
            listens_internal: somebody waits for internal messages, behind unread others perhaps.
        """
        deliveries = self.deliveries
        self.listens_internal = listens_internal
        if listens is deliveries.holds_back:
            deliveries.hold_back(not listens)
        deliveries.takes_all = listens or takes_all
        if listens:
            deliveries.reader_came()

    # -- ends ------------------------------------------------------------------------------------

    def close(self) -> None:
        """This end disconnects: refuse what is held and what still comes."""
        for item in self.held:
            if item.is_refused:
                continue
            if item.sequence:
                self._refuse(item, "closing")
            elif item.fds is not None:
                self.node.refuse(item)
        self.lost.close()
        self._drain_held()  # messages among them have arrived, and stay readable
        self.closing = True
        self.node.close()

    @property
    def settled(self) -> bool:
        """Whether nothing more is to be said or released."""
        return self.deliveries.settled and self.node.settled and not self.news.is_owed

    def settle(self, *, deliver_unacked: bool) -> None:
        """Nothing more comes: give what arrived whole, close what is not ours.

        Args:
            deliver_unacked: True if the sender cannot have handles back: it speaks node and never
                takes one back, or it is known to be dead.
        """
        self.deliveries.settle(deliver_unacked=deliver_unacked)
        whole = deliver_unacked and not self.closing
        held = self.held
        try:
            while held:
                item = held.popleft()
                whole = whole and (not item.sequence or item.fds is not None)
                self._settle_held(item, whole)
        finally:
            for item in held:  # a signal handler raised in a conversion
                self._close(item.fds)
            held.clear()
        self.pairing.close()
        self.lost.close()

    def _settle_held(self, item: HeldLine, deliver_handle: bool) -> None:
        handle = None
        if item.fds is not None:
            if not deliver_handle:
                self._close(item.fds)
                return
            try:
                handle = self._convert(item.tag, item.options, item.fds)
            except Refusal as refusal:
                self._errors.append(refusal)
                return
        elif item.sequence:
            return
        if not self.closing:
            self.deliveries.add_plain(as_received(item.message, handle), item.size)

    def _close(self, fds: list[int] | None) -> None:
        for fd in fds or ():
            self._system.close(fd)


def _shares(size: int, count: int) -> list[int]:
    """Divide the bytes of a line among its messages; nothing is lost."""
    each, rest = divmod(size, count)
    shares = [each] * count
    shares[0] += rest
    return shares
