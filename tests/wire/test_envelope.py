"""The lines of both dialects, spelled and read back."""

from __future__ import annotations

import json
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from handleipc.exceptions import LineTooLong, MalformedEnvelope
from handleipc.limits import Limits, Shape
from handleipc.wire import codec, envelope
from handleipc.wire.envelope import Again, Control, DescriptorCount, Handle, Message

SHAPE = Limits().shape
SHALLOW = Limits(depth=10).shape

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
NUMBERS = st.integers(1, 2**53 - 1)
COUNTS = st.integers(1, 253)
OPTIONS = st.none() | st.dictionaries(st.text(min_size=1), VALUES, min_size=1)


def read(line: bytes) -> envelope.NativeLine:
    """Read a line as the framer gives it: without its newline."""
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    return envelope.decode_native(memoryview(line)[:-1], SHAPE)


# -- spelled and read back -----------------------------------------------------------------------


@given(VALUES)
def test_message_round_trip(value: object) -> None:
    """A plain message comes back as it was."""
    assert read(envelope.spell_message(codec.encode(value, SHAPE), True)) == Message(value)


@given(NUMBERS, COUNTS, st.text(), VALUES, OPTIONS)
def test_handle_round_trip(
    sequence: int, fds: int, tag: str, value: object, options: dict[str, object] | None
) -> None:
    """A handle comes back with its number, descriptors, tag, message and options."""
    spelled = codec.spell(options) if options is not None else b""
    line = envelope.spell_handle(sequence, fds, tag, codec.encode(value, SHAPE), spelled)
    assert read(line) == Handle(sequence, fds, tag, value, options)


@given(NUMBERS, COUNTS)
def test_count_and_again_round_trip(sequence: int, fds: int) -> None:
    """The lines that only bring descriptors come back as they were."""
    assert read(envelope.spell_count(fds)) == DescriptorCount(fds)
    assert read(envelope.spell_again(sequence, fds)) == Again(sequence, fds)


REFUSALS = st.lists(st.tuples(NUMBERS, NUMBERS, st.text()), max_size=3)


@given(
    st.tuples(NUMBERS, NUMBERS, NUMBERS),
    st.fixed_dictionaries(
        {}, optional={"native": NUMBERS, "refuse": REFUSALS, "again": st.tuples(NUMBERS, NUMBERS)}
    ),
)
def test_control_round_trip(grant: tuple[int, int, int], more: dict[str, object]) -> None:
    """A control line comes back as the object that it is in both dialects, short or not."""
    spelled = envelope.spell_control(grant, more)
    value = read(spelled)
    assert isinstance(value, dict)
    assert value["cmd"] == "NODE_HANDLEIPC"
    control = envelope.decode_control(value)
    assert (control.ack, control.descriptors, control.bytes) == grant
    assert {name: getattr(control, name) for name in more} == more
    assert envelope.spell_control(grant) == envelope.spell_control(grant, {})


def test_handle_without_options_is_shorter() -> None:
    """No options, no field for them."""
    assert envelope.spell_handle(7, 2, "fd", b"null", b"") == b'[2,7,2,"fd",null]\n'
    assert envelope.spell_handle(7, 2, "fd", b"1", b'{"k":1}') == b'[2,7,2,"fd",1,{"k":1}]\n'


@pytest.mark.parametrize("value", ["\ud800", 2**70, {"\ud800": [2**70]}])
def test_message_that_only_the_slow_path_reads(value: object) -> None:
    """Lone surrogates and huge integers pass through every kind of line."""
    message = codec.encode(value, SHAPE)
    assert read(envelope.spell_message(message, True)) == Message(value)
    line = envelope.spell_handle(1, 1, "\ud800", message, codec.spell({"details": value}))
    assert read(line) == Handle(1, 1, "\ud800", value, {"details": value})


# -- the node dialect ----------------------------------------------------------------------------


def test_spell_of_node_lines() -> None:
    """The node dialect is spelled as Node does it, byte for byte."""
    assert envelope.spell_message(b'{"a":1}', False) == b'{"a":1}\n'
    assert envelope.spell_node_handle("net.Socket", b'"hi"', b"") == (
        b'{"cmd":"NODE_HANDLE","type":"net.Socket","msg":"hi"}\n'
    )
    assert envelope.spell_node_handle("net.Socket", b"null", codec.spell({"key": '4:"::":80'})) == (
        b'{"cmd":"NODE_HANDLE","type":"net.Socket","msg":null,"key":"4:\\"::\\":80"}\n'
    )
    assert json.loads(envelope.ACK) == {"cmd": envelope.COMMAND_ACK}
    assert json.loads(envelope.NACK) == {"cmd": envelope.COMMAND_NACK}


@pytest.mark.parametrize(
    ("message", "internal"),
    [
        ({"cmd": "NODE_HANDLE"}, True),
        ({"cmd": "NODE_x"}, True),
        ({"cmd": "NODE_"}, False),
        ({"cmd": "NODE"}, False),
        ({"cmd": "xNODE_x"}, False),
        ({"cmd": 7}, False),
        ({"cmd": None}, False),
        ({}, False),
        (["cmd"], False),
        ("NODE_x", False),
        (None, False),
    ],
)
def test_is_internal(message: object, internal: bool) -> None:
    """Internal is an object whose cmd begins with NODE_ and goes on: Node's rule."""
    assert envelope.is_internal(message) is internal


@pytest.mark.parametrize(
    ("value", "command"),
    [
        ({"cmd": "NODE_HANDLE"}, True),
        ({"cmd": "NODE_HANDLE_ACK"}, True),
        ({"cmd": "NODE_HANDLE_NACK"}, True),
        ({"cmd": "NODE_HANDLEIPC", "ack": 1}, True),
        ({"cmd": "NODE_HANDLE_OTHER"}, False),
        ({"cmd": "NODE_SOCKET_COUNT"}, False),
        ({"cmd": ["NODE_HANDLE"]}, False),
        ({}, False),
        ([], False),
        (None, False),
    ],
)
def test_is_command(value: object, command: bool) -> None:
    """Commands are the four that the protocol itself acts upon."""
    assert envelope.is_command(value) is command


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"1",
        b"null",
        b'"text"',
        b"[]",
        b"[0]",
        b"[1]",
        b"[2]",
        b"[3,1]",
        b"[4,1]",
        b"[-1,1]",
        b'["0",1]',
        b"[0.0,1]",
        b"[true,1]",
        b"[null,1]",
        b"[[0],1]",
        b"[1,0]",
        b"[1,254]",
        b"[1,-1]",
        b"[1,1.0]",
        b"[1,1e0]",
        b"[1,true]",
        b'[1,"1"]',
        b"[1,null]",
        b"[1,1180591620717411303424]",
        b'[2,0,1,"t",0]',
        b'[2,-1,1,"t",0]',
        b'[2,9007199254740992,1,"t",0]',
        b'[2,1,0,"t",0]',
        b'[2,1,254,"t",0]',
        b"[2,1,1,7,0]",
        b"[2,1,1,null,0]",
        b'[2,1,1,"t"]',
        b'[2,1,1,"t",0,1]',
        b'[2,1,1,"t",0,[]]',
        b'[2,1,1,"\\ud800",0,7]',
        b"[3,0,1]",
        b"[3,1,0]",
        b"[3,1,254]",
        b'[0,"\xff"]',
        b"[0,NaN]",
        b"[0,1",
        b"[0,1]]",
    ],
)
def test_decode_of_no_line_of_the_dialect(line: bytes) -> None:
    """A line that is none of the five is the peer's fault."""
    with pytest.raises(MalformedEnvelope):
        envelope.decode_native(line, SHAPE)


@given(st.lists(st.integers(-1, 4) | VALUES, max_size=6) | VALUES)
def test_decode_of_any_json(value: object) -> None:
    """Any JSON is a line of the dialect with its fields in bounds, or refused."""
    try:
        line = envelope.decode_native(codec.encode(value, SHAPE), SHAPE)
    except (MalformedEnvelope, codec.MessageNotSerializable):
        return
    assert isinstance(line, Message | DescriptorCount | Handle | Again | dict)
    if isinstance(line, Handle | Again):
        assert 1 <= line.fds <= 253
        assert line.sequence >= 1


@given(st.binary(max_size=40))
def test_decode_of_any_bytes(line: bytes) -> None:
    """Bytes that are no line never raise anything else."""
    try:
        envelope.decode_native(line, SHAPE)
    except MalformedEnvelope:
        pass


def test_decode_of_control_with_half_a_pair_in_a_name() -> None:
    """A field of such a name is one we do not know, and passed over."""
    assert envelope.decode_control({"\ud800": 1, "ack": 7}) == Control(ack=7)


def test_decode_of_lines_of_a_later_version() -> None:
    """Fields behind the known ones are passed over."""
    assert envelope.decode_native(b"[0,1,2,3]", SHAPE) == Message(1)
    assert envelope.decode_control({"cmd": "NODE_HANDLEIPC", "later": [1]}) == Control()


def test_decode_of_deep_message() -> None:
    """A message at the limit passes inside each envelope; far deeper ones are refused."""
    deep = b"[" * 10 + b"]" * 10
    assert envelope.decode_native(b"[0," + deep + b"]", SHALLOW) == Message(json.loads(deep))
    line = envelope.spell_handle(1, 1, "t", b"null", codec.spell({"details": json.loads(deep)}))
    assert isinstance(envelope.decode_native(line[:-1], SHALLOW), Handle)
    with pytest.raises(MalformedEnvelope, match="nested too deep"):
        envelope.decode_native(b"[0,[[[" + deep + b"]]]]", SHALLOW)
    with pytest.raises(MalformedEnvelope, match="too deep"):
        envelope.decode_native(b"[" * 1_000_000, SHALLOW)


@pytest.mark.parametrize("native", [True, False])
def test_decode_of_message_at_the_limit_of_depth(native: bool) -> None:
    """As deep as may be sent, and not a level more: what arrives can be sent back."""
    decode = envelope.decode_native if native else envelope.decode_node
    for depth in (10, 11, 12):
        message = b"[" * depth + b'"long enough to be looked at"' + b"]" * depth
        line = envelope.spell_message(message, native)[:-1]
        if depth == 10:
            codec.encode(json.loads(message), SHALLOW)
            decode(line, SHALLOW)
        else:
            with pytest.raises(MalformedEnvelope, match="nested too deep"):
                decode(line, SHALLOW)
            with pytest.raises(codec.MessageNotSerializable):
                codec.encode(json.loads(message), SHALLOW)


def test_decode_of_a_handle_of_node_that_was_wrapped_twice() -> None:
    """Envelopes of Node around a message at the limit are not counted against it."""
    message = b"[" * 10 + b'"long enough to be looked at"' + b"]" * 10
    once = envelope.spell_node_handle("net.Socket", message, b"")[:-1]
    twice = envelope.spell_node_handle("net.Socket", once, b"")[:-1]
    assert envelope.decode_node(twice, SHALLOW)["msg"]["msg"] == json.loads(message)


@pytest.mark.parametrize("half", [b"", b'"\\ud800",'])
@pytest.mark.parametrize("native", [True, False])
def test_decode_of_the_most_that_may_be_sent(half: bytes, native: bool) -> None:
    """A message at its bounds, with a handle described by as much as may be, kills no peer."""
    shape = Limits(values=1000, slow_line=30_000).shape
    numbers = b"[%b" % half + b"0," * (400 - len(half)) + b"0]"
    message = codec.encode(json.loads(numbers), shape)
    details = codec.encode({"details": json.loads(numbers)}, shape)
    if native:
        line = envelope.spell_handle(1, 1, "net.Socket", message, details)[:-1]
        assert isinstance(envelope.decode_native(line, shape), Handle)
    else:
        line = envelope.spell_node_handle("net.Socket", message, details)[:-1]
        assert envelope.decode_node(line, shape)["msg"] == json.loads(numbers)


@pytest.mark.parametrize("decode", [envelope.decode_native, envelope.decode_node])
@pytest.mark.parametrize(
    ("line", "name"),
    [
        (b"[0,[" + b"0," * 200_000 + b"0]]", "values"),
        (b"[0," + b"[" * 500 + b"]" * 500 + b"]", "depth"),
        (b'[0,["\\ud800",' + b"0," * 9000 + b"0]]", "slow_line"),
    ],
)
def test_decode_of_a_line_beyond_the_bounds(
    decode: Callable[[bytes, Shape], object], line: bytes, name: str
) -> None:
    """Each bound is named by the error, in both dialects."""
    shape = Limits(values=1000, slow_line=1000).shape
    with pytest.raises(MalformedEnvelope, match=rf"\(Limits\.{name}\)"):
        decode(line, shape)


@pytest.mark.parametrize("decode", [envelope.decode_native, envelope.decode_node])
def test_decode_of_a_line_too_long(decode: Callable[[bytes, Shape], object]) -> None:
    """Of either dialect; a run of messages that are no longer than that is none."""
    shape = Limits(line=2000).shape
    with pytest.raises(LineTooLong, match="more than 2000 bytes"):
        decode(b'[0,"%b"]' % (b"x" * 2000), shape)
    run = b"[5,[%b]]" % b",".join([b'"%b"' % (b"x" * 100)] * 60)
    if decode is envelope.decode_native:
        assert decode(run, shape) == envelope.Messages(["x" * 100] * 60)
        run = b"[5,[%b]]" % b",".join([b'"%b"' % (b"x" * 100)] * 90)
    with pytest.raises(LineTooLong, match="more than 2000 bytes"):
        decode(run, shape)


def test_the_worst_run_is_read() -> None:
    """Bounds of one message are no bounds of many: an end that takes least reads every run."""
    shape = Limits(values=10, slow_line=100).shape
    for message in (b"1e999", b'"\\ud800"', b"1" * 400, b"[[]]"):
        count = min(envelope.RUN_MESSAGES, (envelope.RUN_BYTES - 7) // (len(message) + 1))
        line = envelope.spell_messages([message] * count, True)[:-1]
        found = envelope.decode_native(line, shape)
        assert isinstance(found, envelope.Messages)
        assert len(found.messages) == count


@pytest.mark.parametrize(
    "line",
    [b'[0,"\\ud800"]', b'[2,1,1,"\\ud800",0]', b'"\\ud800"', b'{"\\ud800":1}', b"[9,1]", b"[0,"],
)
def test_what_the_fast_reader_refuses_is_read_once_more(
    line: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One fast parse and one slow one at most, of a line of any kind."""
    parses = []
    fast, slow = envelope.decode_line, codec._loads
    monkeypatch.setattr(envelope, "decode_line", lambda text: parses.append("fast") or fast(text))
    monkeypatch.setattr(codec, "decode_short", lambda text: parses.append("fast too"))
    monkeypatch.setattr(codec, "_loads", lambda text: parses.append("slow") or slow(text))
    try:
        envelope.decode_native(line, SHAPE)
    except MalformedEnvelope:
        pass
    assert parses == ["fast", "slow"]


# -- whatever the peer sends ---------------------------------------------------------------------

# What trips readers: halves of surrogate pairs, as keys and names too; numbers without end, twice
# the same key, what only Python's reader calls JSON.
ODD = [
    b'"\\ud800"',
    b'"\\udc00\\ud800"',
    b'"NODE_HANDLEIPC"',
    b'"NODE_HANDLE"',
    b'"NODE_\\ud800"',
    b'"cmd"',
    b'"\\u0063md"',
    b'"refuse"',
    b'"again"',
    b'"ack"',
    b'"net.Socket"',
    b"NaN",
    b"-Infinity",
    b"1e400",
    b"-0",
    b"1e-400",
    b"9" * 5000,
    b"18446744073709551616",
    b"0.1e",
    b"0",
    b"1",
    b"2",
    b"3",
    b"[",
    b"]",
    b"{",
    b"}",
    b",",
    b":",
    b"\xff",
    b"\xed\xa0\x80",
    b"\xf0\x9f\x98\x80",
    b"\\",
    b'"',
    b"null",
    b" ",
    b"\x00",
    b"\r",
    b"\xe2\x80\xa8",
]
ANYTHING = st.recursive(
    st.sampled_from(ODD),
    lambda inner: (
        st.lists(inner, max_size=6).map(lambda items: b"[" + b",".join(items) + b"]")
        | st.lists(st.tuples(st.sampled_from(ODD), inner), max_size=4).map(
            lambda items: b"{" + b",".join(b"%b:%b" % item for item in items) + b"}"
        )
        | st.lists(inner, max_size=6).map(b"".join)
    ),
    max_leaves=12,
)


def check_text(error: Exception) -> None:
    """A text can be printed anywhere: ASCII, short, one line."""
    text = str(error)
    assert text.isascii()
    assert text.isprintable()
    assert len(text) < 700


@given(ANYTHING | st.binary(max_size=40), st.sampled_from([SHAPE, Limits(slow_line=50).shape]))
@example(b'"\\ud800"', SHAPE)
@example(b'{"cmd":"NODE_HANDLEIPC","\\ud800":1}', SHAPE)
@example(b'{"cmd":"NODE_HANDLEIPC","refuse":[[1,1,"\\ud800"]]}', SHAPE)
@example(b'{"cmd":"NODE_HANDLEIPC","again":"\\ud800"}', SHAPE)
@example(b'["\\ud800",1]', SHAPE)
@example(b'[2,1,1,"\\ud800",1,{"\\ud800":1}]', SHAPE)
@example(b'[2,1,1,"t",1,"\\ud800"]', SHAPE)
@example(b"[0," + b"9" * 5000 + b"]", SHAPE)
@example(b'{"cmd":"a","cmd":"NODE_HANDLE"}', SHAPE)
def test_decode_of_anything(line: bytes, shape: Shape) -> None:
    """Whatever comes, nothing but a MalformedEnvelope is raised, and its text can be printed."""
    for decode in (envelope.decode_native, envelope.decode_node):
        try:
            value = decode(memoryview(line), shape)
        except MalformedEnvelope as error:
            check_text(error)
            continue
        envelope.is_internal(value)
        if envelope.is_command(value):
            try:
                envelope.decode_control(value)
            except MalformedEnvelope as error:
                check_text(error)


# -- control lines -------------------------------------------------------------------------------


def test_decode_of_control() -> None:
    """Fields that are not there have their defaults, and the others their values."""
    assert envelope.decode_control({}) == Control(0, None, 0, 0, [], None)
    fields = {"ack": 0, "refuse": [[1, 2, "kind"], [3, 3, "new"]], "again": [4, 5]}
    control = envelope.decode_control(fields)
    assert control.ack == 0
    assert control.refuse == [(1, 2, "kind"), (3, 3, "new")]
    assert control.again == (4, 5)


def test_decode_of_control_has_no_memory() -> None:
    """The list that a control line left out is a new one each time."""
    envelope.decode_control({}).refuse.append((1, 1, "x"))
    assert envelope.decode_control({}).refuse == []


@pytest.mark.parametrize(
    "fields",
    [
        {"native": -1},
        {"native": True},
        {"native": 2.0},
        {"native": "1"},
        {"native": None},
        {"ack": -1},
        {"ack": 2**53},
        {"ack": "1"},
        {"ack": []},
        {"descriptors": -1},
        {"descriptors": 2**70},
        {"bytes": 1.5},
        {"refuse": None},
        {"refuse": [1]},
        {"refuse": [[1, 1]]},
        {"refuse": [[1, 1, "x", 1]]},
        {"refuse": [[0, 1, "x"]]},
        {"refuse": [[1, 1, 1]]},
        {"refuse": {"1": 1}},
        {"cmd": "NODE_HANDLEIPC", "ack": -1, "descriptors": 1, "bytes": 1},
        {"cmd": "NODE_HANDLEIPC", "ack": 1, "descriptors": 1.0, "bytes": 1},
        {"cmd": "NODE_HANDLEIPC", "ack": 1, "descriptors": 1, "bytes": 1 << 63},
        {"again": [1]},
        {"again": [0, 1]},
        {"again": 1},
    ],
)
def test_decode_of_control_with_a_wrong_field(fields: dict[str, object]) -> None:
    """A field of the wrong type or out of bounds is the peer's fault."""
    with pytest.raises(MalformedEnvelope, match="control line"):
        envelope.decode_control(fields)


def test_lines_are_compared_by_value() -> None:
    """The classes of lines are plain records."""
    assert msgspec.structs.astuple(Handle(1, 2, "t", None)) == (1, 2, "t", None, None)
