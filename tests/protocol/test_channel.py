"""One end of a channel as a state machine: order, dialects, errors of the peer, ends, time."""

from __future__ import annotations

from collections.abc import Callable

import errno

import pytest

from handleipc.exceptions import (
    ChannelClosed,
    DescriptorReleased,
    LineTooLong,
    LocalProtocolError,
    MalformedEnvelope,
    RemoteProtocolError,
)
from handleipc.handles.pending import Held
from handleipc.handles.refusal import refusal_in_words
from handleipc.limits import Invitation, Limits
from handleipc.protocol.channel import State
from handleipc.protocol.deliveries import MESSAGE_COST
from handleipc.protocol.stages import EntryState, Late
from handleipc.wire import envelope
from handleipc.wire.syscalls import Refused
from tests.protocol_pair import INVITED, SWITCH, Fed, Thing, exchange, native

ACK = b'{"cmd":"NODE_HANDLE_ACK"}\n'
NACK = b'{"cmd":"NODE_HANDLE_NACK"}\n'


def node_handle(message: str = "1", tag: str = "net.Socket", extra: str = "") -> bytes:
    return f'{{"cmd":"NODE_HANDLE","type":"{tag}","msg":{message}{extra}}}\n'.encode()


# -- splits ---------------------------------------------------------------------------------------

NODE_STREAM = [
    (b'{"a":1}\n[0,1]\n', []),
    (node_handle('"first"', extra=',"key":"k"'), [5]),
    (b'"between"\n', []),
    (node_handle('{"cmd":"NODE_x"}', "dgram.Socket", ',"dgramType":"udp4"'), [6]),
    ('"é\\ud800\U0001f600"\n'.encode(), []),
]
NODE_RESULT = [
    {"a": 1},
    [0, 1],
    ("first", "net.Socket[5]"),
    "between",
    ({"cmd": "NODE_x"}, "dgram.Socket[6]"),
    "é\ud800\U0001f600",
]
NATIVE_STREAM = [
    (SWITCH + b'[0,"plain"]\n', []),
    (b'[1,3]\n[2,1,1,"a",1]\n[0,2]\n[2,2,2,"b",3,{"key":"k"}]\n', [5, 6, 7]),
    (b"[0,4]\n", []),
    (b'[1,1]\n[2,3,1,"c",[5]]\n', [8]),
]
NATIVE_RESULT = ["plain", (1, "a[5]"), 2, (3, "b[6, 7]"), 4, ([5], "c[8]")]


def feed_split(end: Fed, stream: list[tuple[bytes, list[int]]], cuts: set[int]) -> list[object]:
    """Feed a stream cut at the given offsets, as the kernel would: never past descriptors."""
    end.protocol.incoming.deliveries.takes_all = True
    at = 0
    for data, fds in stream:
        start = 0
        for i in range(1, len(data) + 1):
            if i == len(data) or at + i in cuts:
                end.feed(data[start:i], fds if not start else [])
                start = i
        at += len(data)
    end.write()
    return [(item[0], repr(item[1])) if isinstance(item, tuple) else item for item in end.take()]


@pytest.mark.parametrize(
    ("stream", "result", "roles"),
    [(NODE_STREAM, NODE_RESULT, {}), (NATIVE_STREAM, NATIVE_RESULT, {"invited_by": INVITED})],
    ids=["node", "native"],
)
class TestSplits:
    """The same bytes mean the same, however they are cut."""

    def end(self, roles: dict[str, object]) -> Fed:
        end = Fed(**roles)
        end.write()
        end.protocol.incoming.deliveries.holds_back = False
        return end

    def test_whole(self, stream, result, roles) -> None:
        """Write by write."""
        assert feed_split(self.end(roles), stream, set()) == result

    def test_byte_by_byte(self, stream, result, roles) -> None:
        """One byte at a time."""
        length = sum(len(data) for data, _ in stream)
        assert feed_split(self.end(roles), stream, set(range(length))) == result

    def test_split_at_every_index(self, stream, result, roles) -> None:
        """Cut once, at each offset in turn."""
        for cut in range(sum(len(data) for data, _ in stream)):
            assert feed_split(self.end(roles), stream, {cut}) == result

    def test_split_at_every_pair_near(self, stream, result, roles) -> None:
        """Cut twice, with few bytes between."""
        for cut in range(sum(len(data) for data, _ in stream)):
            for gap in (1, 2, 7):
                assert feed_split(self.end(roles), stream, {cut, cut + gap}) == result


# -- node dialect ---------------------------------------------------------------------------------


def test_one_handle_in_flight() -> None:
    """After a handle everything waits for its reply, in order."""
    end = Fed()
    for message, fds in ((b"1", None), (b"2", [5]), (b"3", None), (b"4", [6])):
        end.send(message, fds)
    assert end.write() == [(b"1\n", []), (node_handle("2"), [5])]
    end.feed(ACK)
    assert end.closed == [5]
    assert end.write() == [(b"3\n", []), (node_handle("4"), [6])]
    assert end.outcomes() == [("1", None), ("2", None), ("3", None)]


def test_replies_overtake_what_waits() -> None:
    """An ACK of ours goes out while a handle of ours is unanswered: crossing handles do not hang."""
    end = Fed()
    end.send(b"1", [5])
    end.write()
    end.send(b"2")
    end.feed(node_handle(), [9])
    assert end.lines() == ACK
    assert end.take() == [(1, Thing(end, "net.Socket", None, [9]))]


def test_a_nack_sends_the_same_envelope_again() -> None:
    """Three times, with growing pauses, never wrapped; then the handle comes back."""
    end = Fed()
    end.send(b'"m"', [5], details={"key": "k"})
    envelope = node_handle('"m"', extra=',"key":"k"')
    pauses = []
    for _ in range(3):
        assert end.write() == [(envelope, [5])]
        end.feed(NACK)
        assert end.write() == []
        before = end.now
        end.wait()
        pauses.append(end.now - before)
    assert end.write() == [(envelope, [5])]
    end.feed(NACK)
    assert pauses == sorted(pauses)
    assert pauses[0] > 0
    ((message, reason),) = end.outcomes()
    assert message == '"m"'
    assert "4 times" in reason
    assert end.closed == []


def test_a_handle_closed_before_its_retry_comes_back() -> None:
    """Sent again means read again: a closed object is not sent as somebody else's number."""
    end = Fed()
    fds = [5]
    end.send(b"1", [5], read=lambda: fds)
    end.write()
    end.feed(NACK)
    fds[0] = -1
    end.wait()
    end.send(b"2")
    assert end.write() == [(b"2\n", [])]
    assert "closed" in end.outcomes()[0][1]


@pytest.mark.parametrize("reply", [ACK, NACK])
def test_a_stray_reply_is_a_warning(reply: bytes) -> None:
    """Node dies of it; here it is noted, and the channel goes on."""
    end = Fed()
    end.feed(reply + b"1\n")
    assert end.take() == [1]
    assert "stray" in end.protocol.faults.warnings[0]


def test_a_nested_retry_is_unwrapped() -> None:
    """Node wraps its retries once more: the inner envelope is meant, and answered once."""
    end = Fed()
    inner = node_handle('"m"', extra=',"key":"k"').strip().decode()
    end.feed(node_handle(inner, "net.Native"), [5])
    assert end.lines() == ACK
    ((message, thing),) = end.take()
    assert (message, thing.tag, thing.options) == ("m", "net.Socket", {"key": "k"})


def test_an_inner_value_that_is_no_envelope_stays() -> None:
    """Only a NODE_HANDLE inside is unwrapped; other internal messages are delivered with it."""
    end = Fed()
    end.feed(node_handle('{"cmd":"NODE_HANDLE_ACK"}'), [5])
    assert end.take()[0][0] == {"cmd": "NODE_HANDLE_ACK"}


@pytest.mark.parametrize(
    ("data", "fds", "closed", "text"),
    [
        (node_handle(), [], [], "without its descriptor"),
        (node_handle(), [5, 6], [5, 6], "2 descriptors"),
        (node_handle(tag="kind"), [5], [5], "kind"),
        (node_handle(tag="type"), [5], [5], "type"),
        (b'{"cmd":"NODE_HANDLE","msg":1,"type":5}\n', [], [], "without its descriptor"),
    ],
)
def test_a_bad_handle_costs_the_handle(data, fds, closed, text) -> None:
    """Missing, too many, wrong kind, unknown type: NACK, closed, an error, and the channel lives."""
    end = Fed()
    end.feed(data, fds)
    assert end.lines() == NACK
    assert end.closed == closed
    assert text in str(end.protocol.faults.errors[0])
    end.feed(b'"next"\n')
    assert end.take() == ["next"]


def test_a_lost_descriptor_is_asked_for_when_there_is_room() -> None:
    """The NACK waits for a free slot, since the peer uses its tries up at once."""
    end = Fed(slots=0)
    end.feed(node_handle(), [], lost=True)
    assert end.lines() == b""
    for _ in range(5):
        end.wait()
        assert end.lines() == b""
    end.slots = 1
    end.wait()
    assert end.lines() == NACK
    end.feed(node_handle(), [5])
    assert end.lines() == ACK


def test_a_lost_descriptor_is_refused_in_the_end() -> None:
    """Without a free slot for `retry_time` the NACK goes all the same: nobody hangs."""
    end = Fed(Limits(retry_time=1.0), slots=0)
    end.feed(node_handle(), [], lost=True)
    while not (lines := end.lines()):
        end.wait()
    assert lines == NACK
    assert end.now >= 1.0


def test_too_many_handles_at_once() -> None:
    """A peer that does not wait for replies breaks the protocol before it fills memory."""
    end = Fed(Limits(node_replies=2))
    for fd in (5, 6):
        end.feed(node_handle(), [fd])
    end.feed(node_handle(), [7])
    assert "without waiting" in end.error
    assert sorted(end.closed) == [5, 6, 7]


# -- agreement ------------------------------------------------------------------------------------


def pair(**options: object) -> tuple[Fed, Fed]:
    limits = Limits(window=8)
    return Fed(limits, inviting=True, **options), Fed(limits, invited_by=INVITED)


def test_two_ends_agree() -> None:
    """The child begins, the parent answers, and both are native."""
    parent, child = pair()
    parent.send(b'"early"')
    exchange(parent, child)
    assert (parent.protocol.dialect, child.protocol.dialect) == ("native", "native")
    assert child.take() == ["early"]


def test_the_switch_is_the_first_line_of_the_child() -> None:
    """Before a reply to anything it has read."""
    _, child = pair()
    child.feed(node_handle(), [5])
    lines = child.lines()
    assert lines.startswith(b'{"cmd":"NODE_HANDLEIPC","native":2,')
    assert lines.endswith(ACK)


def test_the_parent_switches_when_nothing_is_unanswered() -> None:
    """A NODE_HANDLE sent before gets its ACK first; what waited behind it goes out native."""
    parent, child = pair()
    parent.send(b"1", [5])
    parent.send(b"2", [6])
    first = parent.write()
    assert first == [(node_handle("1"), [5])]
    switch = child.lines()
    parent.feed(switch)
    assert b"native" not in parent.lines()
    child.feed(*first[0])
    parent.feed(child.lines())
    written = parent.write()
    assert written[0][0].startswith(b'{"cmd":"NODE_HANDLEIPC","native":2')
    assert written[1] == (b'[4,1,"net.Socket",[2]]\n', [6])


def test_a_native_only_handle_waits_for_the_switch() -> None:
    """It keeps its place, and what is behind it waits too."""
    parent, child = pair()
    parent.send(b"1")
    parent.send(b"2", [5], tag="fd", native_only=True)
    parent.send(b"3")
    assert parent.write() == [(b"1\n", [])]
    assert parent.protocol.may_become_native
    exchange(parent, child)
    assert child.take()[-2:] == [(2, Thing(child, "fd", None, [5])), 3]


@pytest.mark.parametrize("how", ["first line", "timeout", "eof"])
def test_a_native_only_handle_to_a_node_peer_comes_back(how: str) -> None:
    """When the first line is no switch, when none comes in time, or none will."""
    parent = Fed(inviting=True)
    parent.send(b"1", [5], tag="fd", native_only=True)
    parent.send(b"2")
    assert parent.write() == []
    if how == "first line":
        parent.feed(b'"hello"\n')
    elif how == "timeout":
        parent.wait()
        assert parent.now == Limits().hello_timeout
    else:
        parent.protocol.end()
    parent.write()
    message, reason = parent.outcomes()[0]
    assert message == "1"
    assert reason
    assert how == "eof" or not parent.protocol.may_become_native


def test_a_late_switch_after_the_hello_timeout() -> None:
    """A child that starts slowly still becomes native; only the handle did not wait for it."""
    parent, child = pair()
    parent.send(b"1", [5], tag="fd", native_only=True)
    parent.write()
    parent.wait()
    parent.write()
    assert "node dialect" in parent.outcomes()[0][1]
    exchange(parent, child)
    assert parent.protocol.dialect == "native"


@pytest.mark.parametrize(
    ("roles", "before", "text"),
    [
        ({}, b"", "out of place"),
        ({"inviting": True}, b"1\n", "out of place"),
        ({"inviting": True}, SWITCH, "out of place"),
        ({"inviting": True}, b"", "to version 1 of the native dialect, and 2 was offered"),
    ],
)
def test_a_switch_out_of_place(roles, before: bytes, text: str) -> None:
    """From a peer not invited, not as its first line, twice, or to a version not offered."""
    end = Fed(**roles)
    end.feed(before)
    version = b"1" if "version" in text else b"2"
    end.feed(SWITCH.replace(b'"native":2', b'"native":' + version))
    assert text in end.error


# -- native dialect: the peer breaks a rule -------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "fds", "lost", "text"),
    [
        (b"[0,1]\n", [5], False, "no line claims"),
        (b"[1,2]\n", [5], False, "declared 2 descriptors and sent 1"),
        (b"[1,1]\n", [5, 6], False, "declared 1 descriptors and sent 2"),
        (b"[1,1]\n", [], False, "sent none"),
        (b"[1,1]\n[1,1]\n", [5], False, "before the last was used up"),
        (b'[1,1]\n[2,1,2,"x",1]\n', [5], False, "more descriptors"),
        (b'[2,1,1,"x",1]\n', [], False, "more descriptors"),
        (b'[1,1]\n[2,2,1,"x",1]\n', [5], False, "handle 2 after 0"),
        (b"[1,1]\n[3,1,1]\n", [5], False, "nobody asked"),
        (b"[7,1]\n", [], False, "no line"),
        (b"5\n", [], False, "no line"),
        (b'{"a":1}\n', [], False, "no command"),
        (node_handle(), [5], False, "after its switch"),
        (ACK, [], False, "nothing waited for"),
        (NACK, [], False, "nothing waited for"),
        (SWITCH, [], False, "out of place"),
        (b'{"cmd":"NODE_HANDLEIPC","ack":1}\n', [], False, "outside of 0..0"),
        (b'{"cmd":"NODE_HANDLEIPC","ack":"1"}\n', [], False, "malformed"),
        (b'{"cmd":"NODE_HANDLEIPC","ack":0,"descriptors":1,"bytes":1}\n', [], False, "took back"),
        (b'{"cmd":"NODE_HANDLEIPC","refuse":[[1,1,"kind"]]}\n', [], False, "does not have"),
        (b'{"cmd":"NODE_HANDLEIPC","again":[1,1]}\n', [], False, "does not have"),
        (b"\n", [], False, "not JSON"),
        (b"[0,NaN]\n", [], False, "not JSON"),
        (b'[0,"\xff"]\n', [], False, "not UTF-8"),
        (b"[0," + b"[" * 500 + b"]" * 500 + b"]\n", [], False, "nested too deep"),
    ],
)
def test_the_peer_breaks_a_rule(data, fds, lost, text) -> None:
    """The channel ends with an error that names the rule; what came is closed."""
    end = native()
    end.feed(data, fds, lost)
    assert text in end.error
    assert isinstance(end.protocol.error, RemoteProtocolError)
    assert sorted(end.closed) == sorted(fds)
    assert end.protocol.next_stage() is None


@pytest.mark.parametrize(
    "data", [b"garbage\n", b"\n", b"\xff\n", b"NaN\n", b"[" * 500 + b"\n", b"\xef\xbb\xbf1\n"]
)
def test_bad_lines_of_a_node_peer(data: bytes) -> None:
    """What is no JSON ends the channel; what came whole before is delivered."""
    end = Fed()
    end.feed(b'"before"\n' + data + b'"after"\n')
    assert isinstance(end.protocol.error, MalformedEnvelope)
    assert end.take() == ["before"]


def test_descriptors_on_a_plain_message_of_a_node_peer() -> None:
    """Nobody claims them: they are closed, and the channel ends at the next line."""
    end = Fed()
    end.feed(b"1\n", [5])
    end.feed(b"2\n")
    assert "no line claims" in end.error
    assert end.closed == [5]


def test_a_control_line_before_any_switch() -> None:
    """It has no meaning in a channel that is node both ways."""
    end = Fed(inviting=True)
    end.feed(b'1\n{"cmd":"NODE_HANDLEIPC","ack":0}\n')
    assert "nobody switched" in end.error


def test_beyond_the_grants() -> None:
    """More handles or bytes than granted end the channel."""
    end = native(Limits(window=1))
    end.feed(b'[1,2]\n[2,1,1,"x",1]\n[2,2,1,"x",1]\n', [5, 6])
    assert "was granted 1" in end.error
    end = native(Limits(bytes=10))
    end.feed(b"[0,1]\n" * 2)
    assert end.protocol.state is State.OPEN
    end.feed(b"[0,1]\n")
    assert "was granted 10" in end.error


def test_an_over_long_line() -> None:
    """The framer says so, and the driver ends the channel with it."""
    end = Fed(Limits(line=100))
    with pytest.raises(LineTooLong) as caught:
        end.feed(b"x" * 101)
    assert caught.value.limit == 100
    end.protocol.end(caught.value)
    assert "100 bytes" in end.error


def test_asked_too_often() -> None:
    """The peer may ask for the same handle a bounded number of times."""
    end = native(Limits(asks=2))
    end.send(b"1", [5])
    end.write()
    again = b'{"cmd":"NODE_HANDLEIPC","again":[1,1]}\n'
    for _ in range(2):
        end.feed(again)
        assert end.write() == [(b"[1,1]\n[3,1,1]\n", [5])]
    end.feed(again)
    assert "too often" in end.error
    assert end.outcomes()[0][0] == "1"


def test_asked_twice_for_one() -> None:
    """Asking again before the answer has left is an error."""
    end = native()
    end.send(b"1", [5])
    end.write()
    again = b'{"cmd":"NODE_HANDLEIPC","again":[1,1]}\n'
    end.feed(again + again)
    assert "asked twice" in end.error


def test_acknowledged_while_it_was_to_be_sent_again() -> None:
    """The retransmission is dropped: the handle is the peer's."""
    end = native()
    end.send(b"1", [5])
    end.write()
    end.feed(b'{"cmd":"NODE_HANDLEIPC","again":[1,1]}\n')
    end.feed(b'{"cmd":"NODE_HANDLEIPC","ack":1,"descriptors":9,"bytes":2097152}\n')
    assert end.write() == []
    assert end.outcomes() == [("1", None)]
    assert end.closed == [5]


def test_a_parked_retransmission_of_a_refused_handle() -> None:
    """The kernel did not take it, then the peer gave the handle back: nothing of it is sent."""
    end = native()
    end.send(b"1", [5])
    end.send(b"2", [6])
    end.write()
    end.feed(b'{"cmd":"NODE_HANDLEIPC","again":[1,2]}\n')
    assert end.protocol.next_stage() is not None
    end.protocol.wrote(Refused.IN_FLIGHT)
    end.feed(b'{"cmd":"NODE_HANDLEIPC","refuse":[[1,1,"closing"]]}\n')
    assert end.write() == [(b"[1,1]\n[3,2,1]\n", [6])]


def test_an_absurd_grant_is_harmless() -> None:
    """It is worth as much as our own limits allow."""
    end = native()
    end.feed(b'{"cmd":"NODE_HANDLEIPC","ack":0,"descriptors":9007199254740991,"bytes":2097152}\n')
    assert end.protocol.outgoing.window.may_descriptors == 65_536


# -- native dialect: handles ----------------------------------------------------------------------


def test_many_handles_in_one_write() -> None:
    """Up to `set_size` handles share a write and, being alike, a line."""
    end = native(Limits(set_size=2))
    for i in range(3):
        end.send(b"%d" % i, [5 + i])
    assert end.write() == [
        (b'[4,1,"net.Socket",[0,1]]\n', [5, 6]),
        (b'[4,3,"net.Socket",[2]]\n', [7]),
    ]
    end.feed(b'{"cmd":"NODE_HANDLEIPC","ack":2,"descriptors":10,"bytes":2097152}\n')
    assert end.outcomes() == [("0", None), ("1", None)]


def test_no_set_exceeds_the_kernel() -> None:
    """253 descriptors go together, the next handle starts a set of its own."""
    end = native(Limits(set_size=253))
    end.feed(b'{"cmd":"NODE_HANDLEIPC","ack":0,"descriptors":999,"bytes":1048576}\n')
    end.send(b"1", list(range(10, 210)))
    end.send(b"2", list(range(300, 400)))
    assert [len(fds) for _, fds in end.write()] == [200, 100]


def test_given_when_the_ack_is_in_the_kernel() -> None:
    """Not when it is queued, and not when half of it is written."""
    end = native()
    end.feed(b'[1,1]\n[2,1,1,"x",1]\n', [5])
    stage = end.protocol.next_stage()
    assert b'"ack":1' in stage.data
    assert not end.protocol.incoming.ready
    end.protocol.wrote(len(stage.data) - 1)
    assert not end.protocol.incoming.ready
    end.protocol.wrote(1)
    assert end.protocol.incoming.ready


def test_ready_bounds_what_a_kill_can_swallow() -> None:
    """Of many handles `ready` are acknowledged; more follow as the application takes them."""
    end = native(Limits(window=8, ready=2))
    for i in range(1, 6):
        end.feed(b'[1,1]\n[2,%d,1,"x",%d]\n' % (i, i), [i])
    assert b'"ack":2' in end.lines()
    assert [message for message, _ in end.take()] == [1, 2, 3, 4, 5]


def test_a_hole_is_filled() -> None:
    """A lost descriptor is asked for; what is behind it waits, in order."""
    end = native(slots=0)
    end.feed(b'[1,2]\n[2,1,1,"x",1]\n[2,2,1,"x",2]\n[0,3]\n', [5], lost=True)
    assert end.take() == [(1, Thing(end, "x", None, [5]))]
    end.wait()
    assert end.protocol.incoming.lost.ask is None
    end.slots = 9
    end.wait()
    assert b'"again":[2,1]' in end.lines()
    end.feed(b"[1,1]\n[3,2,1]\n", [6])
    assert end.take() == [(2, Thing(end, "x", None, [6])), 3]


def test_descriptors_behind_a_hole_are_closed() -> None:
    """They would occupy the slots the hole needs; they are asked for with it."""
    end = native()
    end.feed(b'[1,1]\n[2,1,1,"x",1]\n', [], lost=True)
    end.feed(b'[1,1]\n[2,2,1,"x",2]\n', [6])
    assert end.closed == [6]
    end.wait()
    assert b'"again":[1,2]' in end.lines()
    end.feed(b"[1,2]\n[3,1,1]\n[3,2,1]\n", [7, 8])
    assert [message for message, _ in end.take()] == [1, 2]


def test_a_hole_is_given_up() -> None:
    """Without a slot for `retry_time` the handle goes back, and order goes on without it."""
    end = native(Limits(retry_time=1.0), slots=0)
    end.feed(b'[1,1]\n[2,1,1,"x",1]\n[0,2]\n', [], lost=True)
    while not (lines := end.lines()):
        end.wait()
    assert b'"refuse":[[1,1,"descriptors"]]' in lines
    assert end.take() == [2]
    assert "no free descriptor slot" in str(end.protocol.faults.errors[0])


def test_a_hole_is_denied() -> None:
    """Lost three times in spite of free slots: a security module."""
    end = native()
    end.feed(b'[1,1]\n[2,1,1,"x",1]\n', [], lost=True)
    for _ in range(3):
        end.wait()
        assert b"again" in end.lines()
        end.feed(b"[1,1]\n[3,1,1]\n", [], lost=True)
    end.wait()
    assert b'"refuse":[[1,1,"denied"]]' in end.lines()


def test_a_handle_of_many_descriptors_lost() -> None:
    """One that needs more slots than a usual probe counts is asked for all the same."""
    end = native()
    end.feed(b'[1,40]\n[2,1,40,"x",1]\n', [5], lost=True)
    assert end.closed == [5]
    end.wait()
    assert b'"again":[1,1]' in end.lines()


def test_a_refused_kind_goes_back() -> None:
    """It is not given, its neighbours are; neighbouring refusals share an entry."""
    end = native()
    end.feed(b'[1,3]\n[2,1,1,"kind",1]\n[2,2,1,"kind",2]\n[2,3,1,"x",3]\n', [5, 6, 7])
    lines = end.lines()
    assert b'"refuse":[[1,2,"kind"]],"ack":3' in lines
    assert end.take() == [(3, Thing(end, "x", None, [7]))]


def test_refused_by_the_peer() -> None:
    """The handle comes back with the code, the next one is acknowledged."""
    end = native()
    end.send(b"1", [5])
    end.send(b"2", [6])
    end.write()
    end.feed(
        b'{"cmd":"NODE_HANDLEIPC","refuse":[[1,1,"kind"]],"ack":2,"descriptors":9,"bytes":2097152}\n'
    )
    assert end.outcomes() == [
        ("1", f"refused by the peer: {refusal_in_words('kind')}"),
        ("2", None),
    ]
    assert end.closed == [6]


def test_a_refusal_that_is_partly_a_lie() -> None:
    """Then none of it is taken: all come back by the end of the channel, once."""
    end = native()
    end.send(b"1", [5])
    end.send(b"2", [6])
    end.write()
    end.feed(b'{"cmd":"NODE_HANDLEIPC","refuse":[[1,9,"kind"]]}\n')
    assert "does not have" in end.error
    assert [message for message, _ in end.outcomes()] == ["1", "2"]
    assert end.protocol._system.in_flight.total == 0


@pytest.mark.parametrize("dialect", ["node", "native"])
def test_descriptors_in_the_middle_of_a_line(dialect: str) -> None:
    """Those of its first byte wait for the rest of the line; any others end the channel."""
    end = native() if dialect == "native" else Fed()
    end.feed(b"[1,", [5])
    assert end.protocol.state is State.OPEN
    end.feed(b"1", [6])
    assert "in the middle of a line" in end.error
    assert end.closed == [5, 6]
    end = native() if dialect == "native" else Fed()
    end.feed(b"[1,")
    end.feed(b"1", [6])
    assert "in the middle of a line" in end.error
    assert end.closed == [6]


@pytest.mark.parametrize("dialect", ["node", "native"])
def test_taking_lines_is_interrupted(dialect: str) -> None:
    """What a signal handler raises goes on, and the channel ends: lines were lost."""
    end = native() if dialect == "native" else Fed()

    def interrupt(message: object) -> bool:
        raise KeyboardInterrupt

    end.protocol.hooks.internal = interrupt
    with pytest.raises(KeyboardInterrupt):
        end.feed(spelled(dialect, b"1") + spelled(dialect, b'{"cmd":"NODE_x"}'))
    assert "interrupted" in end.error
    assert 1 in end.take()


def test_an_end_is_interrupted_in_a_conversion() -> None:
    """What a signal handler raises goes on, and descriptors of the handles behind are closed."""
    end = native(reads=False)
    end.feed(b'[1,4]\n[2,1,1,"a",1]\n[2,2,1,"b",2]\n[2,3,2,"c",3]\n', [5, 6, 7, 8])

    def interrupt(*_: object) -> object:
        raise KeyboardInterrupt

    end.protocol.incoming._convert = interrupt
    with pytest.raises(KeyboardInterrupt):
        end.protocol.end(peer_is_dead=True)
    assert end.closed[-3:] == [6, 7, 8]


def test_ends_of_handles_are_interrupted() -> None:
    """A signal handler raises in one handle's close(): the others have ended all the same."""
    end = native()
    first, second = end.send(b"1", [5]), end.send(b"2", [6])
    end.write()

    def interrupt() -> None:
        raise KeyboardInterrupt

    assert isinstance(first.pending, Held)
    first.pending.on_delivered = interrupt
    with pytest.raises(KeyboardInterrupt):
        end.protocol.outgoing.acknowledge(2)
    assert [first.state, second.state] == [EntryState.ENDED] * 2
    assert end.closed == [6]


def spelled(dialect: str, message: bytes) -> bytes:
    return envelope.spell_message(message, dialect == "native")


def test_a_native_line_nested_beyond_the_stack() -> None:
    """With a large Limits.depth the parser may give up first: an error, not a lost message."""
    end = native(Limits(depth=10_000_000))
    end.feed(b'[0,"one"]\n[0,' + b"[" * 200_000 + b"]" * 200_000 + b"]\n")
    assert "nested too deep" in end.error
    assert end.take() == ["one"]


def test_bytes_are_granted_as_they_are_taken() -> None:
    """Half a window at a time; a sender without credit waits, control does not."""
    limits = Limits(window=8, bytes=64)
    a, b = Fed(limits, inviting=True), Fed(limits, invited_by=Invitation(8, 64))
    exchange(a, b)
    for i in range(100):
        a.send(b"%d" % i)
    exchange(a, b)
    assert len(b.protocol.incoming.ready) < 20
    got = []
    while len(got) < 100:
        got += b.take()
        exchange(a, b)
    assert got == list(range(100))


def test_more_is_granted_while_somebody_waits() -> None:
    """Two ends that both send before they read must not wait for each other."""
    limits = Limits(window=8, bytes=64)
    a, b = Fed(limits, inviting=True), Fed(limits, invited_by=Invitation(8, 64))
    exchange(a, b)
    b.protocol.incoming.wants_more = True
    for i in range(100):
        a.send(b"%d" % i)
    exchange(a, b)
    assert len(b.protocol.incoming.ready) == 100


def test_the_budget_of_the_process() -> None:
    """When nothing is free a channel may still have one handle in flight."""
    end = native(Limits(in_flight=0))
    end.send(b"1", [5])
    end.send(b"2", [6])
    assert [fds for _, fds in end.write()] == [[5]]
    end.feed(b'{"cmd":"NODE_HANDLEIPC","ack":1,"descriptors":9,"bytes":2097152}\n')
    assert [fds for _, fds in end.write()] == [[6]]


# -- writing --------------------------------------------------------------------------------------


def test_too_many_in_flight_is_waited_out() -> None:
    """ETOOMANYREFS: control goes on, the stage is tried again after growing pauses."""
    end = native()
    end.send(b"1", [5])
    pauses = []
    for _ in range(3):
        assert end.protocol.next_stage().fds == [5]
        end.protocol.wrote(Refused.IN_FLIGHT)
        assert end.protocol.next_stage() is None
        before = end.now
        end.wait()
        pauses.append(end.now - before)
    assert pauses == sorted(pauses)
    end.feed(b'[1,1]\n[2,1,1,"x",1]\n', [9])
    end.protocol.next_stage()
    end.protocol.wrote(Refused.IN_FLIGHT)
    assert b'"ack":1' in end.lines()


def test_another_channel_makes_room() -> None:
    """A handle that ends anywhere in the process wakes those that wait."""
    end = native()
    woken = []
    end.protocol.hooks.wake = lambda: woken.append(True)
    end.send(b"1", [5])
    end.protocol.next_stage()
    end.protocol.wrote(Refused.IN_FLIGHT)
    end.protocol._system.in_flight.add(1)
    end.protocol._system.in_flight.release(1)
    assert woken == [True]
    assert [fds for _, fds in end.write()] == [[5]]
    end.protocol.writes._retry()
    assert woken == [True]


def test_a_handle_closed_before_it_leaves() -> None:
    """It comes back; its neighbours go, with descriptors read at the write."""
    end = native()
    fds = [6]
    end.send(b"1", [5])
    end.send(b"2", [6], read=lambda: fds)
    end.send(b"3", [7])
    assert end.protocol.next_stage().fds == [5, 6, 7]
    fds[0] = -1
    assert end.write() == [
        (b'[4,1,"net.Socket",[1]]\n', [5]),
        (b'[4,2,"net.Socket",[3]]\n', [7]),
    ]
    assert "closed while it waited" in end.outcomes()[0][1]


def test_a_handle_closed_when_it_is_asked_for_again() -> None:
    """Order cannot go on without it: this end gives the channel up, and says why."""
    end = native()
    fds = [5]
    end.send(b"1", [5], read=lambda: fds)
    end.write()
    fds[0] = -1
    end.feed(b'{"cmd":"NODE_HANDLEIPC","again":[1,1]}\n')
    assert end.protocol.next_stage() is None
    assert "closed while the peer asked" in end.error


@pytest.mark.parametrize("dialect", ["node", "native"])
def test_the_kernel_will_not_carry_it(dialect: str) -> None:
    """EPERM and the like: the handles of the stage come back, the rest goes on."""
    end = native() if dialect == "native" else Fed()
    end.send(b"1", [5])
    end.send(b"2")
    end.protocol.next_stage()
    end.protocol.wrote(OSError(errno.EPERM, "not permitted"))
    assert end.outcomes() == [("1", "the kernel does not pass it on: not permitted")]
    assert b"2" in end.lines()


def test_one_handle_of_a_set_is_to_blame() -> None:
    """The others of its set are sent; only the one the kernel refuses alone comes back."""
    end = native()
    for i in range(4):
        end.send(b"%d" % i, [5 + i])
    sent = []
    while (stage := end.protocol.next_stage()) is not None:
        if 7 in stage.fds:
            end.protocol.wrote(OSError(errno.EPERM, "bad descriptor"))
        else:
            sent += stage.fds
            end.protocol.wrote(len(stage.data))
    assert end.outcomes() == [("2", "the kernel does not pass it on: bad descriptor")]
    assert sent == [5, 6, 8]


def test_the_kernel_will_not_carry_it_again() -> None:
    """What the peer asked for again cannot come back: the channel is given up."""
    end = native()
    end.send(b"1", [5])
    end.write()
    end.feed(b'{"cmd":"NODE_HANDLEIPC","again":[1,1]}\n')
    end.protocol.next_stage()
    end.protocol.wrote(OSError(errno.EPERM, "not permitted"))
    assert end.protocol.next_stage() is None
    end.end_if_asked()
    assert isinstance(end.protocol.error, LocalProtocolError)
    assert end.outcomes()[0][0] == "1"


@pytest.mark.parametrize("dialect", ["node", "native"])
def test_withdraw(dialect: str) -> None:
    """Before its first byte has left an entry can be taken back, queued or spelled."""
    end = native() if dialect == "native" else Fed()
    first, second = end.send(b"1", [5]), end.send(b"2", [6])
    stage = end.protocol.next_stage()
    assert stage.fds
    assert end.protocol.outgoing.withdraw(first)
    assert end.protocol.outgoing.withdraw(second)
    assert end.protocol.outgoing.idle
    third = end.send(b"3", [7])
    assert [fds for _, fds in end.write()] == [[7]]
    assert not end.protocol.outgoing.withdraw(third)


def test_a_half_written_stage_is_finished_first() -> None:
    """Its rest goes before control, and without descriptors."""
    end = native()
    end.send(b"1", [5])
    stage = end.protocol.next_stage()
    end.protocol.wrote(3)
    end.feed(b'[1,1]\n[2,1,1,"x",1]\n', [9])
    assert end.protocol.next_stage() is stage
    assert stage.fds == []
    assert stage.offset == 3


def test_long_lines_share_no_stage() -> None:
    """A stage is cut at 64 KiB; plain bytes and handles keep their order."""
    end = native()
    for i in range(3):
        end.protocol.send(b'"%s"' % (b"x" * 40_000))
        end.send(b"%d" % i)
    sizes = [len(data) for data, _ in end.write()]
    assert len(sizes) == 2
    assert end.outcomes() == [("0", None), ("1", None), ("2", None)]


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("dialect", ["node", "native"])
def test_a_long_message_is_not_copied(dialect: str, waits: bool) -> None:
    """It ends its stage; what leaves is what spelling it with the others would give."""
    end = native() if dialect == "native" else Fed()
    long = b'"%b"' % (b"x" * 100_000)
    messages = [b"1", b"2", long, b"3", long, long]
    native_run = dialect == "native" and not waits
    spelled = envelope.spell_messages(messages[:2], True) if native_run else b""
    for message in messages[2 if native_run else 0 :]:
        spelled += envelope.spell_message(message, dialect == "native")
    for message in messages:
        if waits:
            end.send(message)
        else:
            end.protocol.send(message)
    stage = end.protocol.next_stage()
    assert stage.data.body is long
    assert len(stage.data) == len(bytes(stage.data))
    first = len(stage.data) - 1
    written = bytes(stage.data)
    end.protocol.wrote(first)
    assert len(end.outcomes()) == (2 if waits else 0)
    end.protocol.wrote(1)
    assert len(end.outcomes()) == (1 if waits else 0)
    assert written + end.lines() == spelled
    assert end.protocol.outgoing.idle


@pytest.mark.parametrize("dialect", ["node", "native"])
def test_a_long_message_is_withdrawn(dialect: str) -> None:
    """Spelled and not begun, it is taken apart like any other."""
    end = native() if dialect == "native" else Fed()
    unsent = end.protocol.outgoing.unsent_bytes
    end.protocol.send(b"1")
    long = end.send(b'"%b"' % (b"x" * 100_000))
    end.protocol.send(b"2")
    sent = end.protocol.outgoing.window.bytes_sent
    assert end.protocol.next_stage() is not None
    assert end.protocol.outgoing.withdraw(long)
    assert end.protocol.outgoing.window.bytes_sent == sent
    assert end.protocol.outgoing.unsent_bytes == unsent + 2
    assert end.lines() == (b"[0,1]\n[0,2]\n" if dialect == "native" else b"1\n2\n")


@pytest.mark.parametrize("dialect", ["node", "native"])
def test_a_handle_whose_own_close_raises(dialect: str) -> None:
    """It is delivered; so is what was acknowledged with it."""
    end = native() if dialect == "native" else Fed()
    entry = end.send(b"1", [5])

    def fail() -> None:
        raise OSError("close failed")

    entry.pending.on_delivered = fail
    end.send(b"2", [6])
    end.write()
    for _ in range(2):
        end.feed(
            ACK
            if dialect == "node"
            else b'{"cmd":"NODE_HANDLEIPC","ack":2,"descriptors":8,"bytes":1048576}\n'
        )
        end.write()
    assert end.outcomes() == [("1", None), ("2", None)]
    ((handle, error),) = end.protocol.faults.closes
    assert (handle, str(error)) == ("handle [5]", "close failed")
    assert end.closed == [6]


def test_reading_stops_behind_an_ack_that_does_not_leave() -> None:
    """What waits for our own reply is bounded, too."""
    end = Fed(Limits(node_hard=100, held_hard=120))
    end.feed(node_handle(), [5])
    assert end.protocol.want_read(waiting=False)
    end.feed(b'"%b"\n' % (b"x" * 100))
    assert not end.protocol.want_read(waiting=True)
    assert end.protocol.nobody_reads
    end.write()
    assert end.protocol.want_read(waiting=False)


# -- ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["node", "native"])
def test_eof_brings_handles_back(dialect: str) -> None:
    """Unacknowledged first, then queued, in order; plain messages somebody waits for fail."""
    end = native() if dialect == "native" else Fed()
    for i in range(3):
        end.send(b"%d" % i, [5 + i])
    end.send(b"3")
    end.write()
    end.send(b"4", [9])
    end.protocol.end()
    assert [message for message, reason in end.outcomes() if reason] == ["0", "1", "2"] + (
        ["4"] if dialect == "native" else ["3", "4"]
    )
    assert end.closed == []
    assert end.protocol.outgoing.lost_something
    end.protocol.end()
    assert end.outcomes() == []


def test_eof_with_a_plain_message_half_written() -> None:
    """Who waits for it learns that it did not arrive."""
    end = Fed()
    end.send(b'"long"')
    end.protocol.next_stage()
    end.protocol.wrote(2)
    end.protocol.end()
    assert [message for message, reason in end.outcomes() if reason] == ['"long"']


def test_after_epipe_acknowledgements_are_read() -> None:
    """A write fails, and what the peer had said before is still in the socket."""
    end = native()
    end.send(b"1", [5])
    end.send(b"2", [6])
    end.write()
    end.protocol.wrote(BrokenPipeError())
    assert end.protocol.next_stage() is None
    assert end.protocol.want_read(waiting=False)
    end.feed(b'{"cmd":"NODE_HANDLEIPC","ack":1,"descriptors":9,"bytes":2097152}\n')
    end.protocol.end()
    assert end.closed == [5]
    assert [(m, bool(r)) for m, r in end.outcomes()] == [("1", False), ("2", True)]


def test_eof_before_our_ack_left() -> None:
    """The sender may live and has it back: it is closed. A node peer never takes one back."""
    end = native()
    end.feed(b'[1,2]\n[2,1,1,"x",1]\n[0,"plain"]\n[2,2,1,"x",2]\n', [5, 6])
    end.protocol.end()
    assert sorted(end.closed) == [5, 6]
    assert end.take() == ["plain"]
    end = Fed()
    end.feed(node_handle(), [5])
    end.protocol.end()
    assert end.take() == [(1, Thing(end, "net.Socket", None, [5]))]


def test_eof_of_a_peer_known_to_be_dead() -> None:
    """Nobody can take the handles back: those that arrived whole are given, up to a hole."""
    end = native(Limits(ready=1))
    end.feed(b'[1,3]\n[2,1,1,"x",1]\n[2,2,1,"x",2]\n[2,3,1,"kind",3]\n[0,4]\n', [5, 6, 7])
    end.feed(b'[1,1]\n[2,4,1,"x",5]\n', [], lost=True)
    end.protocol.end(peer_is_dead=True)
    assert [m[0] if isinstance(m, tuple) else m for m in end.take()] == [1, 2, 4]
    assert end.closed == [7]


def test_disconnect_flushes() -> None:
    """What was sent before leaves, its acknowledgements are waited for, then the end is over."""
    end = native()
    end.send(b"1", [5])
    end.protocol.disconnect(9.0)
    end.protocol.disconnect(1.0)
    assert end.protocol.state is State.CLOSING
    assert not end.protocol.finished
    end.write()
    end.feed(b'{"cmd":"NODE_HANDLEIPC","ack":1,"descriptors":9,"bytes":2097152}\n')
    assert end.protocol.finished
    end.protocol.end(politely=True)
    assert end.protocol.ended_here
    assert end.outcomes() == [("1", None)]


@pytest.mark.parametrize("dialect", ["node", "native"])
def test_a_closing_end_refuses(dialect: str) -> None:
    """Handles held and arriving go back to the peer, messages are dropped."""
    end = native(Limits(ready=1)) if dialect == "native" else Fed()
    end.send(b"0", [5])
    end.write()
    if dialect == "native":
        end.feed(b'[1,2]\n[2,1,1,"x",1]\n[2,2,1,"x",2]\n', [6, 7])
        end.write()
        end.protocol.disconnect(9.0)
        end.feed(b'[1,1]\n[2,3,1,"x",3]\n[0,4]\n', [8])
        assert b'"refuse":[[2,2,"closing"]],"ack":3' in end.lines()
        assert end.closed == [7, 8]
        assert [message for message, _ in end.take()] == [1]
    else:
        end.protocol.disconnect(9.0)
        end.feed(node_handle(), [6])
        end.feed(b'"late"\n')
        assert end.lines() == NACK
        assert end.closed == [6]
        assert end.take() == []


def test_a_closing_end_withdraws_its_ask() -> None:
    """The peer would answer for a handle that it has back."""
    end = native()
    end.feed(b'[1,1]\n[2,1,1,"x",1]\n', [], lost=True)
    end.wait()
    assert end.protocol.incoming.lost.ask
    end.protocol.disconnect(9.0)
    lines = end.lines()
    assert b"again" not in lines
    assert b'"refuse":[[1,1,"closing"]]' in lines


def test_a_closing_end_sends_the_nack_it_delayed() -> None:
    """The peer's queue must not hang on it."""
    end = Fed(slots=0)
    end.feed(node_handle(), [], lost=True)
    end.protocol.disconnect(9.0)
    assert end.lines() == NACK
    assert end.protocol.finished


def test_disconnect_gives_up_in_time() -> None:
    """A peer that never acknowledges cannot hold the end up for ever."""
    end = native()
    end.send(b"1", [5])
    end.protocol.disconnect(2.0)
    end.write()
    end.wait()
    assert end.now == 2.0
    assert "timeout" in end.error
    assert end.outcomes()[0][0] == "1"


def test_abort_towards_a_living_node_peer() -> None:
    """It may own the handle in flight: our copy is closed and reported in doubt."""
    end = Fed()
    end.send(b"1", [5])
    end.write()
    end.send(b"2", [6])
    end.protocol.end(LocalProtocolError("enough"))
    end.protocol.end(LocalProtocolError("again"))
    (first, second) = end.outcomes()
    assert first[1].startswith("in doubt")
    assert not second[1].startswith("in doubt")
    assert end.closed == [5]
    assert end.error == "enough"


def test_abort_of_a_dead_node_peer() -> None:
    """Nothing is in doubt then."""
    end = Fed()
    end.send(b"1", [5])
    end.write()
    end.protocol.end(LocalProtocolError("enough"), peer_is_dead=True)
    assert not end.outcomes()[0][1].startswith("in doubt")


def test_what_comes_after_the_end_is_closed() -> None:
    """No descriptor outlives the channel."""
    end = native()
    end.protocol.end(ChannelClosed("over"))
    end.feed(b'[1,1]\n[2,1,1,"x",1]\n', [5])
    assert end.closed == [5]
    assert not end.protocol.want_read(waiting=True)
    assert end.protocol.deadline is None


# -- reading or not, and time ---------------------------------------------------------------------


def test_reading_from_a_node_peer_pauses() -> None:
    """While nobody takes what comes, unless a local wait needs it, up to the hard limit."""
    end = Fed(Limits(held_bytes=10, held_messages=3, held_hard=4 * MESSAGE_COST + 30))
    protocol = end.protocol
    end.feed(b"1\n2\n3\n")
    assert not protocol.want_read(waiting=False)
    assert protocol.want_read(waiting=True)
    assert not protocol.nobody_reads
    end.feed(b'"%s"\n' % (b"x" * 30))
    assert not protocol.want_read(waiting=True)
    assert protocol.nobody_reads
    end.take()
    assert protocol.want_read(waiting=False)


def test_reading_goes_on_while_a_handle_is_unanswered() -> None:
    """Its reply may be behind what is held; up to a bound of its own."""
    end = Fed(Limits(held_bytes=2, held_hard=2, node_hard=MESSAGE_COST + 20))
    end.send(b"1", [5])
    end.write()
    end.feed(b"100\n")
    assert end.protocol.want_read(waiting=False)
    end.feed(b'"%s"\n' % (b"x" * 20))
    assert not end.protocol.want_read(waiting=False)


def test_a_native_end_always_reads() -> None:
    """What may come is granted, and acknowledgements are among it."""
    end = native(Limits(held_bytes=1))
    end.feed(b'[0,"more than held_bytes"]\n')
    assert end.protocol.want_read(waiting=False)
    end.protocol.disconnect(9.0)
    assert end.protocol.want_read(waiting=False)


@pytest.mark.parametrize("make", [Fed, native], ids=["node", "native"])
def test_half_a_line_may_take_its_time(make: Callable[[], Fed]) -> None:
    """A peer may be stopped for any time in the middle of a line that brought no descriptors."""
    end = make()
    end.feed(b'"half')
    assert end.protocol.deadline is None


def test_half_a_handle_of_a_node_peer() -> None:
    """A Node peer may be stopped with a descriptor on its way, too: one set is all it can pin."""
    end = Fed()
    end.feed(b'{"cmd":"NODE_HANDLE"', [5])
    assert end.protocol.deadline is None
    end.protocol.end()
    assert end.closed == [5]


def test_half_a_set_without_progress() -> None:
    """Descriptors cannot be parked here for ever: not without another byte."""
    end = native()
    end.feed(b'[1,2]\n[2,1,1,"x",1]\n', [5, 6])
    end.take()
    end.wait()
    assert "unfinished" in end.error
    assert end.now == 30.0
    assert end.closed == [6]  # the first is the application's


def test_half_a_set_with_a_byte_now_and_then() -> None:
    """Nor with any number of bytes that do not finish it: ten times as long in all."""
    end = native()
    end.feed(b"[1,2", [5, 6])
    while end.protocol.state is State.OPEN:
        assert end.protocol.deadline <= 300.0
        end.now = min(end.now + 29.0, end.protocol.deadline)
        end.protocol.on_deadline()
        end.feed(b" ")
    assert "unfinished" in end.error
    assert end.now == 300.0
    assert sorted(end.closed) == [5, 6]


def test_one_set_after_the_other() -> None:
    """A busy peer is always in the middle of something: each set has its own time."""
    end = native(Limits(window=100))
    end.feed(b"[1,1", [5])
    for i in range(20):
        end.now += 29.0
        end.feed(b']\n[2,%d,1,"x",1]\n' % (i + 1))
        end.take()
        end.feed(b"[1,1", [6 + i])
    assert end.protocol.state is State.OPEN


def test_deadlines_that_are_not_due() -> None:
    """Being called early does nothing."""
    end = native()
    end.feed(b'[1,1]\n[2,1,1,"x",1]\n"', [], lost=True)
    end.protocol.disconnect(9.0)
    end.protocol.on_deadline()
    assert end.protocol.state is State.CLOSING
    end = Fed(slots=0, inviting=True)
    end.send(b"1", [5], tag="fd", native_only=True)
    end.write()
    end.feed(node_handle(), [], lost=True)
    end.send(b"2", [6])
    end.protocol.on_deadline()
    assert end.protocol.state is State.OPEN


def test_internal_messages_do_not_wait_for_a_reader() -> None:
    """They go to other listeners, so they pass what is held back."""
    end = Fed()
    end.feed(b'1\n{"cmd":"NODE_x"}\n2\n')
    incoming = end.protocol.incoming
    assert [received[0] for received, _ in incoming.deliveries.urgent] == [{"cmd": "NODE_x"}]
    assert [message for message, _ in incoming.ready] == [1, 2]
    assert end.take() == [{"cmd": "NODE_x"}, 1, 2]


def test_a_pending_handle_says_what_it_lacks() -> None:
    """A held object that is closed raises when its descriptors are read."""
    end = native()
    entry = end.send(b"1", [5], read=lambda: [])
    with pytest.raises(DescriptorReleased):
        entry.pending.filenos()


# -- corners --------------------------------------------------------------------------------------


def test_asking_when_it_is_not_time() -> None:
    """With no hole, or an answer due, the timer of asking does nothing."""
    end = native()
    holes = end.protocol.incoming.lost
    assert holes.on_ask_time() is None
    end.feed(b'[1,1]\n[2,1,1,"x",1]\n', [], lost=True)
    end.wait()
    end.lines()
    assert holes.on_ask_time() is None
    assert holes.ask is None


def test_asking_for_a_run_of_holes() -> None:
    """As many as lack the same number of descriptors, behind what was delivered, and a few."""
    end = native(Limits(window=40, ready=1), slots=99)
    end.feed(
        b'[1,2]\n[2,1,1,"x",1]\n[2,2,1,"x",2]\n[0,0]\n[2,3,1,"x",3]\n'.replace(b"1,2]", b"1,3]", 1),
        [5, 6],
        lost=True,
    )
    end.feed(b'[1,2]\n[2,4,2,"x",4]\n', [7, 8])
    end.wait()
    assert b'"again":[3,1]' in end.lines()
    end = native(Limits(window=40))
    end.feed(b"[1,20]\n" + b"".join(b'[2,%d,1,"x",1]\n' % i for i in range(1, 21)), [], lost=True)
    end.wait()
    assert b'"again":[1,16]' in end.lines()


def test_settling_closes_what_can_be_closed() -> None:
    """A handle without a close method is left to the garbage collector."""
    end = native()
    end.protocol.incoming._convert = lambda *_: object()
    end.feed(b'[1,1]\n[2,1,1,"x",1]\n', [5])
    end.protocol.end()
    assert end.take() == []


def test_messages_of_a_closing_end_are_dropped_when_it_fails() -> None:
    """They were dropped before as well."""
    end = native()
    end.protocol.disconnect(9.0)
    end.feed(b"[0,1]\ngarbage\n")
    assert end.take() == []


def test_water_marks() -> None:
    """Above from the high mark on, until at the low one; bytes and handles alike."""
    limits = Limits(
        high_water_bytes=100, low_water_bytes=10, high_water_handles=4, low_water_handles=1
    )
    end = native(limits)
    outgoing = end.protocol.outgoing
    assert not outgoing.is_above_water
    end.protocol.send(b'"%s"' % (b"x" * 100))
    assert outgoing.is_above_water
    end.protocol.next_stage()
    end.protocol.wrote(50)
    assert outgoing.unsent_bytes > 10
    assert outgoing.is_above_water
    end.write()
    assert not outgoing.is_above_water
    for i in range(4):
        end.send(b"1", [5 + i])
    assert outgoing.is_above_water
    assert outgoing.waiting_descriptors == 4
    end.write()
    assert outgoing.is_above_water
    end.feed(b'{"cmd":"NODE_HANDLEIPC","ack":3,"descriptors":9,"bytes":2097152}\n')
    assert not outgoing.is_above_water


def test_a_retransmission_no_larger_than_the_kernel_takes() -> None:
    """What does not fit into one write comes in the next."""
    end = native(Limits(set_size=253))
    end.feed(b'{"cmd":"NODE_HANDLEIPC","ack":0,"descriptors":999,"bytes":1048576}\n')
    end.send(b"1", list(range(10, 210)))
    end.send(b"2", list(range(300, 400)))
    end.write()
    end.feed(b'{"cmd":"NODE_HANDLEIPC","again":[1,2]}\n')
    assert [len(fds) for _, fds in end.write()] == [200, 100]


@pytest.mark.parametrize("dialect", ["node", "native"])
def test_a_retransmission_parked_and_sent(dialect: str) -> None:
    """Refused for a while, it is spelled again and goes, in either dialect."""
    end = native() if dialect == "native" else Fed()
    end.send(b"1", [5])
    end.write()
    end.feed(NACK if dialect == "node" else b'{"cmd":"NODE_HANDLEIPC","again":[1,1]}\n')
    if dialect == "node":
        end.wait()
    assert end.protocol.next_stage().fds == [5]
    end.protocol.wrote(Refused.IN_FLIGHT)
    end.wait()
    assert [fds for _, fds in end.write()] == [[5]]


@pytest.mark.parametrize("dialect", ["node", "native"])
def test_a_message_made_late(dialect: str) -> None:
    """It is made when it is spelled, again if that did not leave, and ends once."""
    end = native() if dialect == "native" else Fed()
    made: list[int] = []
    ended: list[bool] = []

    def make() -> bytes:
        made.append(len(made))
        return b"%d" % made[-1]

    end.protocol.send(b'"first"')
    end.protocol.send(Late(make, lambda: ended.append(True)))
    assert not made
    entry = end.send(b'"last"')
    assert b"0" in end.protocol.next_stage().data
    assert end.protocol.outgoing.withdraw(entry)
    lines = end.lines()
    assert b"first" in lines
    assert b"1" in lines
    assert b"last" not in lines
    assert ended == [True]
    end.protocol.send(Late(make, lambda: ended.append(True)))
    end.protocol.end()
    assert ended == [True, True]


def test_the_kernel_takes_control_in_parts() -> None:
    """Only the whole of a control line counts as said."""
    end = native()
    end.feed(b'[1,1]\n[2,1,1,"x",1]\n', [5])
    assert [len(data) for data, _ in end.write(limit=10)][-1] <= 10
    assert [message for message, _ in end.take()] == [1]


def test_control_that_could_not_be_said_is_no_loss() -> None:
    """A ``flush`` fails for what was sent, not for a grant that nobody reads any more."""
    end = native()
    end.feed(b'[1,1]\n[2,1,1,"x",1]\n', [5])
    assert end.protocol.next_stage().is_control
    assert not end.protocol.outgoing.idle
    end.protocol.end()
    assert not end.protocol.outgoing.lost_something


def test_an_acknowledgement_of_what_is_parked() -> None:
    """A handle numbered, and not begun, cannot be acknowledged; those before it come back."""
    end = native()
    end.send(b"1", [5])
    end.write()
    end.send(b"2", [6])
    assert end.protocol.next_stage() is not None
    end.feed(b'{"cmd":"NODE_HANDLEIPC","ack":2,"descriptors":99,"bytes":99999999}\n')
    assert "which it does not have" in str(end.protocol.error)
    assert [message for message, reason in end.outcomes() if reason] == ["1", "2"]


def test_a_success_that_nobody_waits_for() -> None:
    """It leaves no outcome; a failure does."""
    end = native()
    for message in (b"1", b"2"):
        end.send(message, [5]).waiter = None
    end.write()
    end.feed(b'{"cmd":"NODE_HANDLEIPC","ack":1,"descriptors":99,"bytes":99999999}\n')
    assert end.outcomes() == []
    end.protocol.end()
    assert [message for message, _ in end.outcomes()] == ["2"]


def test_a_run_whose_kind_is_known() -> None:
    """Handles of a run are made without a question about each; all others are asked about."""
    asked: list[object] = []

    def maker(tag: str, options: object) -> Callable[[int], object] | None:
        asked.append((tag, options))
        return (lambda fd: f"made {fd}") if tag == "x" else None

    end = native(maker=maker)
    end.feed(b'[4,1,"x",[1,{"cmd":"NODE_x"}],{"key":"k"}]\n', [5, 6])
    end.feed(b'[4,3,"y",[3,4]]\n', [7, 8])
    end.feed(b'[1,1]\n[2,5,1,"x",5]\n', [9])
    assert end.take() == [
        ({"cmd": "NODE_x"}, "made 6"),
        (1, "made 5"),
        (3, Thing(end, "y", None, [7])),
        (4, Thing(end, "y", None, [8])),
        (5, Thing(end, "x", None, [9])),
    ]
    assert asked == [("x", {"key": "k"}), ("y", None)]
    assert not end.protocol.incoming.held


def test_what_comes_while_closing_is_dropped() -> None:
    """What had arrived before stays readable, also behind a handle that lacks its descriptors."""
    end = native()
    end.feed(b'[1,1]\n[2,1,1,"x",1]\n[0,"held"]\n', [], lost=True)
    assert end.protocol.incoming.held
    end.protocol.disconnect(9)
    end.feed(b'[0,"late"]\n')
    end.protocol.end()
    assert end.take() == ["held"]


def test_what_is_held_when_a_dead_peer_had_disconnected() -> None:
    """The same where no turn came between the last line and the end."""
    end = native()
    end.feed(b'[1,1]\n[2,1,1,"x",1]\n[0,"held"]\n', [], lost=True)
    end.protocol.incoming.closing = True
    end.protocol.end(peer_is_dead=True)
    assert end.take() == []
