"""JSON as JavaScript means it: values to one line of bytes and back.

Two fast libraries do the common work, orjson writes and msgspec reads; the standard library takes
over for what they refuse and Node does not: lone surrogates and huge integers. Knows nothing of
envelopes, except which values would read as one.
"""

from __future__ import annotations

import gc
import itertools
import json
import marshal
import math
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeVar

import msgspec
import orjson

from handleipc.exceptions import MalformedEnvelope, MessageNotSerializable
from handleipc.limits import Shape
from handleipc.texts import quoted, readable
from handleipc.wire.framing import TOO_DEEP, TOO_MANY, shape_of

__all__ = [
    "DECODE_ERRORS",
    "check_shape",
    "decode_short",
    "decode_slowly",
    "encode",
    "read",
    "spell",
    "undisturbed",
]

T = TypeVar("T")

# Dates and dataclasses are not JSON values: orjson would turn them into strings and objects, and
# the peer would never know. Its option for subclasses stays off: a StrEnum or an OrderedDict is
# the string or object it derives from.
_OPTIONS = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME
_dumps: Callable[..., bytes] = orjson.dumps
_walk: Callable[..., bytes] = marshal.dumps
decode_short: Callable[[bytes | memoryview], Any] = msgspec.json.Decoder().decode
"""As ``read``, or it raises one of ``DECODE_ERRORS``: ``read`` then says what is wrong with the
line, or reads what msgspec refuses and Node does not."""
DECODE_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class _Command(msgspec.Struct):
    """What can be a command in an object; the rest is skipped."""

    cmd: Any = None


_peek = msgspec.json.Decoder(_Command).decode
_skip = msgspec.json.Decoder(msgspec.Raw).decode
_SCALARS = frozenset({str, int, float, bool, type(None)})
LARGE = 64 * 1024
# Python reads 4,300 digits, if nobody has told it otherwise (sys.set_int_max_str_digits).
MOST_BITS = 14_280

# Commands of the protocol. A message that reads as one could forge an acknowledgement when an
# application relays JSON of its users (contract of send; both dialects).
_FORBIDDEN = ("NODE_HANDLE", "NODE_SOCKET_")


def encode(message: object, shape: Shape) -> bytes:
    """Return ``message`` as JSON without a newline.

    NaN and the infinities become null, as in JavaScript; tuples are arrays; keys that are numbers,
    booleans or None become strings, as in ``json``; subclasses are the value they derive from, so
    that a member of a ``StrEnum`` or an ``IntEnum`` is sent as its value.

    Args:
        message: a JSON value.
        shape: the bounds of a message.

    Raises:
        MessageNotSerializable: it holds anything else at any depth (``bytes``, sets, dates, UUIDs,
            members of other enums, ...), refers to itself, is beyond the bounds, or reads as a
            command of the protocol.
    """
    try:
        line = _dumps(message, None, _OPTIONS)
    except TypeError:
        return _encode_slowly(message, shape)
    kind = type(message)
    if kind is dict:
        for value in message.values():  # type: ignore[attr-defined]
            if type(value) not in _SCALARS:
                if _is_json(message):
                    break
                return _encode_slowly(message, shape)
        # orjson takes no key but plain strings, so the dict itself knows.
        if "cmd" in message:  # type: ignore[operator]
            _refuse_command(_peek(line).cmd)
        if len(line) <= shape.short:  # most are too short to be beyond the bounds
            return b"%b" % line  # as _fitted, without the call
    elif kind in _SCALARS:
        return _fitted(line)
    elif not _is_json(message):
        return _encode_slowly(message, shape)
    elif line.startswith(b"{"):
        _refuse_command(_peek(line).cmd)
    if len(line) > shape.short:
        _check_shape(line, shape)
    return _fitted(line)


def _is_json(message: object) -> bool:
    """Say whether a message that orjson took is a JSON value, subclasses included.

    Not so are members of an ``enum`` that are not numbers or strings themselves, UUIDs, and
    fragments: orjson writes them, and has no option against it.
    """
    try:
        # The cheapest walk there is: it takes the very types of JSON, and besides them bytes and
        # others that orjson has refused, but no subclass. What it writes is of no interest.
        _walk(message, 4)
    except ValueError:
        return _is_json_of_subclasses(message)
    return True


def _is_json_of_subclasses(message: object) -> bool:
    containers: list[Iterable[Any]] = [(message,)]
    for container in containers:  # grows on the way
        for item in container:
            if isinstance(item, dict):
                containers.append(dict.values(item))
            elif isinstance(item, list):
                containers.append(list.__iter__(item))
            elif type(item) is tuple:
                containers.append(item)
            elif not isinstance(item, str | int | float | None):
                return False
    return True


def _check_shape(line: bytes, shape: Shape) -> None:
    found = shape_of(line, shape.depth, shape.values)
    if found == TOO_DEEP:
        raise MessageNotSerializable(f"the message is nested deeper than {shape.depth} levels")
    if found == TOO_MANY:
        raise MessageNotSerializable(
            f"the message holds more values than the {shape.values} that a peer will take"
            " (Limits.values): send it in parts"
        )


def _refuse_command(command: object) -> None:
    if isinstance(command, str) and command.startswith(_FORBIDDEN):
        raise MessageNotSerializable(
            f"a message whose 'cmd' is {quoted(command)} would be taken for a command of the"
            " protocol: rename the field"
        )


def _fitted(line: bytes) -> bytes:
    """Return a copy of the right size, unless it is large.

    What orjson returns keeps the kilobytes it was built in, and a hundred thousand may be queued.
    """
    return line if len(line) >= LARGE else b"%b" % line


def spell(value: object) -> bytes:
    """Return a value of the protocol's own as JSON: no checks, since no user made it."""
    try:
        return _dumps(value)
    except TypeError:
        return json.dumps(value, separators=(",", ":")).encode()


def undisturbed(decode: Callable[[bytes | memoryview], T], line: bytes | memoryview) -> T:
    """Decode a line; a large one without the garbage collector in between.

    What it makes has no cycles, and looking for some again and again was a third of the time of
    reading 95,000 small objects.
    """
    if len(line) < LARGE or not gc.isenabled():
        return decode(line)
    gc.disable()
    try:
        return decode(line)
    finally:
        gc.enable()


def check_shape(line: bytes | memoryview, depth: int, values: int) -> int:
    """Return how deep a line of the peer is nested, before anybody builds what is in it.

    Raises:
        MalformedEnvelope: deeper than ``depth``, or of more than ``values`` values.
    """
    deepest = shape_of(line, depth, values)
    if deepest == TOO_DEEP:
        raise MalformedEnvelope("the peer sent a line that is nested too deep (Limits.depth)")
    if deepest == TOO_MANY:
        raise MalformedEnvelope(
            f"the peer sent a line of {len(line)} bytes that holds too many values (Limits.values)"
        )
    return deepest


def read(line: bytes | memoryview, longest: int) -> Any:
    """Return the JSON value of one line, whose shape has been checked if it is not short.

    Integers keep their value, up to the digits that ``sys.set_int_max_str_digits`` allows; lone
    surrogates stay what they are.

    Raises:
        MalformedEnvelope: not JSON, not UTF-8, or only for the slow reader and above ``longest``
            (``Limits.slow_line``).
    """
    try:
        return decode_short(line) if len(line) < LARGE else undisturbed(decode_short, line)
    except DECODE_ERRORS as error:
        return decode_slowly(line, longest, error)


def decode_slowly(line: bytes | memoryview, longest: int, error: Exception) -> Any:
    """Read what the fast reader has refused with ``error``, or say what is wrong with it.

    Raises:
        MalformedEnvelope: not JSON, not UTF-8, or too long for the slow reader.
    """
    if isinstance(error, UnicodeDecodeError):
        raise MalformedEnvelope(f"the peer sent a line that is not UTF-8: {error}") from None
    if isinstance(error, RecursionError):
        raise MalformedEnvelope("the peer sent a line that is nested too deep") from None
    if _is_too_slow(line, longest):
        raise MalformedEnvelope(
            f"the peer sent a line of {len(line)} bytes that only a slow reader might read, which"
            f" is too much for it (Limits.slow_line): {readable(str(error))}"
        ) from None
    try:
        return _loads(bytes(line))
    except RecursionError:
        raise MalformedEnvelope("the peer sent a line that is nested too deep") from None
    except ValueError as why:
        raise MalformedEnvelope(
            f"the peer sent a line that is not JSON: {quoted(line)} ({readable(str(why))})"
        ) from None


def _is_too_slow(line: bytes | memoryview, longest: int) -> bool:
    # What the standard library takes for a value is what it takes for 64 bytes of text, or less.
    left = longest - len(line)
    return left < 0 or (
        len(line) > left // 64 and shape_of(line, len(line), left // 64) == TOO_MANY
    )


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _loads(line: bytes) -> Any:
    return json.loads(line.decode(), parse_constant=_refuse_constant)


def _encode_slowly(message: object, shape: Shape) -> bytes:
    """Encode what orjson refused, or say what is wrong with it and where."""
    try:
        plain = _plain(message, shape.depth, set())
        # Escaped, so that a lone surrogate survives and the line stays ASCII.
        line = json.dumps(plain, separators=(",", ":"), allow_nan=False).encode()
    except _NotJSONError as error:
        path = "message" + "".join(f"[{quoted(key, 40)}]" for key in reversed(error.path))
        raise MessageNotSerializable(f"{path} {error}") from None
    except RecursionError:
        raise MessageNotSerializable("the message is nested too deep") from None
    except ValueError as error:  # an integer of more digits than sys.get_int_max_str_digits()
        raise MessageNotSerializable(f"the message cannot be spelled: {error}") from None
    _check_shape(line, shape)
    if isinstance(plain, dict):
        _refuse_command(plain.get("cmd"))
    try:
        _skip(line)
    except msgspec.DecodeError:
        if _is_too_slow(line, shape.slow_line):
            raise MessageNotSerializable(
                f"the message holds half a surrogate pair, which only a slow reader reads, and its"
                f" {len(line)} bytes are too much for that (Limits.slow_line)"
            ) from None
    return line


BESIDE = "; a handle travels beside the message, as send(message, handle)"


class _NotJSONError(Exception):
    """What is wrong with a value; ``path`` are the keys that lead to it, the last one first."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.path: list[object] = []


def _plain(value: object, depth: int, around: set[int]) -> Any:
    """Return ``value`` built of plain JSON types; ``around`` holds the ids of its ancestors."""
    # A subclass may have its own idea of str(): the value underneath is what is meant.
    if isinstance(value, str):
        return str.__str__(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        if int.bit_length(value) > MOST_BITS:
            raise _NotJSONError("is an integer of more digits than a reader will take")
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value) if math.isfinite(value) else None
    if not isinstance(value, dict | list | tuple):
        raise _NotJSONError(
            f"is {readable(type(value).__name__)}, which is not a JSON value: convert it first"
            f"{BESIDE if hasattr(value, 'fileno') else ''}"
        )
    if id(value) in around:
        raise _NotJSONError("refers to an object around it")
    if len(around) >= depth:
        raise MessageNotSerializable(f"the message is nested deeper than {depth} levels")
    around.add(id(value))
    # What the value holds, and not what its methods say: the fast writer asks no method either.
    keys: Iterable[Any] = itertools.count()
    items: Iterable[Any]
    if isinstance(value, dict):
        keys, items = [_key(key) for key in dict.keys(value)], dict.values(value)
    elif isinstance(value, list):
        items = list.__iter__(value)
    else:
        items = tuple.__iter__(value)
    plain: list[Any] = []
    for key, item in zip(keys, items, strict=False):
        try:
            plain.append(_plain(item, depth, around))
        except _NotJSONError as error:
            error.path.append(key)
            raise
    around.discard(id(value))
    return dict(zip(keys, plain, strict=True)) if isinstance(value, dict) else plain


def _key(key: object) -> str:
    if isinstance(key, str):
        return str.__str__(key)
    if key is None or isinstance(key, bool):
        return {None: "null", True: "true", False: "false"}[key]
    if isinstance(key, int):
        return int.__repr__(key)
    if isinstance(key, float) and math.isfinite(key):
        return float.__repr__(key)
    raise _NotJSONError(
        f"has the key {readable(repr(key))}: keys are strings, or numbers that become strings"
    )
