"""JSON as JavaScript means it: values to one line of bytes and back.

Two fast libraries do the common work, orjson writes and msgspec reads; the standard library takes
over for what they refuse and Node does not: lone surrogates and huge integers. Knows nothing of
envelopes, except which values would read as one.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import msgspec
import orjson

from handleipc.exceptions import MalformedEnvelope, MessageNotSerializable
from handleipc.framing import nests_deeper

__all__ = ["DECODE_ERRORS", "decode", "decode_short", "encode", "spell", "undisturbed"]

T = TypeVar("T")

# Dates and dataclasses are not JSON values: orjson would turn them into strings and objects, and
# the peer would never know. Its option for subclasses stays off: a StrEnum or an OrderedDict is
# the string or object it derives from.
_OPTIONS = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME
_dumps: Callable[..., bytes] = orjson.dumps
decode_short: Callable[[bytes | memoryview], Any] = msgspec.json.Decoder().decode
"""As ``decode``, of a line shorter than the depth allowed. Or it raises one of ``DECODE_ERRORS``:
``decode`` then says what is wrong with it, or reads what msgspec refuses and Node does not."""
DECODE_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class _Command(msgspec.Struct):
    """What can be a command in an object; the rest is skipped."""

    cmd: Any = None


_peek = msgspec.json.Decoder(_Command).decode
_skip = msgspec.json.Decoder(msgspec.Raw)
_SCALARS = frozenset({str, int, float, bool, type(None)})
LARGE = 64 * 1024
NEWLINE = 0x0A
SPACE = 0x20

# Commands of the protocol. A message that reads as one could forge an acknowledgement when an
# application relays JSON of its users (contract of send; both dialects).
_FORBIDDEN = ("NODE_HANDLE", "NODE_SOCKET_")


def encode(message: object, depth: int) -> bytes:
    """Return ``message`` as JSON without a newline.

    NaN and the infinities become null, as in JavaScript; tuples are arrays; keys that are numbers,
    booleans or None become strings, as in ``json``; members of an ``enum`` are sent as their value
    and UUIDs as strings.

    Args:
        message: a JSON value.
        depth: deepest nesting allowed.

    Raises:
        MessageNotSerializable: it holds anything else (``bytes``, sets, dates, ... at any depth),
            refers to itself, is nested too deep, or reads as a command of the protocol.
    """
    try:
        line = _dumps(message, None, _OPTIONS)
    except TypeError:
        line = _encode_slowly(message, depth)
    # Too short to be nested too deep: most messages are. In one go this is half the cost of asking
    # step by step below, which has the last word on what looks wrong here.
    if type(message) is dict:
        if len(line) <= depth and NEWLINE not in line and line.isascii():
            try:
                if type(_peek(line).cmd) is not str:
                    return b"%b" % line  # as _fitted, without the call
            except msgspec.DecodeError:
                pass
    elif type(message) in _SCALARS:
        return _fitted(line)
    if nests_deeper(line, depth):
        raise MessageNotSerializable(f"the message is nested deeper than {depth} levels")
    command = _check(line)
    if isinstance(command, str) and command.startswith(_FORBIDDEN):
        raise MessageNotSerializable(
            f"a message whose 'cmd' is {command!r} would be taken for a command of the protocol:"
            " rename the field"
        )
    return _fitted(line)


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


def decode(line: bytes | memoryview, depth: int) -> Any:
    """Return the JSON value of one line.

    Integers keep their value, up to the digits that ``sys.set_int_max_str_digits`` allows; lone
    surrogates stay what they are.

    Raises:
        MalformedEnvelope: not JSON, not UTF-8, or nested deeper than ``depth``.
    """
    if len(line) > depth and nests_deeper(line, depth):
        raise MalformedEnvelope("the peer sent a line that is nested too deep (Limits.depth)")
    try:
        return decode_short(line) if len(line) < LARGE else undisturbed(decode_short, line)
    except UnicodeDecodeError as error:
        raise MalformedEnvelope(f"the peer sent a line that is not UTF-8: {error}") from None
    except RecursionError:
        raise MalformedEnvelope("the peer sent a line that is nested too deep") from None
    except msgspec.DecodeError:
        return _decode_slowly(bytes(line))


def _check(line: bytes) -> object:
    """Make sure that this is one JSON value on one line, and return its ``cmd`` if it has one.

    Judged on the bytes that would leave, as the peer will read them: no subclass with a method of
    its own, no key given twice and no orjson.Fragment, which is written as it stands, can hide a
    command or forge a line. Costs as much as the encoding, and less than looking for substrings.
    """
    try:
        if NEWLINE in line or not line:
            raise MessageNotSerializable(
                "the message holds a fragment that is not one line of JSON"
            )
        if not line.isascii():
            line.decode()
        if line[0] <= SPACE:
            line = line.lstrip(b" \t\r\n")
        if line[:1] == b"{":
            return _peek(line).cmd
        _skip.decode(line)
        return None
    except UnicodeDecodeError:
        pass
    except (msgspec.DecodeError, RecursionError):
        # Not what msgspec calls JSON: a lone surrogate, or an endless integer in a `cmd`.
        try:
            value = _loads(line)
        except (ValueError, RecursionError):
            pass
        else:
            return value.get("cmd") if isinstance(value, dict) else None
    raise MessageNotSerializable("the message holds a fragment that is not JSON")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _loads(line: bytes) -> Any:
    return json.loads(line.decode(), parse_constant=_refuse_constant)


def _decode_slowly(line: bytes) -> Any:
    try:
        return _loads(line)
    except RecursionError:
        raise MalformedEnvelope("the peer sent a line that is nested too deep") from None
    except ValueError as error:
        shown = line[:40] + (b"..." if len(line) > 40 else b"")
        why = f"the peer sent a line that is not JSON: {shown!r} ({error})"
        raise MalformedEnvelope(why) from None


def _encode_slowly(message: object, depth: int) -> bytes:
    """Encode what orjson refused, or say what is wrong with it and where."""
    try:
        plain = _plain(message, depth, "message", set())
        # Escaped, so that a lone surrogate survives and the line stays ASCII.
        return json.dumps(plain, separators=(",", ":"), allow_nan=False).encode()
    except RecursionError:
        raise MessageNotSerializable("the message is nested too deep") from None
    except ValueError as error:  # an integer of more digits than sys.get_int_max_str_digits()
        raise MessageNotSerializable(f"the message cannot be spelled: {error}") from None


def _plain(value: object, depth: int, path: str, around: set[int]) -> Any:
    """Return ``value`` built of plain JSON types; ``around`` holds the ids of its ancestors."""
    if value is None or isinstance(value, bool | str | int):
        # A subclass may have its own idea of str(): the value underneath is what is meant.
        if isinstance(value, str):
            return str.__str__(value)
        return value if value is None or isinstance(value, bool) else int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value) if math.isfinite(value) else None
    if not isinstance(value, dict | list | tuple):
        return _scalar_of_orjson(value, path)
    if id(value) in around:
        raise MessageNotSerializable(f"{path} refers to an object around it")
    if len(around) >= depth:
        raise MessageNotSerializable(f"the message is nested deeper than {depth} levels")
    around.add(id(value))
    plain: Any
    if isinstance(value, dict):
        plain = {
            _key(key, path): _plain(item, depth, f"{path}[{key!r}]", around)
            for key, item in value.items()
        }
    else:
        plain = [_plain(item, depth, f"{path}[{i}]", around) for i, item in enumerate(value)]
    around.discard(id(value))
    return plain


def _scalar_of_orjson(value: object, path: str) -> Any:
    # What orjson takes on the fast path must not be refused here, or {"a": E.x} would be sent and
    # {"a": E.x, "b": 2**70} refused.
    try:
        return json.loads(_dumps(value, option=_OPTIONS))  # an enum member, a UUID
    except TypeError:
        raise MessageNotSerializable(
            f"{path} is {type(value).__name__}, which is not a JSON value: convert it first"
        ) from None


def _key(key: object, path: str) -> str:
    if isinstance(key, str):
        return str.__str__(key)
    if key is None or isinstance(key, bool):
        return {None: "null", True: "true", False: "false"}[key]
    if isinstance(key, int):
        return int.__repr__(key)
    if isinstance(key, float) and math.isfinite(key):
        return float.__repr__(key)
    raise MessageNotSerializable(
        f"{path} has the key {key!r}: keys are strings, or numbers that become strings"
    )
