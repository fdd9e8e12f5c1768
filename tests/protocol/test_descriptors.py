"""Descriptors are what is scarce: the protocol counts them, in both directions and dialects."""

from __future__ import annotations

from collections import deque

import pytest

from handleipc.exceptions import DescriptorReleased
from handleipc.handles.refusal import Refusal
from handleipc.limits import Invitation, Limits
from handleipc.protocol.channel import State
from handleipc.wire.syscalls import Refused
from tests.protocol_pair import INVITED, SWITCH, Fed, Thing, exchange, native

NODE_HANDLE = b'{"cmd":"NODE_HANDLE","type":"net.Socket","msg":%d}\n'
ACK = b'{"cmd":"NODE_HANDLE_ACK"}\n'
NACK = b'{"cmd":"NODE_HANDLE_NACK"}\n'


def control(**fields: object) -> bytes:
    """Return a control line of the peer's."""
    spelled = ",".join(f'"{name}":{value}' for name, value in fields.items())
    return b'{"cmd":"NODE_HANDLEIPC",%b}\n' % spelled.encode().replace(b"'", b'"')


def ack(number: int, descriptors: int) -> bytes:
    """Return the acknowledgement of the peer that grants so many descriptors."""
    return control(ack=number, descriptors=descriptors, bytes=1 << 20)


def again(first: int, count: int) -> bytes:
    """Return the peer's asking for handles again."""
    return control(again=[first, count])


def fds_of(written: list[tuple[bytes, list[int]]]) -> list[list[int]]:
    return [fds for _, fds in written if fds]


# -- sending: the peer's grant ----------------------------------------------------------------------


def test_a_grant_counts_descriptors() -> None:
    """Of 8 granted, two handles of 3 take 6, and the next waits for the acknowledgement of one."""
    end = native()
    for first in (10, 20, 30):
        end.send(b"%d" % first, [first, first + 1, first + 2])
    assert fds_of(end.write()) == [[10, 11, 12, 20, 21, 22]]
    assert end.protocol.outgoing.waiting_descriptors == 9
    end.feed(ack(1, 11))
    assert fds_of(end.write()) == [[30, 31, 32]]
    end.feed(ack(3, 17))
    assert end.protocol.outgoing.waiting_descriptors == 0


def test_a_handle_larger_than_the_window_leaves_alone() -> None:
    """When nothing of this direction is unacknowledged, and nothing goes beside it."""
    end = native()
    end.send(b"1", [5])
    end.send(b"2", list(range(10, 40)))
    end.send(b"3", [6])
    assert fds_of(end.write()) == [[5]]
    end.feed(ack(1, 9))
    assert fds_of(end.write()) == [list(range(10, 40))]
    # Far beyond the grant: what comes next waits until the peer has caught up.
    end.feed(ack(1, 9))
    assert fds_of(end.write()) == []
    end.feed(ack(2, 39))
    assert fds_of(end.write()) == [[6]]


def test_a_larger_handle_when_the_peer_lost_some() -> None:
    """A window that a loss has halved still lets one of any size through."""
    a = Fed(Limits(window=8), inviting=True)
    b = Fed(Limits(window=8), invited_by=Invitation(8, 1 << 20))
    exchange(a, b)
    a.send(b"1", [5])
    ((data, fds),) = a.write()
    b.slots = 0
    b.feed(data, [], lost=True)
    exchange(a, b)
    b.slots = 99
    b.wait()
    a.send(b"2", list(range(10, 18)))
    exchange(a, b)
    assert a.outcomes() == [("1", None), ("2", None)]
    b.take()
    assert b.protocol.state is a.protocol.state is State.OPEN


def test_a_larger_handle_behind_half_a_control_line() -> None:
    """The acknowledgement that lets it leave arrives in pieces, and so does the handle."""
    a = Fed(Limits(window=2), inviting=True)
    b = Fed(Limits(window=2), invited_by=Invitation(2, 1 << 20))
    exchange(a, b)
    for n in range(1, 6):
        a.send(b"%d" % n, list(range(10 * n, 10 * n + (1, 7)[n % 2])))
    got: list[object] = []
    incoming = b.protocol.incoming
    for _ in range(200):
        for source, target in ((a, b), (b, a)):
            stage = source.protocol.next_stage()
            if stage is not None:
                data = bytes(stage.data)[stage.offset : stage.offset + 11]
                fds = list(stage.fds)
                source.protocol.wrote(len(data))
                target.feed(data, fds)
        while incoming.ready:
            got.append(incoming.deliveries.take()[0])
            incoming.pump()
    assert got == [1, 2, 3, 4, 5]
    assert a.protocol.error is b.protocol.error is None


def test_a_closed_handle_does_not_let_others_through_in_its_place() -> None:
    """A larger one may leave alone; if it was closed meanwhile, the grant holds for the next."""
    end = Fed(Limits(window=8), invited_by=Invitation(1, 1 << 20))

    def closed() -> list[int]:
        raise DescriptorReleased("closed")

    end.send(b"1", [5, 6, 7, 8, 9], read=closed)
    end.send(b"2", [10, 11])
    end.send(b"3", [12, 13])
    assert fds_of(end.write()) == [[10, 11]]
    assert end.outcomes() == [("1", "closed")]


def test_no_descriptor_leaves_beyond_the_budget_of_the_process() -> None:
    """It counts descriptors too; one handle of any size may leave when none of ours is out."""
    end = native(Limits(in_flight=4))
    end.send(b"1", list(range(10, 16)))
    end.send(b"2", [5])
    assert fds_of(end.write()) == [list(range(10, 16))]
    assert end.protocol._system.in_flight.total == 6
    end.feed(ack(1, 14))
    assert fds_of(end.write()) == [[5]]


# -- sending: what the peer asks for again ----------------------------------------------------------


def asked_again(count: int = 1) -> Fed:
    """Return an end that has answered once, to a peer that reads nothing."""
    end = native()
    for i in range(count):
        end.send(b"%d" % i, [5 + i])
    end.write()
    end.feed(again(1, 1))
    assert fds_of(end.write()) == [[5]]
    end.protocol.hooks.peer_has_read = lambda: False
    return end


def test_one_answer_at_a_time() -> None:
    """A peer that asks on and on, and reads nothing, pins one answer; data goes on meanwhile."""
    end = asked_again()
    end.feed(again(1, 1))
    end.send(b'"data"')
    assert end.write() == [(b'[0,"data"]\n', [])]
    for _ in range(3):
        before = end.now
        end.wait()
        assert end.now == before + Limits().in_flight_delay_max
        assert end.write() == []
    end.protocol.hooks.peer_has_read = lambda: True
    end.wait()
    assert end.write() == [(b"[1,1]\n[3,1,1]\n", [5])]
    assert end.protocol.deadline is None


@pytest.mark.parametrize("how", ["acknowledged", "refused"])
def test_whoever_ends_a_handle_has_read_its_answer(how: str) -> None:
    """Then the next answer leaves at once, and what was asked of the first is forgotten."""
    end = asked_again(2)
    end.feed(ack(1, 9) if how == "acknowledged" else control(refuse='[[1,1,"kind"]]'))
    end.feed(again(2, 1))
    assert fds_of(end.write()) == [[6]]
    assert list(end.protocol.outgoing.window.resends._asks) == [2]


class Unsearched(deque[int]):
    """A deque in which nobody may look for anything."""

    def remove(self, value: int) -> None:
        raise AssertionError("searched")

    def __contains__(self, value: object) -> bool:
        raise AssertionError("searched")


def test_acknowledging_what_was_asked_for_is_linear() -> None:
    """Nothing is searched for each handle: thousands asked for again cost their number."""
    end = native(Limits(window=1000))
    end.feed(ack(0, 1000))
    for i in range(900):
        end.send(b"%d" % i, [5])
    end.write()
    window = end.protocol.outgoing.window
    window.resends._order = Unsearched()
    end.feed(again(1, 900))
    for number in range(1, 901):
        end.feed(ack(number, 1000 + number))
    assert len(end.outcomes()) == 900
    assert not window.resends.due
    assert end.write() == []


# -- receiving: what can never be taken -------------------------------------------------------------


def check_never(tag: str, count: int) -> object:
    return Refusal("type", f"never {tag}") if tag == "never" or count > 3 else None


@pytest.mark.parametrize("line", [b'[2,2,1,"never",2]\n', b'[2,2,4,"x",2]\n'])
def test_what_can_never_be_taken_is_refused_on_arrival(line: bytes) -> None:
    """An unknown tag or a wrong number holds no descriptor, also behind a handle that waits."""
    end = native(reads=False, check=check_never)
    end.feed(b'[1,1]\n[2,1,1,"x",1]\n', [5])
    count = 4 if b",4," in line else 1
    fds = list(range(6, 6 + count))
    end.feed(b"[1,%d]\n" % count + line + b"[0,3]\n", fds)
    assert end.closed == fds
    assert b'"refuse":[[2,1,"type"]],"ack":0' in end.lines()
    assert "never" in str(end.protocol.faults.errors[0])
    end.protocol.incoming.deliveries.pace = 8
    assert [item if isinstance(item, int) else item[0] for item in end.take()] == [1, 3]


def test_behind_a_hole_such_a_handle_is_refused_once() -> None:
    """It is no hole of its own: nobody asks for what will be refused."""
    end = native(check=check_never)
    end.feed(b'[1,2]\n[2,1,1,"x",1]\n[2,2,1,"never",2]\n', [], lost=True)
    end.wait()
    lines = end.lines()
    assert b'"refuse":[[2,1,"type"]]' in lines
    assert b'"again":[1,1]' in lines
    end.feed(b"[1,1]\n[3,1,1]\n", [5])
    assert end.take() == [(1, Thing(end, "x", None, [5]))]
    assert end.protocol.outgoing.idle


def test_larger_than_what_may_wait() -> None:
    """A handle with more descriptors than ``ready`` is given when nothing else is untaken."""
    end = native(Limits(window=8, ready=2))
    end.feed(b'[1,7]\n[2,1,1,"x",1]\n[2,2,5,"x",2]\n[2,3,1,"x",3]\n', [1, 2, 3, 4, 5, 6, 7])
    assert b'"ack":1,' in end.lines()
    assert [message for message, _ in end.take()] == [1, 2, 3]


def test_a_closed_handle_of_the_node_dialect_comes_back() -> None:
    """It is read when it is to leave; what is behind it does."""
    end = Fed()
    end.send(b"1", [5], read=lambda: [-1])
    end.send(b"2", [6])
    assert fds_of(end.write()) == [[6]]
    assert [message for message, _ in end.outcomes()] == ["1"]
    assert end.protocol._system.in_flight.total == 1


# -- receiving: the node dialect --------------------------------------------------------------------


def test_a_node_peer_is_acknowledged_at_arrival() -> None:
    """Whoever reads or not, as Node does, up to a window."""
    end = Fed(Limits(window=2), reads=False)
    for n in (1, 2):
        end.feed(NODE_HANDLE % n, [4 + n])
        assert end.lines() == ACK
    end.feed(NODE_HANDLE % 3, [7])
    end.feed(b"4\n")
    assert end.lines() == b""
    assert end.protocol.want_read(waiting=False)
    assert [m if isinstance(m, int) else m[0] for m in end.take()] == [1, 2, 3, 4]
    assert end.outbox == [(ACK, [])]
    assert end.protocol.incoming.settled


def test_a_listener_takes_more_than_a_window() -> None:
    """Nothing waits then."""
    end = Fed(Limits(window=1), reads=False)
    end.protocol.incoming.deliveries.takes_all = True
    for n in (1, 2, 3):
        end.feed(NODE_HANDLE % n, [4 + n])
        assert end.lines() == ACK


def test_an_ack_that_waits_becomes_a_nack_when_this_end_disconnects() -> None:
    """The handle goes back; messages behind it had arrived, and stay readable."""
    end = Fed(Limits(window=1), reads=False)
    end.feed(NODE_HANDLE % 1, [5])
    end.feed(NODE_HANDLE % 2, [6])
    end.feed(b"3\n")
    assert end.lines() == ACK
    end.protocol.disconnect(9.0)
    assert end.lines() == NACK
    assert end.closed == [6]
    assert [m if isinstance(m, int) else m[0] for m in end.take()] == [1, 3]
    assert end.protocol.finished


def test_an_ack_that_waits_when_the_peer_has_gone() -> None:
    """A Node peer takes nothing back: what arrived whole is given."""
    end = Fed(Limits(window=1), reads=False)
    end.feed(NODE_HANDLE % 1, [5])
    end.feed(NODE_HANDLE % 2, [6])
    end.write()
    end.protocol.end()
    assert [message for message, _ in end.take()] == [1, 2]


def test_a_node_peer_hears_of_a_lost_descriptor_at_once() -> None:
    """If there is a free slot, the next try may succeed."""
    end = Fed()
    end.feed(NODE_HANDLE % 1, [], lost=True)
    assert end.lines() == NACK
    assert "a descriptor was lost" in str(end.protocol.faults.errors[0])


def test_an_outage_of_many_handles_has_one_clock() -> None:
    """All that are lost in it are given up when ``retry_time`` has passed since the first."""
    end = native(Limits(window=20, retry_time=5.0), slots=0)
    end.feed(b"[1,9]\n" + b"".join(b'[2,%d,1,"x",1]\n' % n for n in range(1, 10)), [], lost=True)
    refused = b""
    while b'"ack":9' not in refused:
        end.wait()
        refused += end.lines()
    assert refused.count(b'"descriptors"') >= 9
    # Not five seconds for each, but one pause.
    assert end.now < 5.0 + 9 * 2 * Limits().ask_delay_max


def test_an_outage_that_is_over_is_forgotten() -> None:
    """Once a hole was filled, the next one has its whole time."""
    end = native(Limits(window=20, retry_time=5.0), slots=0)
    end.feed(b'[1,2]\n[2,1,1,"x",1]\n[2,2,1,"x",2]\n', [], lost=True)
    while end.now < 4.0:
        end.wait()
    end.slots = 1
    end.wait()
    assert b'"again":[1,1]' in end.lines()
    end.slots = 0
    end.feed(b"[1,1]\n[3,1,1]\n", [5])
    start = end.now
    while b'"refuse":[[2,1,"descriptors"]]' not in end.lines():
        end.wait()
    assert end.now >= start + 5.0


def test_an_answer_for_a_handle_that_was_given_up() -> None:
    """Its descriptors are closed, and the hole is asked for again."""
    end = native()
    end.feed(b'[1,2]\n[2,1,1,"x",1]\n[2,2,1,"x",2]\n', [], lost=True)
    end.wait()
    assert b'"again":[1,2]' in end.lines()
    end.feed(b"[1,2]\n[3,2,1]\n[3,1,1]\n", [6, 5])
    assert end.closed == [6]
    end.wait()
    assert b'"again":[2,1]' in end.lines()
    end.feed(b"[1,1]\n[3,2,1]\n", [7])
    assert end.take() == [
        (1, Thing(end, "x", None, [5])),
        (2, Thing(end, "x", None, [7])),
    ]


# -- a kernel without memory ------------------------------------------------------------------------


def refuse_memory(end: Fed, most: int = 0) -> list[list[int]]:
    """Write what may leave to a kernel with memory for ``most`` descriptors at once."""
    sent = []
    while (stage := end.protocol.next_stage()) is not None:
        if len(stage.fds) > most:
            assert end.protocol.wrote(Refused.NO_MEMORY) is None
        else:
            sent.append(stage.fds)
            end.protocol.wrote(len(stage.data) - stage.offset)
    return [fds for fds in sent if fds]


def test_a_shortage_of_memory_is_waited_out() -> None:
    """It passes like too many in flight; the time begins anew with each write that succeeds."""
    end = native(Limits(retry_time=5.0))
    for number in (1, 2):
        end.send(b"%d" % number, [5, 6])
        start = end.now
        while end.now < start + 4.5:
            assert refuse_memory(end) == []
            end.wait()
        assert refuse_memory(end, 2) == [[5, 6]]
        end.feed(ack(number, 20))
        assert end.outcomes() == [(str(number), None)]


def test_a_set_that_never_fits_is_split() -> None:
    """Each handle leaves alone then; one that does not fit alone comes back, and others go on."""
    end = native(Limits(retry_time=5.0))
    for message, fds in ((b"1", [5]), (b"2", [6, 7, 8]), (b"3", [9])):
        end.send(message, fds)
    sent = refuse_memory(end, 2)
    while end.protocol.deadline is not None:
        end.wait()
        sent += refuse_memory(end, 2)
    assert sent == [[5], [9]]
    assert end.now >= 5.0
    assert end.outcomes() == [("2", "the kernel has no memory for so many descriptors at once")]


@pytest.mark.parametrize("begun", [False, True])
def test_nothing_to_split(begun: bool) -> None:
    """Bytes alone, or the rest of a stage whose descriptors have left: the write has failed."""
    end = native(Limits(retry_time=5.0))
    end.send(b'"plain"', [5] if begun else None)
    stage = end.protocol.next_stage()
    assert stage is not None
    if begun:
        end.protocol.wrote(3)
    while end.protocol.wrote(Refused.NO_MEMORY) is None:
        end.wait()
        stage = end.protocol.next_stage()
        assert stage is not None
    assert end.now >= 5.0


def test_too_many_in_flight_of_a_control_line() -> None:
    """It carries none, so it is never put aside."""
    end = native()
    end.feed(b'[1,1]\n[2,1,1,"x",1]\n', [5])
    stage = end.protocol.next_stage()
    assert stage is not None
    assert end.protocol.wrote(Refused.NO_MEMORY) is None
    assert end.protocol.next_stage() is stage
    end.wait()
    assert b'"ack":1' in end.lines()


# -- ends -------------------------------------------------------------------------------------------


ENDERS = {
    "eof": lambda end: end.protocol.end(),
    "finish": lambda end: end.protocol.end(politely=True),
    "abort": lambda end: end.protocol.end(DescriptorReleased("any error")),
    "a fault of the peer": lambda end: end.feed(b"garbage\n"),
    "an unfinished set": lambda end: (end.feed(b"[1,1", [9]), end.wait()),
}


@pytest.mark.parametrize("how", ENDERS)
def test_the_reading_side_is_shut_before_anything_is_settled(how: str) -> None:
    """Whoever ends it, once: an acknowledgement that comes later must fail at the peer."""
    end = native(reads=False)
    end.send(b"1", [5])
    end.write()
    end.feed(b'[1,1]\n[2,1,1,"x",1]\n', [6])
    seen: list[tuple[int, list[int], State]] = []

    def note() -> None:
        outgoing = end.protocol.outgoing
        seen.append((len(outgoing.outcomes), list(end.closed), end.protocol.state))

    end.protocol.hooks.settling = note
    ENDERS[how](end)
    assert seen == [(0, [], State.CLOSED)]
    assert len(end.outcomes()) == 1
    assert 6 in end.closed
    for again_how in ("eof", "abort"):
        ENDERS[again_how](end)
    assert len(seen) == 1


@pytest.mark.parametrize(("is_dead", "doubtful"), [(False, True), (True, False)])
@pytest.mark.parametrize("dialect", ["node", "native"])
def test_what_was_left_could_not_be_read(dialect: str, is_dead: bool, doubtful: bool) -> None:
    """All that has left may be a living peer's: in doubt. What has not left comes back."""
    end = native() if dialect == "native" else Fed()
    end.send(b"1", [5])
    end.write()
    end.send(b"2", [6])
    assert (end.protocol.next_stage() is not None) is (dialect == "native")
    end.protocol.end(DescriptorReleased("why"), unread=True, peer_is_dead=is_dead)
    first, second = end.outcomes()
    assert first == ("1", "in doubt: why" if doubtful else "why")
    assert second == ("2", "why")
    assert end.closed == ([5] if doubtful else [])


def test_a_deaf_end_closes_what_comes_and_doubts_what_it_sent() -> None:
    """What the peer said next cannot be understood any more, so no acknowledgement is known."""
    end = native()
    end.send(b"1", [5])
    end.write()
    end.protocol.is_deaf = True
    end.feed(ack(1, 9))
    end.feed(b'[1,1]\n[2,1,1,"x",1]\n', [6])
    assert end.closed == [6]
    end.protocol.end(DescriptorReleased("why"))
    assert end.outcomes() == [("1", "in doubt: why")]


def test_the_first_reason_to_give_up_counts() -> None:
    """Nothing leaves any more; a timeout that comes meanwhile changes no word of it."""
    end = native()
    fds = [5]
    end.send(b"1", [5], read=lambda: fds)
    end.write()
    fds[0] = -1
    protocol = end.protocol
    protocol.disconnect(2.0)
    end.feed(again(1, 1))
    end.protocol.next_stage()
    assert "closed while the peer asked" in str(protocol.give_up)
    end.send(b"2")
    assert protocol.next_stage() is None
    end.now = 3.0
    protocol.on_deadline()
    assert "closed while the peer asked" in str(protocol.give_up)


def test_an_end_that_has_hung_up_is_read_to_its_end() -> None:
    """What is left is finite then, however much waits here already."""
    end = Fed(Limits(held_bytes=1, node_hard=1))
    end.feed(b'"more than a byte"\n')
    assert not end.protocol.want_read(waiting=False)
    assert end.protocol.want_read(waiting=False, is_finite=True)


def test_what_was_withdrawn_ends_once() -> None:
    """It leaves a hole in the queue, which the end of the channel passes over."""
    end = Fed()
    end.send(b"1", [5])
    end.write()
    queued = [end.send(message) for message in (b"2", b"3", b"4")]
    assert end.protocol.outgoing.withdraw(queued[1])
    end.protocol.end()
    assert [message for message, _ in end.outcomes()] == ["1", "2", "4"]


def test_the_peer_of_an_invited_end_may_take_more() -> None:
    """The invitation is the first grant; the switch line of the peer is the next."""
    end = Fed(invited_by=INVITED)
    end.send(b"1", list(range(10, 17)))
    end.send(b"2", [5, 6])
    assert fds_of(end.write()) == [list(range(10, 17))]
    end.feed(SWITCH.replace(b'"descriptors":8', b'"descriptors":9'))
    assert fds_of(end.write()) == [[5, 6]]
