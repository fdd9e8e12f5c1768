"""What waits for what: an end that waits for its peer, handles that wait for a reader, and both."""

from __future__ import annotations

import pytest

from handleipc.handles.refusal import Refusal
from handleipc.limits import Invitation, Limits
from handleipc.protocol.deliveries import MESSAGE_COST
from handleipc.protocol.timers import Timer
from tests.protocol_pair import INVITED, SWITCH, Fed, Thing, exchange, native, take_one

NODE_HANDLE = b'{"cmd":"NODE_HANDLE","type":"net.Socket","msg":%d}\n'
ACK = b'{"cmd":"NODE_HANDLE_ACK"}\n'
INTERNAL = b'[0,{"cmd":"NODE_x","n":%d}]\n'


def unread(limits: Limits | None = None, handles: int = 3) -> Fed:
    """Return a native end that nobody reads, with handles of the peer that wait for a reader."""
    end = native(limits, reads=False)
    lines = b"".join(b'[2,%d,1,"x",%d]\n' % (n, n) for n in range(1, handles + 1))
    end.feed(b"[1,%d]\n" % handles + lines, list(range(1, handles + 1)))
    return end


def turn(end: Fed, *, for_peer: bool = False, for_kernel: bool = False) -> bytes:
    """A turn of the loop: write, say what is waited for, and write again if that lets more go."""
    written = end.lines()
    if end.protocol.watch_waits(for_peer=for_peer, for_kernel=for_kernel):
        end.protocol.incoming.pump()
    return written + end.lines()


# -- what is waited for -----------------------------------------------------------------------------


def test_nothing_is_acknowledged_while_nobody_reads_and_nobody_waits() -> None:
    """The handles are the peer's until somebody comes who takes them."""
    end = unread()
    assert turn(end) == b""
    assert not end.protocol.incoming.ready
    assert end.protocol.incoming.cost > 3 * MESSAGE_COST
    end.protocol.incoming.deliveries.reader_came()
    assert [message for message, _ in end.take()] == [1, 2, 3]


def test_a_wait_for_the_peer_acknowledges_up_to_ready() -> None:
    """Who waits for an acknowledgement, a flush or a drain gives as it wants to be given."""
    end = unread(Limits(window=8, ready=2, retry_time=5.0))
    end.send(b"1", [5])
    assert b'"ack":2' in turn(end, for_peer=True)
    assert turn(end, for_peer=True) == b""


def test_a_wait_that_depends_on_nothing_earns_nothing() -> None:
    """A flush of plain messages alone ends with the kernel; so does a line that it must take."""
    end = unread()
    end.send(b'"plain"')
    assert b"ack" not in turn(end, for_peer=True, for_kernel=True)
    end.send(b"1", [5])
    assert b"ack" not in turn(end, for_kernel=True)  # the handle has left, and nothing is behind it


def test_a_line_behind_a_handle_depends_on_the_peer() -> None:
    """It cannot leave before the peer has taken a handle: it is not just the kernel's to take."""
    end = unread()
    for n in range(9):  # one more than granted
        end.send(b"%d" % n, [20 + n])
    end.send(b'"plain"')
    assert b'"ack":3' in turn(end, for_kernel=True)


def test_in_the_node_dialect_too() -> None:
    """One handle is unanswered, and the line is behind it."""
    end = Fed(Limits(window=1, retry_time=5.0), reads=False)
    for n in (1, 2):
        end.feed(NODE_HANDLE % n, [n])
    end.send(b"1", [5])
    end.send(b'"plain"')
    end.write()
    assert turn(end, for_kernel=True) == b""
    end.wait()
    assert end.protocol.waits.nobody_takes


# -- nobody takes -----------------------------------------------------------------------------------


def blocked() -> Fed:
    """Return an end that waits for a peer which waits for us to take what is acknowledged."""
    end = unread(Limits(window=8, ready=2, retry_time=5.0))
    end.send(b"1", [5])
    for _ in range(2):
        turn(end, for_peer=True)
    return end


def test_two_ends_that_never_read_do_not_wait_for_ever() -> None:
    """After ``retry_time`` without progress the waiter is told that nobody reads."""
    end = blocked()
    assert end.protocol.deadline == 5.0
    end.now = 4.9
    end.protocol.on_deadline()
    turn(end, for_peer=True)
    assert not end.protocol.nobody_reads
    end.wait()
    assert end.now == 5.0
    assert end.protocol.nobody_reads
    turn(end)  # the waiter has been told
    assert not end.protocol.nobody_reads
    assert end.protocol.deadline is None


@pytest.mark.parametrize("progress", ["acknowledged", "taken"])
def test_progress_begins_the_time_anew(progress: str) -> None:
    """Whoever goes on, if slowly, is not told that nobody reads."""
    end = blocked()
    end.send(b"2", [6])
    turn(end, for_peer=True)
    end.now = 4.0
    if progress == "acknowledged":
        end.feed(b'{"cmd":"NODE_HANDLEIPC","ack":1,"descriptors":9,"bytes":1048576}\n')
    else:
        end.feed(b'[1,1]\n[2,4,1,"x",4]\n', [4])
        take_one(end.protocol.incoming.deliveries)
    turn(end, for_peer=True)
    assert end.protocol.deadline == 9.0


def test_nobody_is_told_while_everything_is_taken() -> None:
    """A hole at the head waits for descriptors, not for a reader."""
    end = native(Limits(retry_time=5.0), reads=False)
    end.send(b"1", [5])
    end.feed(b'[1,2]\n[2,1,1,"x",1]\n[2,2,1,"x",2]\n', [6], lost=True)
    turn(end, for_peer=True)
    assert end.protocol.incoming.deliveries.waiting_descriptors == 1
    assert end.protocol.incoming.held
    end.protocol.timers.stop(Timer.ASK)
    turn(end, for_peer=True)
    assert end.protocol.deadline is None


def test_the_end_of_the_channel_ends_the_time() -> None:
    """Whoever waits then learns why it ended."""
    end = blocked()
    end.protocol.end()
    assert end.protocol.deadline is None


# -- what overtakes ---------------------------------------------------------------------------------


def listening(lines: bytes, fds: list[int], **options: bool) -> tuple[Fed, list[object]]:
    """Feed an end that nobody reads but a listener for internal messages; return what it got."""
    end = native(reads=False)
    end.protocol.incoming.listens_internal = True
    end.feed(lines, fds, **options)
    end.write()
    urgent = end.protocol.incoming.deliveries.urgent
    got = []
    while urgent:
        message, handle = take_one(end.protocol.incoming.deliveries)
        got.append((message["n"], handle) if handle else message["n"])
    return end, got


def test_internal_messages_overtake_a_handle_that_lacks_a_reader() -> None:
    """It is the sender's still, who counts it; plain messages keep their place."""
    end, got = listening(b'[1,1]\n[2,1,1,"x",1]\n[0,2]\n' + INTERNAL % 1 + INTERNAL % 2, [5])
    assert got == [1, 2]
    end.protocol.incoming.deliveries.reader_came()
    assert end.take() == [(1, Thing(end, "x", None, [5])), 2]


def test_internal_messages_do_not_overtake_a_hole() -> None:
    """Its handle may be one that they speak of."""
    end, got = listening(b'[1,1]\n[2,1,1,"x",1]\n' + INTERNAL % 1, [], lost=True)
    assert got == []
    end.wait()
    end.write()
    end.feed(b"[1,1]\n[3,1,1]\n", [5])
    end.protocol.incoming.deliveries.reader_came()
    # From then on it is ours, and counted; who takes which first is theirs to say.
    assert end.take() == [{"cmd": "NODE_x", "n": 1}, (1, Thing(end, "x", None, [5]))]


def test_internal_messages_keep_their_place_behind_a_refused_handle() -> None:
    """It is gone in the same turn, and they are there."""
    end = native(reads=False, check=lambda tag, count: Refusal("type", "never"))
    end.protocol.incoming.listens_internal = True
    end.feed(b'[1,1]\n[2,1,1,"x",1]\n' + INTERNAL % 1, [5])
    assert b'"refuse":[[1,1,"type"]],"ack":1' in end.lines()
    assert take_one(end.protocol.incoming.deliveries)[0] == {"cmd": "NODE_x", "n": 1}


def test_internal_messages_do_not_overtake_each_other() -> None:
    """Nor an internal handle that waits; without a listener none overtakes."""
    end = native(reads=False)
    end.feed(b'[1,1]\n[2,1,1,"x",1]\n', [5])
    end.feed(INTERNAL % 1)
    assert not end.protocol.incoming.deliveries.urgent
    end.protocol.incoming.listens_internal = True
    end.feed(INTERNAL % 2)
    assert not end.protocol.incoming.deliveries.urgent
    end.protocol.incoming.deliveries.reader_came()
    got = [m["n"] if isinstance(m, dict) else m for m in end.take()]
    assert [one for one in got if isinstance(one, int)] == [1, 2]


def test_an_internal_handle_has_a_reader_of_its_own() -> None:
    """The listener takes it at once, whoever else reads or does not."""
    line = b'[1,1]\n[2,1,1,"x",{"cmd":"NODE_x","n":7}]\n'
    end, got = listening(line, [5])
    assert got == [(7, Thing(end, "x", None, [5]))]
    # What is behind a plain handle keeps its place.
    end, got = listening(b'[1,2]\n[2,1,1,"x",1]\n[2,2,1,"x",{"cmd":"NODE_x","n":7}]\n', [5, 6])
    assert got == []


def test_internal_runs_in_the_node_dialect() -> None:
    """What is before and behind an internal message in one read keeps its order."""
    end = Fed()
    end.feed(b"0\n")
    end.feed(b'1\n2\n{"cmd":"NODE_x"}\n3\n')
    end.protocol.incoming.deliveries.holds_back = False
    assert end.take() == [{"cmd": "NODE_x"}, 0, 1, 2, 3]


# -- disconnecting ----------------------------------------------------------------------------------


def test_messages_behind_an_untaken_handle_stay_readable() -> None:
    """After our own ``disconnect`` the handle goes back, and what had arrived is there."""
    end = unread(handles=1)
    end.feed(b'[0,"result"]\n')
    end.protocol.disconnect(9.0)
    assert b'"refuse":[[1,1,"closing"]]' in end.lines()
    assert end.closed == [1]
    end.feed(b'[0,"late"]\n')
    assert end.take() == ["result"]
    assert end.protocol.finished


def test_a_refused_handle_is_refused_once() -> None:
    """One that was refused on its arrival is not refused again by the disconnect."""
    end = native(reads=False)
    end.feed(b'[1,2]\n[2,1,1,"x",1]\n[2,2,1,"x",2]\n', [5, 6])
    incoming = end.protocol.incoming
    incoming._refuse(incoming.held[1], "type")
    end.protocol.disconnect(9.0)
    lines = end.lines()
    assert b'"refuse":[[2,1,"type"],[1,1,"closing"]]' in lines
    assert b'"ack":2' in lines


# -- reading ----------------------------------------------------------------------------------------


def test_after_its_own_switch_an_end_reads_on() -> None:
    """The switch of the peer may be behind what is held; up to the hard bound of that."""
    end = Fed(
        Limits(held_bytes=1, held_hard=1, node_hard=2 * MESSAGE_COST + 40), invited_by=INVITED
    )
    end.write()
    end.feed(b'"%s"\n' % (b"x" * 30))
    assert end.protocol.want_read(waiting=False)
    end.feed(b'"%s"\n' % (b"x" * 30))
    assert not end.protocol.want_read(waiting=False)


def test_a_listener_for_internal_messages_keeps_reading() -> None:
    """They may stand behind what nobody reads, up to ``held_hard``."""
    end = Fed(Limits(held_bytes=1, held_hard=2 * MESSAGE_COST))
    end.feed(b"100\n")
    assert not end.protocol.want_read(waiting=False)
    end.protocol.incoming.listens_internal = True
    assert end.protocol.want_read(waiting=False)
    end.feed(b"200\n")
    assert not end.protocol.want_read(waiting=False)


def test_held_messages_count_for_what_they_cost() -> None:
    """Small ones take many times their bytes, also behind a handle that nobody takes."""
    end = unread(Limits(held_hard=8 * MESSAGE_COST), handles=1)
    for _ in range(6):
        end.feed(b"[0,1]\n")
    assert not end.protocol.nobody_reads
    end.feed(b"[0,1]\n")
    assert end.protocol.incoming.cost == 8 * MESSAGE_COST + len(b'[2,1,1,"x",1]\n') + 7 * 6
    assert end.protocol.nobody_reads


def test_what_is_held_is_granted_no_more_beyond_the_bound() -> None:
    """A local wait opens the gates for what can be held, and no further."""
    limits = Limits(window=8, bytes=64, held_hard=6 * MESSAGE_COST)
    a, b = Fed(limits, inviting=True), Fed(limits, invited_by=Invitation(8, 64))
    exchange(a, b)
    b.protocol.incoming.wants_more = True
    for n in range(100):
        a.send(b"%d" % n)
    exchange(a, b)
    assert 6 <= len(b.protocol.incoming.ready) < 30


# -- sets -------------------------------------------------------------------------------------------


def test_no_clock_without_descriptors() -> None:
    """A native peer that is stopped in the middle of a line holds nothing of ours."""
    end = native()
    end.feed(b'[0,"half')
    assert end.protocol.deadline is None
    end.feed(b'"]\n[1,1', [5])
    assert end.protocol.deadline == Limits().incomplete_timeout
    end.feed(b']\n[2,1,1,"x",1]\n')
    end.take()
    assert end.protocol.deadline is None


def test_switched_peer_is_named_once_opened() -> None:
    """The first line of any kind is what tells that the peer has opened its channel."""
    end = Fed(inviting=True)
    assert not end.protocol.peer.was_opened
    end.feed(SWITCH)
    assert end.protocol.peer.was_opened
    end = Fed(inviting=True)
    end.feed(ACK)
    assert end.protocol.peer.was_opened


def test_who_looks_at_a_wait() -> None:
    """A front asks only while a wait depends on the peer, or one of them failed."""
    assert not unread().protocol.is_waited_for
    end = blocked()
    assert end.protocol.is_waited_for
    end.now = end.protocol.deadline
    end.protocol.on_deadline()
    assert end.protocol.waits.nobody_takes
    assert end.protocol.is_waited_for
    end.protocol.end()
    turn(end)
    assert not end.protocol.is_waited_for


def test_what_is_due_with_the_end_is_not_done() -> None:
    """A peer that finishes nothing ends the channel, and the flush whose time is over with it."""
    end = native(Limits(incomplete_timeout=3.0))
    end.feed(b"[1,1", [5])
    end.protocol.disconnect(3.0)
    assert set(end.protocol.timers.running) == {Timer.PROGRESS, Timer.DISCONNECT}
    end.now = 3.0
    end.protocol.on_deadline()
    assert "left their line or set unfinished" in str(end.protocol.error)
    assert end.protocol.give_up is None
    assert end.closed == [5]


def test_faults_wait_to_be_told() -> None:
    """A handle that was refused, a warning of the dialect, and a close that failed."""
    end = native()
    assert not end.protocol.faults
    end.feed(b'[1,1]\n[2,1,1,"kind",1]\n', [5])
    assert end.protocol.faults
    end.protocol.faults.errors.clear()
    assert not end.protocol.faults
