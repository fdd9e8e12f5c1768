"""What each line of the peer is, in the dialect it speaks, and which half of the channel it is for.

Reads lines in their order and tells ``incoming`` or ``outgoing``. Knows when the peer changes to
the native dialect, and whether it may: the switch is bound to the order of lines, not to time. What
is written, and when the channel ends, is ``protocol``'s.
"""

from __future__ import annotations

from typing import Any

from handleipc.exceptions import MalformedEnvelope, RemoteProtocolError
from handleipc.limits import Limits
from handleipc.protocol.deliveries import Received
from handleipc.protocol.front import Faults
from handleipc.protocol.incoming import Incoming
from handleipc.protocol.outgoing import Outgoing
from handleipc.texts import quoted
from handleipc.wire import VERSION, codec, envelope
from handleipc.wire.framing import Batch

__all__ = ["Dispatch"]

_decode_short = codec.decode_short
_decode_node = envelope.decode_node
_decode_native, _decode_carefully = envelope.decode_line, envelope.decode_native


class Dispatch:
    """The peer of one channel, as its lines show it.

    Args:
        limits: the bounds of this end.
        incoming, outgoing: the halves of the channel.
        faults: are told of what the peer did wrong without consequence.
        inviting: the peer was invited to the native dialect.
        invited: this end was.
    """

    __slots__ = (
        "_incoming",
        "_inviting",
        "_outgoing",
        "_shape",
        "_warnings",
        "has_switched",
        "may_switch",
        "was_opened",
    )

    def __init__(
        self,
        limits: Limits,
        incoming: Incoming,
        outgoing: Outgoing,
        *,
        faults: Faults,
        inviting: bool,
        invited: bool,
    ) -> None:
        self._shape = limits.shape
        self._incoming = incoming
        self._outgoing = outgoing
        self._warnings = faults.warnings
        self._inviting = inviting
        self.was_opened: bool = False
        """Whether the peer has said anything."""
        self.has_switched: bool = False
        """Whether it speaks native."""
        self.may_switch: bool = invited
        """Whether this end may speak native, or does."""

    def take(self, batch: Batch) -> None:
        """Take the lines of one read.

        Raises:
            HandleIPCError: the peer broke the protocol.
        """
        incoming = self._incoming
        ends = batch.ends
        read = 0 if incoming.native else self._node_lines(batch)
        if read < len(ends):
            self._native_lines(batch, read)
        if incoming.pairing.sets:
            at = batch.offset + (ends[-1] if ends else batch.start)
            if batch.is_all:
                incoming.check_unfinished(at)
            else:
                incoming.pairing.check_claimed(at)  # one set may belong to a line that is left

    def _node_lines(self, batch: Batch) -> int:
        """Take the lines of a batch, up to one that switches to native; returns how many."""
        view, offset, start = batch.view, batch.offset, batch.start
        incoming, pairing = self._incoming, self._incoming.pairing
        sets, shape = pairing.sets, self._shape
        short = shape.short
        run: list[Received] = []
        sizes: list[int] = []
        at_once = self.was_opened and incoming.is_clear
        try:
            for index, end in enumerate(batch.ends):
                if sets:
                    pairing.check_claimed(offset + start)
                raw, size = view[start : end - 1], end - start
                try:
                    value = _decode_short(raw) if size <= short else _decode_node(raw, shape)
                except codec.DECODE_ERRORS:
                    value = _decode_node(raw, shape)
                if at_once and not (type(value) is dict and "cmd" in value):
                    run.append((value, None))
                    sizes.append(size)
                else:
                    if run:
                        incoming.deliveries.add_run(run, sizes)
                    self._node_line(value, offset + start, size)
                    if incoming.native:
                        return index + 1
                    at_once = incoming.is_clear
                start = end
        finally:
            if run:
                incoming.deliveries.add_run(run, sizes)
        return len(batch.ends)

    def _native_lines(self, batch: Batch, index: int) -> None:
        """Take the lines of a batch from number ``index`` on."""
        view, offset = batch.view, batch.offset
        start, ends = (
            (batch.start_of(index), batch.ends[index:]) if index else (batch.start, batch.ends)
        )
        incoming, shape = self._incoming, self._shape
        short, credit, pairing = shape.short, incoming.credit, incoming.pairing
        sets = pairing.sets
        line: envelope.NativeLine
        for end in ends:
            if sets:
                pairing.check_claimed(offset + start)
            raw, size = view[start : end - 1], end - start
            try:
                # A line this short cannot be beyond the bounds.
                line = _decode_native(raw) if size <= short else _decode_carefully(raw, shape)
            except codec.DECODE_ERRORS:
                line = _decode_carefully(raw, shape)
            if isinstance(line, envelope.Messages):
                incoming.messages(line.messages, size)
            elif isinstance(line, envelope.Message):
                credit.take_bytes(size)
                incoming.message(line.message, size)
            elif isinstance(line, envelope.Run):
                incoming.run(line, offset + start, size)
            elif isinstance(line, envelope.DescriptorCount):
                incoming.descriptor_count(line.count, offset + start)
            elif isinstance(line, envelope.Handle):
                incoming.handle(line, size)
            elif isinstance(line, envelope.Again):
                incoming.again(line)
            elif envelope.is_command(line):
                self._command(line, offset + start, size)
            else:
                raise MalformedEnvelope("the peer sent an object that is no command")
            start = end

    def _node_line(self, value: Any, at: int, size: int) -> None:
        first, self.was_opened = not self.was_opened, True
        if envelope.is_command(value):
            self._command(value, at, size, first)
        else:
            self._incoming.message(value, size)
        if first and not self.has_switched:
            # The peer speaks node, and will not learn another language later.
            self._outgoing.hold_native_only = False

    def _command(self, value: dict[str, Any], at: int, size: int, first: bool = False) -> None:
        command = value["cmd"]
        if command == envelope.COMMAND_NATIVE:
            self._control_line(envelope.decode_control(value), first)
        elif command == envelope.COMMAND_HANDLE:
            if self._incoming.native:
                raise RemoteProtocolError("the peer sent a NODE_HANDLE after its switch to native")
            self._node_handle(value, at, size)
        else:
            self._node_reply(acked=command == envelope.COMMAND_ACK)

    def _node_handle(self, value: dict[str, Any], at: int, size: int) -> None:
        # Node wraps an envelope once more when it sends a handle again (node-wire.md 3.6): the
        # inner one is meant, and one reply is due for both.
        inner = value.get("msg")
        if envelope.is_command(inner) and inner["cmd"] == envelope.COMMAND_HANDLE:  # type: ignore[index]
            value = inner  # type: ignore[assignment]
        tag = value.get("type")
        name = tag if isinstance(tag, str) else quoted(tag)
        options = {k: v for k, v in value.items() if k not in ("cmd", "type", "msg")}
        self._incoming.node_handle(name, value.get("msg"), options or None, at, size)

    def _node_reply(self, *, acked: bool) -> None:
        if self._outgoing.node_reply(acked=acked):
            return
        reply = "ACK" if acked else "NACK"
        if self.has_switched:
            raise RemoteProtocolError(f"the peer sent an {reply} that nothing waited for")
        # Node asserts here and dies (node-wire.md fact 1); nothing of ours depends on it.
        self._warnings.append(f"ignored a stray {reply} of the peer")

    def _control_line(self, control: envelope.Control, first: bool) -> None:
        outgoing = self._outgoing
        if control.native:
            self._switch(control.native, first)
        elif not (self.has_switched or outgoing.native):
            raise RemoteProtocolError("the peer sent a control line, and nobody switched to native")
        for sequence, count, code in control.refuse:
            outgoing.refused(sequence, count, code)
        if control.ack is not None:
            outgoing.acknowledge(control.ack)
            outgoing.window.grant(control.descriptors, control.bytes)
        if control.again is not None:
            outgoing.window.ask_again(*control.again)

    def _switch(self, version: int, first: bool) -> None:
        if version != VERSION:
            raise RemoteProtocolError(
                f"the peer switched to version {version} of the native dialect, and {VERSION} was"
                " offered"
            )
        # Right as the first line of an end we invited, or as the answer to our own switch.
        invited = first and self._inviting
        if self.has_switched or not (invited or self._outgoing.native):
            raise RemoteProtocolError("the peer switched to the native dialect out of place")
        self.has_switched = self._incoming.native = self.may_switch = True
        self._incoming.news.is_owed = True
