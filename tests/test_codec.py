"""JSON as JavaScript means it, compared with Python's own and with Node's."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
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

from handleipc import codec
from handleipc.framing import nests_deeper
from handleipc.exceptions import MalformedEnvelope, MessageNotSerializable

DEPTH = 128
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
    line = codec.encode(value, DEPTH)
    assert b"\n" not in line
    assert codec.decode(line, DEPTH) == as_javascript(value)


@given(VALUES)
def test_round_trip_by_the_slow_path(value: Any) -> None:
    """What the fast library refuses takes the other path to the same value."""
    line = codec.encode([value, HUGE], DEPTH)
    assert b"\n" not in line
    assert codec.decode(line, DEPTH) == [as_javascript(value), HUGE]


@pytest.mark.parametrize("around", [[], [HUGE]])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_encode_of_numbers_that_are_not_finite(number: float, around: list[int]) -> None:
    """NaN and the infinities become null, as in JavaScript, on both paths."""
    assert json.loads(codec.encode([number, {"k": number}, *around], DEPTH))[:2] == [
        None,
        {"k": None},
    ]


@pytest.mark.parametrize("number", [2**53, 2**63, 2**64 - 1, 2**64, -(2**63) - 1, 10**400])
def test_encode_of_large_integer(number: int) -> None:
    """Integers are spelled in full, whatever their size."""
    assert codec.encode({"n": number}, DEPTH) == b'{"n":%d}' % number
    assert codec.decode(b'{"n":%d}' % number, DEPTH) == {"n": number}


def test_encode_of_integer_that_python_does_not_spell() -> None:
    """An integer beyond Python's limit of digits is refused like any other value, with a reason."""
    for message in (10**5000, {10**5000: 1}, [{"k": -(10**5000)}]):
        with pytest.raises(MessageNotSerializable):
            codec.encode(message, DEPTH)


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\udc00\ud800"])
def test_encode_of_lone_surrogate(text: str) -> None:
    """A lone surrogate leaves escaped, as from JSON.stringify, and comes back."""
    line = codec.encode({text: [text]}, DEPTH)
    assert line.isascii()
    assert codec.decode(line, DEPTH) == {text: [text]}


def test_encode_of_keys_that_are_not_strings() -> None:
    """Numbers, booleans and None become strings as keys, as in json."""
    message = {1: 0, 2.5: 0, "t": 0, None: 0, -0.0: 0, HUGE: 0}
    assert codec.encode(message, DEPTH) == json.dumps(message, separators=(",", ":")).encode()
    assert codec.encode({True: 1}, DEPTH) == b'{"true":1}'


class Color(enum.Enum):
    """An enum of plain values."""

    RED = "red"
    BOTH = ("red", 1)


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


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        (Color.RED, "red"),
        (Color.BOTH, ["red", 1]),
        (Number.SEVEN, 7),
        (Word.HELLO, "hello"),
        (Point(1, 2), [1, 2]),
        ((1, (2,)), [1, [2]]),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
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
    """Subclasses are the JSON value they derive from, enums their value, on both paths alike."""
    assert json.loads(codec.encode([value], DEPTH)) == [meant]
    assert json.loads(codec.encode([value, HUGE], DEPTH)) == [meant, HUGE]


@pytest.mark.parametrize("key", [OddInt(7), OddFloat(7.5)])
def test_encode_of_keys_that_are_odd_numbers(key: float) -> None:
    """The value underneath is what a key is, too."""
    assert codec.encode({key: 1}, DEPTH) in (b'{"7":1}', b'{"7.5":1}')


def test_encode_of_value_that_occurs_twice() -> None:
    """The same object in two places is no circle."""
    shared = [1]
    assert codec.encode([shared, {"k": shared}, HUGE], DEPTH) == b'[[1],{"k":[1]},%d]' % HUGE


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
]


@pytest.mark.parametrize("value", NOT_JSON, ids=lambda value: type(value).__name__)
def test_encode_of_what_is_not_json(value: object) -> None:
    """Anything else is refused at any depth, by a message that names the place and the type."""
    for message, path in (
        (value, "message"),
        ([0, value], "message[1]"),
        ({"a": [{"b": (value,)}]}, "message['a'][0]['b'][0]"),
    ):
        with pytest.raises(MessageNotSerializable) as caught:
            codec.encode(message, DEPTH)
        assert str(caught.value).startswith(f"{path} is {type(value).__name__},")


class Dated(enum.Enum):
    """An enum whose value is no JSON value."""

    DAY = datetime.date(2024, 1, 1)


def test_encode_of_enum_of_what_is_not_json() -> None:
    """An enum is refused if its value would be."""
    with pytest.raises(MessageNotSerializable, match="message is Dated"):
        codec.encode(Dated.DAY, DEPTH)


@pytest.mark.parametrize("raw", [b'1\n{"cmd":"NODE_HANDLE_ACK"}', b"[\n1\n]", b"\n"])
def test_encode_of_spelled_fragments(raw: bytes) -> None:
    """What is spelled already stands as it is, but not with a newline: that would forge a line."""
    assert codec.encode(orjson.Fragment(b"[1]"), DEPTH) == b"[1]"
    with pytest.raises(MessageNotSerializable):
        codec.encode(orjson.Fragment(b' {"cmd":"NODE_HANDLE_ACK"}'), DEPTH)
    for message in (orjson.Fragment(raw), {"a": [orjson.Fragment(raw)]}):
        with pytest.raises(MessageNotSerializable):
            codec.encode(message, DEPTH)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"cmd":"\\u004eODE_HANDLE_ACK"}',
        b'{"cmd":"NODE\\u005fHANDLE_ACK"}',
        b'{"c\\u006dd":"NODE_HANDLE_ACK"}',
        b'\t{"cmd":"x","cmd":"NODE_HANDLE_ACK"}',
    ],
)
def test_encode_of_command_hidden_in_a_fragment(raw: bytes) -> None:
    """A command is refused however its letters are spelled: the peer reads them, escaped or not."""
    with pytest.raises(MessageNotSerializable):
        codec.encode(orjson.Fragment(raw), DEPTH)


@pytest.mark.parametrize(
    "raw", [b"", b"1,2", b"1]", b"NaN", b"\xff", b'{"cmd":"NODE_', b'{"cmd":"NODE_X",}']
)
def test_encode_of_fragment_that_is_not_json(raw: bytes) -> None:
    """A fragment that is not JSON is refused here: the peer would end the channel, or misread it."""
    with pytest.raises(MessageNotSerializable):
        codec.encode(orjson.Fragment(raw), DEPTH)


@pytest.mark.parametrize("key", [b"k", (1,), frozenset(), math.nan, math.inf, Color.RED])
def test_encode_of_keys_that_are_not_json(key: object) -> None:
    """Other keys are refused by a message that names the place and the key."""
    with pytest.raises(MessageNotSerializable) as caught:
        codec.encode({"a": {key: 1}}, DEPTH)
    assert str(caught.value).startswith(f"message['a'] has the key {key!r}")


def test_encode_of_circles() -> None:
    """A value that contains itself is refused, by name."""
    lists: list[Any] = [0]
    lists.append(lists)
    dicts: dict[str, Any] = {"k": {}}
    dicts["k"]["up"] = dicts
    for message, path in ((lists, "message[1]"), (dicts, "message['k']['up']")):
        with pytest.raises(MessageNotSerializable, match="refers to an object around it") as caught:
            codec.encode(message, DEPTH)
        assert str(caught.value).startswith(path)


@pytest.mark.parametrize("leaf", [1, HUGE, []])
@pytest.mark.parametrize("kind", ["list", "dict", "tuple"])
@pytest.mark.parametrize("limit", [0, 1, 2, DEPTH])
def test_encode_at_the_limit_of_depth(limit: int, kind: str, leaf: object) -> None:
    """A message may be as deep as the limit and no deeper, on both paths."""
    levels = limit - (leaf == [])
    if levels >= 0:
        codec.encode(nest(levels, leaf, kind=kind), limit)
    with pytest.raises(MessageNotSerializable, match=f"deeper than {limit} levels"):
        codec.encode(nest(levels + 1, leaf, kind=kind), limit)


def test_encode_beyond_the_depth_of_the_libraries() -> None:
    """Deeper than the fast library goes, the other one does, up to the limit."""
    assert codec.encode(nest(300), 300) == b"[" * 300 + b"1" + b"]" * 300
    with pytest.raises(MessageNotSerializable):
        codec.encode(nest(300), 299)


def test_encode_beyond_the_depth_of_the_interpreter() -> None:
    """With a limit that Python cannot follow, the message is refused, not the interpreter."""
    with pytest.raises(MessageNotSerializable):
        codec.encode(nest(5000), 100_000)


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
        {"cmd": enum.Enum("E", {"X": command}).X},
        {"cmd": enum.Enum("E", {"X": command}).X, "a": HUGE},
    ):
        with pytest.raises(MessageNotSerializable, match="command of the protocol"):
            codec.encode(message, DEPTH)


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
    assert json.loads(codec.encode(message, DEPTH)) == message


@given(st.dictionaries(st.sampled_from(["cmd", "a"]), st.sampled_from(COMMANDS) | VALUES))
@example({"cmd": "NODE_HANDLE", "a": "\ud800"})
def test_encode_never_lets_a_command_through(message: dict[str, Any]) -> None:
    """What leaves is no command, as the peer will read it."""
    try:
        line = codec.encode(message, DEPTH)
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
    assert codec.decode(line, DEPTH) == value
    assert codec.decode(memoryview(line), DEPTH) == value


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
        codec.decode(line, DEPTH)
    assert repr(line) in str(caught.value)


def test_decode_of_long_line_that_is_not_json() -> None:
    """Of a long line only the beginning is shown."""
    with pytest.raises(MalformedEnvelope) as caught:
        codec.decode(b"x" * 10_000, DEPTH)
    assert len(str(caught.value)) < 200
    assert "..." in str(caught.value)


@pytest.mark.parametrize(
    "line", [b'"\xff"', b"\x80", b'"\xed\xa0\x80"', b'"\xc0\xaf"', b'{"\xe9":1}']
)
def test_decode_of_what_is_not_utf8(line: bytes) -> None:
    """A line is UTF-8, without surrogates and overlong forms."""
    with pytest.raises(MalformedEnvelope):
        codec.decode(line, DEPTH)


@given(st.binary(max_size=60) | st.text('[]{}",:\\ud80019.eE+-ntrfalsu ').map(str.encode))
@example(b"[" * 50 + b'"')
@example(b"1" * 5000)
def test_decode_of_anything(line: bytes) -> None:
    """Whatever the bytes are, there is a value or a MalformedEnvelope."""
    try:
        value = codec.decode(line, DEPTH)
    except MalformedEnvelope:
        return
    assert depth_of(value) <= DEPTH


@pytest.mark.parametrize("kind", ["list", "dict"])
@pytest.mark.parametrize("limit", [0, 1, DEPTH])
def test_decode_at_the_limit_of_depth(limit: int, kind: str) -> None:
    """A line may be as deep as the limit and no deeper."""
    line = json.dumps(nest(limit, kind=kind)).encode()
    assert codec.decode(line, limit) == nest(limit, kind=kind)
    with pytest.raises(MalformedEnvelope, match="nested too deep"):
        codec.decode(json.dumps(nest(limit + 1, kind=kind)).encode(), limit)


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
        codec.decode(line, DEPTH)


@pytest.mark.parametrize("first", [b"", b'"\\ud800",'])
def test_decode_beyond_the_depth_of_the_interpreter(first: bytes) -> None:
    """With a limit that Python cannot follow, the line is refused, not the interpreter."""
    line = b"[" + first + b"[" * 100_000 + b"]" * 100_000 + b"]"
    with pytest.raises(MalformedEnvelope, match="nested too deep"):
        codec.decode(line, 1_000_000)


# -- nests_deeper --------------------------------------------------------------------------------

TRICKY = st.text('[]{}"\\ ,:a\ud800')
TRICKY_VALUES = st.recursive(
    TRICKY | st.integers(),
    lambda inner: st.lists(inner) | st.dictionaries(TRICKY, inner),
    max_leaves=15,
)


@given(TRICKY_VALUES, st.integers(0, 8), st.sampled_from([None, 1]))
@example(["", "[", "", "]", ""], 1, None)
@example({'"': '\\"[', "\\": ["\\\\"]}, 2, None)
def test_nests_deeper_than_any_limit(value: object, limit: int, indent: int | None) -> None:
    """The answer is that of counting levels, whatever brackets, quotes and backslashes hold."""
    line = json.dumps(value, indent=indent).encode()
    assert nests_deeper(line, limit) == (depth_of(value) > limit)
    assert nests_deeper(memoryview(line), limit) == (depth_of(value) > limit)


def test_nests_deeper_with_brackets_side_by_side() -> None:
    """Many arrays beside each other are not deep."""
    line = json.dumps([[[]] * 1000]).encode()
    assert nests_deeper(line, 2)
    assert not nests_deeper(line, 3)


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
    lines = [codec.encode(value, DEPTH) for value in values]
    back = [codec.decode(line, DEPTH) for line in echoed_by_node(node, lines)]
    assert back == [as_javascript(value) for value in values]


def test_node_agrees_on_corner_cases(node: str) -> None:
    """What JavaScript makes of NaN, numbers as keys, duplicates and huge integers is ours too."""
    lines = [
        codec.encode([math.nan, math.inf, -math.inf], DEPTH),
        codec.encode({2: "a", 2.5: "b", None: "c", True: "d"}, DEPTH),
        codec.encode(["\ud800", "\udc00\ud800"], DEPTH),
        codec.encode((Point(1, 2), Word.HELLO, Number.SEVEN), DEPTH),
        b'{"cmd":"a","cmd":"b"}',
        codec.encode(2**70, DEPTH),
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
    assert codec.decode(lines[4], DEPTH) == {"cmd": "b"}


@pytest.mark.parametrize("space", [b"\x0b", b"\x0c", b"\xc2\xa0"])
def test_a_fragment_behind_what_json_does_not_call_space(space: bytes) -> None:
    """Our own reader would refuse it: it does not leave."""
    with pytest.raises(MessageNotSerializable):
        codec.encode(orjson.Fragment(space + b"1"), 10)
    assert codec.encode(orjson.Fragment(b" \t\r1"), 10) == b" \t\r1"
