"""JSON as JavaScript means it, compared with Python's own and with Node's."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import gc
import json
import math
import pathlib
import random
import subprocess
import uuid
from typing import Any, NamedTuple

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from handleipc.exceptions import MalformedEnvelope, MessageNotSerializable
from handleipc.limits import Limits, Shape
from handleipc.wire import codec
from handleipc.wire.framing import TOO_DEEP, TOO_MANY, shape_of

SHAPE = Limits().shape
HUGE = 2**70  # orjson refuses it, so that a message with it takes the slow path

# Strings of anything, lone surrogates and what JSON must escape among it.
STRINGS = st.text(st.characters(exclude_categories=())) | st.text('[]{}"\\/ ,:\n\0é\ud800\udc00')
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | STRINGS
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(STRINGS, inner), max_leaves=20
)


def limited(**limits: int) -> Shape:
    """Return the usual bounds but for these."""
    return Limits(**limits).shape


def decode(line: bytes | memoryview, shape: Shape) -> Any:
    """Read a line as the dialects do."""
    if len(line) > shape.short:
        codec.check_shape(line, shape.depth, shape.values)
    return codec.read(line, shape.slow_line)


def nest(depth: int, leaf: object = 1, *, kind: str = "list") -> Any:
    """Return a value nested this deep."""
    value: Any = leaf
    for _ in range(depth):
        value = {"list": [value], "dict": {"k": value}, "tuple": (value,)}[kind]
    return value


def as_javascript(value: Any) -> Any:
    """Return the value with each pair of surrogates joined, as every JavaScript string has it."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    if isinstance(value, dict):
        return {as_javascript(key): as_javascript(item) for key, item in value.items()}
    return [as_javascript(item) for item in value] if isinstance(value, list) else value


def depth_of(value: object) -> int:
    """Count levels the obvious way."""
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0


# -- encode: what is sent ------------------------------------------------------------------------


@given(VALUES)
def test_round_trip(value: Any) -> None:
    """Every JSON value comes back as it was, in one line."""
    line = codec.encode(value, SHAPE)
    assert b"\n" not in line
    assert decode(line, SHAPE) == as_javascript(value)


@given(VALUES)
def test_round_trip_by_the_slow_path(value: Any) -> None:
    """What the fast library refuses takes the other path to the same value."""
    line = codec.encode([value, HUGE], SHAPE)
    assert b"\n" not in line
    assert decode(line, SHAPE) == [as_javascript(value), HUGE]


@pytest.mark.parametrize("around", [[], [HUGE]])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_encode_of_numbers_that_are_not_finite(number: float, around: list[int]) -> None:
    """NaN and the infinities become null, as in JavaScript, on both paths."""
    assert json.loads(codec.encode([number, {"k": number}, *around], SHAPE))[:2] == [
        None,
        {"k": None},
    ]


@pytest.mark.parametrize("number", [2**53, 2**63, 2**64 - 1, 2**64, -(2**63) - 1, 10**400])
def test_encode_of_large_integer(number: int) -> None:
    """Integers are spelled in full, whatever their size."""
    assert codec.encode({"n": number}, SHAPE) == b'{"n":%d}' % number
    assert decode(b'{"n":%d}' % number, SHAPE) == {"n": number}


def test_encode_of_integer_that_python_does_not_spell() -> None:
    """An integer beyond Python's limit of digits is refused like any other value, with a reason."""
    for message in (10**5000, {10**5000: 1}, [{"k": -(10**5000)}]):
        with pytest.raises(MessageNotSerializable):
            codec.encode(message, SHAPE)


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\udc00\ud800"])
def test_encode_of_lone_surrogate(text: str) -> None:
    """A lone surrogate leaves escaped, as from JSON.stringify, and comes back."""
    line = codec.encode({text: [text]}, SHAPE)
    assert line.isascii()
    assert decode(line, SHAPE) == {text: [text]}


def test_encode_of_keys_that_are_not_strings() -> None:
    """Numbers, booleans and None become strings as keys, as in json."""
    message = {1: 0, 2.5: 0, "t": 0, None: 0, -0.0: 0, HUGE: 0}
    assert codec.encode(message, SHAPE) == json.dumps(message, separators=(",", ":")).encode()
    assert codec.encode({True: 1}, SHAPE) == b'{"true":1}'


class Color(enum.Enum):
    """An enum of plain values."""

    RED = "red"
    BOTH = ("red", 1)


class Bit(enum.Flag):
    """Flags, which are no integers."""

    A = 1
    B = 2


class Number(enum.IntEnum):
    """An enum of integers."""

    SEVEN = 7


class Word(enum.StrEnum):
    """An enum of strings."""

    HELLO = "hello"


class Point(NamedTuple):
    """A tuple with names."""

    x: int
    y: int


class OddText(str):
    """A string that says something else about itself."""

    __slots__ = ()

    def __str__(self) -> str:
        return "something else"


class OddInt(int):
    """An integer that says something else about itself."""

    def __int__(self) -> int:
        return 99

    __index__ = __int__

    def __repr__(self) -> str:
        return "odd"

    __str__ = __repr__


class OddFloat(float):
    """A float that says something else about itself."""

    def __float__(self) -> float:
        return 99.0

    def __repr__(self) -> str:
        return "odd"

    __str__ = __repr__


class SilentText(str):
    """A string that hides what it begins with."""

    __slots__ = ()

    def startswith(self, *_: object) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return False

    def __hash__(self) -> int:
        return 1

    def __str__(self) -> str:
        return "innocent"


class SilentDict(dict):  # type: ignore[type-arg]
    """A dict that hides what it holds."""

    def get(self, *_: object) -> None:
        return None

    def __getitem__(self, key: object) -> object:
        return "innocent"

    def __contains__(self, key: object) -> bool:
        return False


class OddDict(dict):  # type: ignore[type-arg]
    """A dict that says something else about itself."""

    def items(self) -> Any:
        return [("forged", 1)]

    def values(self) -> Any:
        return [b"odd"]

    def keys(self) -> Any:
        return ["forged"]


class OddList(list):  # type: ignore[type-arg]
    """A list that says something else about itself."""

    def __iter__(self) -> Any:
        return iter([b"odd"])


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        (Number.SEVEN, 7),
        (Word.HELLO, "hello"),
        (Point(1, 2), [1, 2]),
        ((1, (2,)), [1, [2]]),
        (SilentDict(a=1), {"a": 1}),
        (OddDict(a=1), {"a": 1}),
        (OddList([1]), [1]),
        (collections.OrderedDict(a=1), {"a": 1}),
        (collections.defaultdict(int, a=1), {"a": 1}),
        (collections.Counter("aa"), {"a": 2}),
        (OddText("text"), "text"),
        ({OddText("key"): 1}, {"key": 1}),
        (OddInt(7), 7),
        (OddFloat(1.5), 1.5),
        (True, True),
    ],
)
def test_encode_of_subclasses_and_enums(value: object, meant: object) -> None:
    """Subclasses are the JSON value they derive from, whatever they say, on both paths alike."""
    assert json.loads(codec.encode([value], SHAPE)) == [meant]
    assert json.loads(codec.encode([value, HUGE], SHAPE)) == [meant, HUGE]


@pytest.mark.parametrize("key", [OddInt(7), OddFloat(7.5)])
def test_encode_of_keys_that_are_odd_numbers(key: float) -> None:
    """The value underneath is what a key is, too."""
    assert codec.encode({key: 1}, SHAPE) in (b'{"7":1}', b'{"7.5":1}')


def test_encode_of_value_that_occurs_twice() -> None:
    """The same object in two places is no circle."""
    shared = [1]
    assert codec.encode([shared, {"k": shared}, HUGE], SHAPE) == b'[[1],{"k":[1]},%d]' % HUGE


# -- encode: what is refused ---------------------------------------------------------------------


@dataclasses.dataclass
class Record:
    """A dataclass, which is no JSON value."""

    x: int = 1


NOT_JSON = [
    b"bytes",
    bytearray(b"x"),
    memoryview(b"x"),
    {1},
    frozenset({1}),
    datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC),
    datetime.date(2024, 1, 1),
    datetime.time(1),
    datetime.timedelta(1),
    decimal.Decimal("1.5"),
    1j,
    object(),
    int,
    Record(),
    range(3),
    (x for x in ()),
    pathlib.PurePath("x"),
    collections.deque([1]),
    collections.UserDict(),
    NotImplemented,
    ...,
    uuid.UUID(int=1),
    Color.RED,
    Color.BOTH,
    Bit.A,
    Bit.A | Bit.B,
    orjson.Fragment(b"1"),
    orjson.Fragment(b'1\n{"cmd":"NODE_HANDLE_ACK"}'),
]


@pytest.mark.parametrize("value", NOT_JSON, ids=lambda value: type(value).__name__)
def test_encode_of_what_is_not_json(value: object) -> None:
    """Anything else is refused at any depth, by a message that names the place and the type."""
    for message, path in (
        (value, "message"),
        ([0, value], "message[1]"),
        ({"a": [{"b": (value,)}]}, "message['a'][0]['b'][0]"),
        ([HUGE, {"a": value}], "message[1]['a']"),
        (collections.OrderedDict(a=OddDict(b=value)), "message['a']['b']"),
        (OddList([[], {}, (), value]), "message[3]"),
    ):
        with pytest.raises(MessageNotSerializable) as caught:
            codec.encode(message, SHAPE)
        assert str(caught.value).startswith(f"{path} is {type(value).__name__},")


@pytest.mark.parametrize("key", [b"k", (1,), frozenset(), math.nan, math.inf, Color.RED])
def test_encode_of_keys_that_are_not_json(key: object) -> None:
    """Other keys are refused by a message that names the place and the key."""
    with pytest.raises(MessageNotSerializable) as caught:
        codec.encode({"a": {key: 1}}, SHAPE)
    assert str(caught.value).startswith(f"message['a'] has the key {key!r}")


def test_encode_of_circles() -> None:
    """A value that contains itself is refused, by name."""
    lists: list[Any] = [0]
    lists.append(lists)
    dicts: dict[str, Any] = {"k": {}}
    dicts["k"]["up"] = dicts
    for message, path in ((lists, "message[1]"), (dicts, "message['k']['up']")):
        with pytest.raises(MessageNotSerializable, match="refers to an object around it") as caught:
            codec.encode(message, SHAPE)
        assert str(caught.value).startswith(path)


@pytest.mark.parametrize("leaf", [1, HUGE, []])
@pytest.mark.parametrize("kind", ["list", "dict", "tuple"])
@pytest.mark.parametrize("limit", [0, 1, 2, SHAPE.depth])
def test_encode_at_the_limit_of_depth(limit: int, kind: str, leaf: object) -> None:
    """A message may be as deep as the limit and no deeper, on both paths."""
    levels = limit - (leaf == [])
    if levels >= 0:
        codec.encode(nest(levels, leaf, kind=kind), limited(depth=limit))
    with pytest.raises(MessageNotSerializable, match=f"deeper than {limit} levels"):
        codec.encode(nest(levels + 1, leaf, kind=kind), limited(depth=limit))


def test_encode_beyond_the_depth_of_the_libraries() -> None:
    """Deeper than the fast library goes, the other one does, up to the limit."""
    assert codec.encode(nest(300), limited(depth=300)) == b"[" * 300 + b"1" + b"]" * 300
    with pytest.raises(MessageNotSerializable):
        codec.encode(nest(300), limited(depth=299))


def test_encode_beyond_the_depth_of_the_interpreter() -> None:
    """With a limit that Python cannot follow, the message is refused, not the interpreter."""
    with pytest.raises(MessageNotSerializable):
        codec.encode(nest(5000), limited(depth=100_000))


# -- encode: commands of the protocol ------------------------------------------------------------

COMMANDS = [
    "NODE_HANDLE",
    "NODE_HANDLE_ACK",
    "NODE_HANDLE_NACK",
    "NODE_HANDLEIPC",
    "NODE_HANDLE_OF_LATER",
    "NODE_SOCKET_NOTIFY_CLOSE",
    "NODE_SOCKET_ALL_CLOSED",
    "NODE_SOCKET_GET_COUNT",
    "NODE_SOCKET_COUNT",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_encode_of_command(command: str) -> None:
    """A message that reads as a command of the protocol is refused, whatever it is made of."""
    key = SilentText("cmd")
    for message in (
        {"cmd": command},
        {"a": HUGE, "cmd": command},
        {"cmd": SilentText(command)},
        {key: command},
        {"cmd": "innocent", key: command},
        SilentDict(cmd=command),
        collections.OrderedDict(cmd=command),
        {"cmd": enum.StrEnum("E", {"X": command}).X},
        {"cmd": enum.StrEnum("E", {"X": command}).X, "a": HUGE},
    ):
        with pytest.raises(MessageNotSerializable, match="command of the protocol"):
            codec.encode(message, SHAPE)


@pytest.mark.parametrize(
    "message",
    [
        {"cmd": "NODE_"},
        {"cmd": "NODE_MINE"},
        {"cmd": " NODE_HANDLE"},
        {"cmd": "node_handle"},
        {"cmd": ["NODE_HANDLE"]},
        {"CMD": "NODE_HANDLE"},
        {"command": "NODE_HANDLE"},
        {"msg": {"cmd": "NODE_HANDLE"}},
        [{"cmd": "NODE_HANDLE"}],
        ["cmd", "NODE_HANDLE"],
        "NODE_HANDLE",
        {"cmd": "innocent", "a": "NODE_HANDLE"},
        {"NODE_HANDLE": "cmd"},
    ],
)
def test_encode_of_what_only_resembles_a_command(message: object) -> None:
    """A message is refused for what a peer would take it for, not for a word in it."""
    assert json.loads(codec.encode(message, SHAPE)) == message


@given(st.dictionaries(st.sampled_from(["cmd", "a"]), st.sampled_from(COMMANDS) | VALUES))
@example({"cmd": "NODE_HANDLE", "a": "\ud800"})
def test_encode_never_lets_a_command_through(message: dict[str, Any]) -> None:
    """What leaves is no command, as the peer will read it."""
    try:
        line = codec.encode(message, SHAPE)
    except MessageNotSerializable:
        return
    command = json.loads(line).get("cmd")
    assert not (isinstance(command, str) and command.startswith(("NODE_HANDLE", "NODE_SOCKET_")))


# -- spell ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [{"a": [1, None]}, "\ud800", HUGE, {"k": "\ud800"}])
def test_spell(value: object) -> None:
    """Values of the protocol's own are spelled without a check, and compactly."""
    line = codec.spell(value)
    assert b" " not in line
    assert json.loads(line) == value


# -- decode --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "value"),
    [
        (b"null", None),
        (b" [1, 2.5]\r", [1, 2.5]),
        (b'{"a":1,"a":2}', {"a": 2}),
        (b'{"a":1,"a":2,"b":"\\ud800"}', {"a": 2, "b": "\ud800"}),
        (b'"\\ud83d\\ude00"', "\U0001f600"),
        (b'"\\ud800"', "\ud800"),
        (b'"\\u0000\\/"', "\0/"),
        ('"é"'.encode(), "é"),
        (b"1e400", math.inf),
        (b"-0", 0),
        (b"123456789012345678901234567890", 123456789012345678901234567890),
    ],
)
def test_decode(line: bytes, value: object) -> None:
    """JSON is read as JavaScript reads it, but for integers, which keep their value."""
    assert decode(line, SHAPE) == value
    assert decode(memoryview(line), SHAPE) == value


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b" ",
        b"{",
        b"[1,]",
        b"[1 2]",
        b"{'a':1}",
        b"{1:2}",
        b'"a',
        b'"\t"',
        b'"\\x41"',
        b"01",
        b"+1",
        b".5",
        b"0x10",
        b"1_000",
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b'["\\ud800",NaN]',
        b"True",
        b"undefined",
        b"1 2",
        b"//",
        b"\xef\xbb\xbf1",
        b'{"a":1}}',
    ],
)
def test_decode_of_what_is_not_json(line: bytes) -> None:
    """Anything else is the peer's fault, and the beginning of the line is shown."""
    with pytest.raises(MalformedEnvelope, match="not JSON") as caught:
        decode(line, SHAPE)
    assert repr(line) in str(caught.value)


def test_decode_of_long_line_that_is_not_json() -> None:
    """Of a long line only the beginning is shown."""
    with pytest.raises(MalformedEnvelope) as caught:
        decode(b"x" * 10_000, SHAPE)
    assert len(str(caught.value)) < 400
    assert "..." in str(caught.value)


@pytest.mark.parametrize(
    "line", [b'"\xff"', b"\x80", b'"\xed\xa0\x80"', b'"\xc0\xaf"', b'{"\xe9":1}']
)
def test_decode_of_what_is_not_utf8(line: bytes) -> None:
    """A line is UTF-8, without surrogates and overlong forms."""
    with pytest.raises(MalformedEnvelope):
        decode(line, SHAPE)


@given(st.binary(max_size=60) | st.text('[]{}",:\\ud80019.eE+-ntrfalsu ').map(str.encode))
@example(b"[" * 50 + b'"')
@example(b"1" * 5000)
def test_decode_of_anything(line: bytes) -> None:
    """Whatever the bytes are, there is a value or a MalformedEnvelope."""
    try:
        value = decode(line, SHAPE)
    except MalformedEnvelope:
        return
    assert depth_of(value) <= SHAPE.depth


@pytest.mark.parametrize("kind", ["list", "dict"])
@pytest.mark.parametrize("limit", [0, 1, SHAPE.depth])
def test_decode_at_the_limit_of_depth(limit: int, kind: str) -> None:
    """A line may be as deep as the limit and no deeper."""
    line = json.dumps(nest(limit, kind=kind)).encode()
    assert decode(line, limited(depth=limit)) == nest(limit, kind=kind)
    with pytest.raises(MalformedEnvelope, match="nested too deep"):
        decode(json.dumps(nest(limit + 1, kind=kind)).encode(), limited(depth=limit))


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 1_000_000,
        b'{"a":' * 200_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'["\\ud800",' * 100_000 + b"1" + b"]" * 100_000,
        b"[" * 100_000 + b'"' + b"]" * 100_000,
        b'"\\"' + b"[" * 100_000,
        b'[""' + b",[" * 100_000,
    ],
)
def test_decode_of_very_deep_line(line: bytes) -> None:
    """No depth makes the interpreter overflow, complete or not."""
    with pytest.raises(MalformedEnvelope):
        decode(line, SHAPE)


@pytest.mark.parametrize("first", [b"", b'"\\ud800",'])
def test_decode_beyond_the_depth_of_the_interpreter(first: bytes) -> None:
    """With a limit that Python cannot follow, the line is refused, not the interpreter."""
    line = b"[" + first + b"[" * 100_000 + b"]" * 100_000 + b"]"
    with pytest.raises(MalformedEnvelope, match="nested too deep"):
        decode(line, limited(depth=1_000_000))


# -- the bounds: values ---------------------------------------------------------------------------

TRICKY = st.text('[]{}"\\ ,:a\ud800')
TRICKY_VALUES = st.recursive(
    TRICKY | st.integers(),
    lambda inner: st.lists(inner) | st.dictionaries(TRICKY, inner),
    max_leaves=15,
)


def values_of(value: object) -> int:
    """Count commas and opening brackets the obvious way."""
    if not isinstance(value, dict | list):
        return 0
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max(0, len(value) - 1) + sum(map(values_of, inner))


@given(TRICKY_VALUES, st.integers(0, 8), st.integers(0, 8), st.sampled_from([None, 1]))
@example(["", "[", "", "]", ""], 1, 9, None)
@example({'"': '\\"[', "\\": ["\\\\"]}, 2, 9, None)
def test_shape_of_any_value(value: object, depth: int, values: int, indent: int | None) -> None:
    """The answer is that of counting, whatever brackets, commas and quotes the strings hold."""
    line = json.dumps(value, indent=indent).encode()
    found = shape_of(line, depth, values)
    assert shape_of(memoryview(line), depth, values) == found
    too_deep, too_many = depth_of(value) > depth, values_of(value) > values
    if found == TOO_DEEP:
        assert too_deep
    elif found == TOO_MANY:
        assert too_many
    else:
        assert (found, too_deep, too_many) == (depth_of(value), False, False)


def test_shape_of_brackets_side_by_side() -> None:
    """Many arrays beside each other are not deep."""
    line = json.dumps([[[]] * 1000]).encode()
    assert shape_of(line, 2, 10_000) == TOO_DEEP
    assert shape_of(line, 3, 10_000) == 3


MANY = [[0] * 1000, [[]] * 500, [{}] * 500, {f"k{i}": i for i in range(1000)}, [1e300] * 15]


@pytest.mark.parametrize("first", ["", "\ud800"])
@pytest.mark.parametrize("value", MANY, ids=lambda value: json.dumps(value)[:12])
def test_the_bound_of_values_is_the_same_at_both_ends(value: Any, first: str) -> None:
    """What one end may send the other one takes, and one value more neither; both name the bound."""
    message = [first, value]
    line = json.dumps(message).encode()
    bound = next(n for n in range(2000) if shape_of(line, 128, n) != TOO_MANY)
    at, below = limited(values=bound), limited(values=bound - 1)
    assert decode(codec.encode(message, at), at) == message
    with pytest.raises(MessageNotSerializable, match=r"Limits\.values"):
        codec.encode(message, below)
    with pytest.raises(MalformedEnvelope, match=r"Limits\.values"):
        decode(line, below)


@pytest.mark.parametrize(
    "piece", [b"[],", b"{},", b"1,", b'"a",', b"1e300,", b"9" * 4000 + b",", b'{"k":1},']
)
def test_decode_of_many_values(piece: bytes) -> None:
    """A line of few bytes that would take gigabytes, or minutes, is refused before it is read."""
    line = b"[" + piece * (17_000_000 // len(piece)) + b"1]"
    with pytest.raises(MalformedEnvelope, match="too many values"):
        decode(line, limited(values=2_000_000))


def test_long_text_and_many_numbers_pass() -> None:
    """Bytes are not values: a string of 64 MiB passes, and so do 6.2 million numbers."""
    text = "x" * (64 << 20)
    assert decode(codec.encode([text], SHAPE), SHAPE) == [text]
    assert decode(codec.encode(text, SHAPE), SHAPE) == text
    numbers = [7] * 6_200_000
    assert decode(codec.encode(numbers, SHAPE), SHAPE) == numbers


# -- the bounds: what only the slow reader reads ---------------------------------------------------


@pytest.mark.parametrize(
    "message",
    ["x" * 3000 + "\ud800", ["\ud800", *[0] * 40], {"\ud800": [[]] * 20}],
    ids=["text", "numbers", "arrays"],
)
def test_the_bound_of_slow_lines_is_the_same_at_both_ends(message: object) -> None:
    """Text and values count; what one end may send the other takes, and one byte more neither."""
    line = codec.encode(message, SHAPE)
    values = next(n for n in range(100) if shape_of(line, 128, n) != TOO_MANY)
    bound = len(line) + 64 * values
    at, below = limited(slow_line=bound), limited(slow_line=bound - 1)
    assert decode(codec.encode(message, at), at) == message
    with pytest.raises(MessageNotSerializable, match=r"half a surrogate .* \(Limits\.slow_line\)"):
        codec.encode(message, below)
    with pytest.raises(MalformedEnvelope, match=r"Limits\.slow_line"):
        decode(line, below)


def test_long_text_with_half_a_pair_passes() -> None:
    """JavaScript cuts long texts where it likes, and the parts arrive."""
    text = "x" * (8 << 20) + "\ud83d"
    assert decode(codec.encode([text], SHAPE), SHAPE) == [text]


def test_other_slow_messages_have_no_such_bound() -> None:
    """Numbers as keys only take the slow writer: any peer reads them fast."""
    message = {i: 2**70 for i in range(1000)}
    shape = limited(slow_line=10)
    assert len(decode(codec.encode(message, shape), shape)) == 1000


@pytest.mark.parametrize("line", [b'["\\ud800"]', b"[1e400]", b"[1,]", b"x"])
def test_what_the_fast_reader_refuses_is_read_once_more(
    line: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One fast parse and one slow one at most, whatever the line holds."""
    fast, slow = [], []
    read_fast, read_slow = codec.decode_short, codec._loads
    monkeypatch.setattr(codec, "decode_short", lambda text: fast.append(1) or read_fast(text))
    monkeypatch.setattr(codec, "_loads", lambda text: slow.append(1) or read_slow(text))
    try:
        decode(line, SHAPE)
    except MalformedEnvelope:
        pass
    assert (len(fast), len(slow)) == (1, 1)


# -- what Node makes of it -----------------------------------------------------------------------

ECHO = """
    let text = "";
    process.stdin.setEncoding("utf8");
    process.stdin.on("data", (part) => { text += part; });
    process.stdin.on("end", () => {
        for (const line of text.split("\\n").slice(0, -1))
            process.stdout.write(JSON.stringify(JSON.parse(line)) + "\\n");
    });
"""


def echoed_by_node(node: str, lines: list[bytes]) -> list[bytes]:
    """Return each line as Node reads and writes it."""
    done = subprocess.run(
        [node, "-e", ECHO],
        input=b"".join(line + b"\n" for line in lines),
        capture_output=True,
        timeout=60,
        check=True,
    )
    return done.stdout.split(b"\n")[:-1]


def some_value(source: random.Random, depth: int = 0) -> Any:
    """Return a value that JavaScript can hold exactly."""
    kind = source.randrange(8 if depth < 4 else 6)
    if kind < 3:
        return source.choice([None, True, False, 0, -1, 2**53 - 1, 0.1, 1e21, 5e-324, -1.5e300])
    if kind < 6:
        return "".join(source.choices('aé\U0001f600\ud800\udfff"\\/\n\x00\u2028[]{}', k=kind))
    items = [some_value(source, depth + 1) for _ in range(source.randrange(4))]
    return items if kind == 6 else {f"k{i}\ud800"[: 2 + i % 2]: v for i, v in enumerate(items)}


def test_node_reads_and_writes_the_same_values(node: str) -> None:
    """Values that go through Node come back equal."""
    source = random.Random(1)
    values = [some_value(source) for _ in range(2000)]
    lines = [codec.encode(value, SHAPE) for value in values]
    back = [decode(line, SHAPE) for line in echoed_by_node(node, lines)]
    assert back == [as_javascript(value) for value in values]


def test_node_agrees_on_corner_cases(node: str) -> None:
    """What JavaScript makes of NaN, numbers as keys, duplicates and huge integers is ours too."""
    lines = [
        codec.encode([math.nan, math.inf, -math.inf], SHAPE),
        codec.encode({2: "a", 2.5: "b", None: "c", True: "d"}, SHAPE),
        codec.encode(["\ud800", "\udc00\ud800"], SHAPE),
        codec.encode((Point(1, 2), Word.HELLO, Number.SEVEN), SHAPE),
        b'{"cmd":"a","cmd":"b"}',
        codec.encode(2**70, SHAPE),
        b"1e400",
    ]
    assert echoed_by_node(node, lines) == [
        b"[null,null,null]",
        b'{"2":"a","2.5":"b","null":"c","true":"d"}',
        b'["\\ud800","\\udc00\\ud800"]',
        b'[[1,2],"hello",7]',
        b'{"cmd":"b"}',
        b"1.1805916207174113e+21",
        b"null",
    ]
    assert decode(lines[4], SHAPE) == {"cmd": "b"}


@pytest.mark.parametrize("line", [b"[1]", b"[" + b"1," * codec.LARGE + b"1]", b"[" * codec.LARGE])
@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_as_it_was(line: bytes, enabled: bool) -> None:
    """A large line is read without it; whoever has switched it off finds it off, error or not."""
    seen = []

    def decode_and_look(line: bytes | memoryview) -> Any:
        seen.append(gc.isenabled())
        return codec.decode_short(line)

    was = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        try:
            codec.undisturbed(decode_and_look, line)
        except codec.DECODE_ERRORS:
            assert line.endswith(b"[")
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was else gc.disable)()
    assert seen == [enabled and len(line) < codec.LARGE]
