"""The lines themselves: how a message, a handle and each command are spelled, and read back.

Pure text. Which line may come when is the protocol's business (``incoming``, ``outgoing``).

The node dialect is what Node.js writes (lib/internal/child_process.js, node-wire.md 3.1); the
native dialect is described in docs/wire.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import msgspec

from handleipc.exceptions import LineTooLong, MalformedEnvelope
from handleipc.limits import Shape
from handleipc.texts import readable
from handleipc.typing import Options
from handleipc.wire import codec

__all__ = [
    "ACK",
    "COMMAND_ACK",
    "COMMAND_HANDLE",
    "COMMAND_NACK",
    "COMMAND_NATIVE",
    "NACK",
    "RUN_BYTES",
    "RUN_MESSAGES",
    "RUN_MESSAGE_COST",
    "Again",
    "Control",
    "DescriptorCount",
    "Grant",
    "Handle",
    "Message",
    "Messages",
    "NativeLine",
    "Run",
    "decode_control",
    "decode_line",
    "decode_native",
    "decode_node",
    "is_command",
    "is_internal",
    "spell_again",
    "spell_control",
    "spell_count",
    "spell_handle",
    "spell_long",
    "spell_message",
    "spell_messages",
    "spell_node_handle",
    "spell_run",
]

COMMAND_HANDLE = "NODE_HANDLE"
COMMAND_ACK = "NODE_HANDLE_ACK"
COMMAND_NACK = "NODE_HANDLE_NACK"
COMMAND_NATIVE = "NODE_HANDLEIPC"

ACK = b'{"cmd":"NODE_HANDLE_ACK"}\n'
NACK = b'{"cmd":"NODE_HANDLE_NACK"}\n'

# Levels that an envelope of either dialect adds around a message.
ENVELOPE_DEPTH = 2
# A handle of Node that is sent again has one more envelope around it than usual.
NODE_ENVELOPE_DEPTH = 4
# A run of messages takes a line of this many bytes at most, whatever the limits of either end say:
# those are of one message, and a run this short can cost no more than the next two lines allow.
# Nearly all of the gain is there: reading 64 messages in one costs what reading 640 does.
RUN_BYTES = 8 * 1024
RUN_MESSAGES = 64
# What a message in a run counts for beside its bytes: with a line of its own it has as many more. A
# grant of bytes bounds what its messages become in memory, and small ones become many times that.
RUN_MESSAGE_COST = 5
# What describes a handle adds to the values of a message (registry.DETAILS), and to the bytes of
# one that only the slow reader reads: as much again as a message may have, and the envelope, or a
# run. A value counts as 64 bytes there.
ENVELOPE_VALUES = 128 * 1024
ENVELOPE_BYTES = 65 * RUN_BYTES

_RUNS = (b"[4,", b"[5,")
_TOO_DEEP = "the peer sent a message that is nested too deep (Limits.depth)"

MOST = 1 << 53
_Count = Annotated[int, msgspec.Meta(ge=0, lt=MOST)]
_Sequence = Annotated[int, msgspec.Meta(ge=1, lt=MOST)]
_Descriptors = Annotated[int, msgspec.Meta(ge=1, le=253)]


class Message(msgspec.Struct, array_like=True, tag=0, gc=False):
    """``[0,message]``: a message without a handle."""

    message: Any


class DescriptorCount(msgspec.Struct, array_like=True, tag=1, gc=False):
    """``[1,n]``: n descriptors came with the first byte of this line."""

    count: _Descriptors


class Handle(msgspec.Struct, array_like=True, tag=2, gc=False):
    """``[2,s,f,type,message]``, with options behind it where there are any."""

    sequence: _Sequence
    fds: _Descriptors
    tag: str
    message: Any
    options: Options | None = None


class Run(msgspec.Struct, array_like=True, tag=4, gc=False):
    """``[4,s,type,[message,...]]``: handles from number s on that have one descriptor each.

    They are the whole of a set. Options behind them are those of each.
    """

    sequence: _Sequence
    tag: str
    messages: Annotated[list[Any], msgspec.Meta(min_length=1, max_length=253)]
    options: Options | None = None


class Messages(msgspec.Struct, array_like=True, tag=5, gc=False):
    """``[5,[message,...]]``: messages without handles."""

    messages: Annotated[list[Any], msgspec.Meta(min_length=1, max_length=RUN_MESSAGES)]


class Again(msgspec.Struct, array_like=True, tag=3, gc=False):
    """``[3,s,f]``: the descriptors of handle s once more."""

    sequence: _Sequence
    fds: _Descriptors


class Control(msgspec.Struct):
    """``{"cmd":"NODE_HANDLEIPC",...}``: what an end tells the other about what it received."""

    native: _Count = 0
    ack: _Count | None = None
    descriptors: _Count = 0
    bytes: _Count = 0
    refuse: list[tuple[_Sequence, _Sequence, str]] = []
    again: tuple[_Sequence, _Sequence] | None = None


Grant = tuple[int, int, int]
"""The ``ack``, ``descriptors`` and ``bytes`` of a control line."""
NativeLine = Message | Messages | DescriptorCount | Handle | Run | Again | dict[str, Any]

decode_line: Callable[[bytes | memoryview], NativeLine] = msgspec.json.Decoder(NativeLine).decode
"""Reads one line of the native dialect, or raises one of ``codec.DECODE_ERRORS``: ``decode_native``
then says what is wrong with it, or reads what msgspec refuses and Node does not."""


def is_internal(message: object) -> bool:
    """Say whether a message goes to ``internal_message`` listeners.

    Node's rule: an object with a string ``cmd`` longer than ``NODE_`` that begins with it
    (node-wire.md 2.2).
    """
    if type(message) is not dict or "cmd" not in message:
        return False
    command = message["cmd"]
    return type(command) is str and len(command) > 5 and command.startswith("NODE_")


def is_command(value: object) -> bool:
    """Say whether a line is for the protocol itself, in both dialects."""
    return (
        type(value) is dict
        and type(command := value.get("cmd")) is str
        and command in (COMMAND_HANDLE, COMMAND_ACK, COMMAND_NACK, COMMAND_NATIVE)
    )


def decode_native(line: bytes | memoryview, shape: Shape) -> NativeLine:
    """Read one line of the native dialect, around a message of this shape at most.

    Raises:
        LineTooLong: it is, and no run.
        MalformedEnvelope: it is not JSON, beyond the bounds, or no line of this dialect.
    """
    deepest = 0
    if len(line) > shape.short:
        if len(line) > shape.line and not (len(line) < RUN_BYTES and line[:3] in _RUNS):
            raise LineTooLong(shape.line)
        deepest = codec.check_shape(
            line, shape.depth + ENVELOPE_DEPTH, shape.values + ENVELOPE_VALUES
        )
    found: NativeLine
    try:
        found = codec.undisturbed(decode_line, line)
    except codec.DECODE_ERRORS as error:
        value = codec.decode_slowly(line, 2 * shape.slow_line + ENVELOPE_BYTES, error)
        # JSON all the same, perhaps with what msgspec refuses in a message: judge the envelope.
        found = _convert(value, NativeLine, "no line of the native dialect")
    if deepest > shape.depth + 1 and type(found) is Message:
        raise MalformedEnvelope(_TOO_DEEP)
    return found


def decode_node(line: bytes | memoryview, shape: Shape) -> Any:
    """Read one line of the node dialect, around a message of this shape at most.

    Raises:
        LineTooLong: it is.
        MalformedEnvelope: it is not JSON, or beyond the bounds.
    """
    deepest = 0
    if len(line) > shape.short:
        if len(line) > shape.line:
            raise LineTooLong(shape.line)
        deepest = codec.check_shape(
            line, shape.depth + NODE_ENVELOPE_DEPTH, shape.values + ENVELOPE_VALUES
        )
    value = codec.read(line, 2 * shape.slow_line + ENVELOPE_BYTES)
    if deepest > shape.depth and not is_command(value):
        raise MalformedEnvelope(_TOO_DEEP)
    return value


def decode_control(value: dict[str, Any]) -> Control:
    """Read the fields of a control line. Unknown ones are ignored, for versions to come.

    Raises:
        MalformedEnvelope: a field has the wrong type.
    """
    if len(value) == 4:  # nearly all of them, without asking msgspec about each field
        ack, descriptors, size = value.get("ack"), value.get("descriptors"), value.get("bytes")
        if (
            type(ack) is type(descriptors) is type(size) is int
            and min(ack, descriptors, size) >= 0
            and max(ack, descriptors, size) < MOST
        ):
            return Control(0, ack, descriptors, size)
    known = {name: value[name] for name in Control.__struct_fields__ if name in value}
    control: Control = _convert(known, Control, "a malformed control line")
    return control


def _convert(value: object, kind: Any, what: str) -> Any:
    """Return a JSON value as an object of this kind, or say that the peer sent ``what``."""
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        # The second where half a surrogate pair stands for a name that msgspec compares as UTF-8.
        raise MalformedEnvelope(f"the peer sent {what}: {readable(str(error))}") from None


def spell_message(message: bytes, native: bool) -> bytes:
    """Spell a plain message; ``message`` is its JSON."""
    return b"[0,%b]\n" % message if native else message + b"\n"


def spell_long(message: bytes, native: bool) -> tuple[bytes, bytes, bytes]:
    """As ``spell_message``, in three parts, the second being the message itself."""
    return (b"[0,", message, b"]\n") if native else (b"", message, b"\n")


def spell_messages(messages: list[bytes], native: bool) -> bytes:
    """Spell plain messages, at least one; natively in ``MESSAGES_BYTES`` more than themselves."""
    if not native:
        return b"\n".join(messages) + b"\n"
    return b"[5,[%b]]\n" % b",".join(messages) if len(messages) > 1 else b"[0,%b]\n" % messages[0]


def spell_node_handle(tag: str, message: bytes, options: bytes) -> bytes:
    """Spell a NODE_HANDLE, its fields in Node's own order; ``options`` is an object, or empty."""
    # Of an object the first brace becomes a comma, and the last one ends ours.
    extra = b"," + options[1:] if options else b"}"
    return b'{"cmd":"NODE_HANDLE","type":%b,"msg":%b%b\n' % (codec.spell(tag), message, extra)


def spell_handle(sequence: int, fds: int, tag: str, message: bytes, options: bytes) -> bytes:
    """Spell handle number ``sequence`` of the native dialect."""
    if options:
        return b"[2,%d,%d,%b,%b,%b]\n" % (sequence, fds, codec.spell(tag), message, options)
    return b"[2,%d,%d,%b,%b]\n" % (sequence, fds, codec.spell(tag), message)


def spell_run(sequence: int, tag: str, messages: list[bytes], options: bytes) -> bytes:
    """Spell handles from number ``sequence`` on, with one descriptor each and these options."""
    tail = b",%b" % options if options else b""
    return b"[4,%d,%b,[%b]%b]\n" % (sequence, codec.spell(tag), b",".join(messages), tail)


def spell_count(count: int) -> bytes:
    """Spell the line that begins a set of ``count`` descriptors."""
    return b"[1,%d]\n" % count


def spell_again(sequence: int, fds: int) -> bytes:
    """Spell the line with which the descriptors of a handle come again."""
    return b"[3,%d,%d]\n" % (sequence, fds)


def spell_control(grant: Grant, more: dict[str, Any] | None = None) -> bytes:
    """Spell a control line: what is acknowledged and granted, and other fields."""
    first = b"%b," % codec.spell(more)[1:-1] if more else b""
    return b'{"cmd":"NODE_HANDLEIPC",%b"ack":%d,"descriptors":%d,"bytes":%d}\n' % (first, *grant)
