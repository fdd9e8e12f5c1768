"""Many messages, or many handles, in one line: what makes a run, and what becomes of one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from handleipc.exceptions import RemoteProtocolError
from handleipc.limits import Limits
from handleipc.protocol import incoming
from handleipc.protocol.channel import State
from handleipc.protocol.staging import HANDLES_BYTES, LONGEST_TYPE
from handleipc.wire.envelope import RUN_BYTES
from handleipc.wire.syscalls import Refused
from tests.protocol_pair import INVITED, SWITCH, Fed, Thing, exchange, native

GRANTS = b'{"cmd":"NODE_HANDLEIPC","ack":%d,"descriptors":999,"bytes":9999999}\n'


def granted(limits: Limits | None = None, **options: object) -> Fed:
    """An end whose peer lets it send what it likes."""
    end = native(limits, **options)
    end.feed(GRANTS % 0)
    return end


def pair(limits: Limits | None = None) -> tuple[Fed, Fed]:
    """Two native ends."""
    return granted(), native(limits)


# -- what is sent ---------------------------------------------------------------------------------


def test_messages_make_a_run() -> None:
    """Those that nobody waits for; one alone has a line of its own."""
    end = granted()
    for n in range(3):
        end.protocol.send(b"%d" % n)
    end.send(b'"waited for"')
    end.protocol.send(b"3")
    assert end.write() == [(b'[5,[0,1,2]]\n[0,"waited for"]\n[0,3]\n', [])]
    assert end.outcomes() == [('"waited for"', None)]


def test_a_run_of_messages_is_no_longer_than_all_may_take() -> None:
    """``RUN_BYTES`` with everything around them; a longer message goes alone."""
    end = granted()
    sizes = [1, 5000, 4000, RUN_BYTES, 7, 7]
    for size in sizes:
        end.protocol.send(b"1" * size)
    lines = end.lines().splitlines(keepends=True)
    assert [line[:3] for line in lines] == [b"[5,", b"[0,", b"[0,", b"[5,"]
    exact = [b"1" * (RUN_BYTES - 9), b"2"]
    for last, count in ((b"", 1), (b"2", 2)):
        end.protocol.send(exact[0] + last)
        end.protocol.send(exact[1])
        lines = end.lines().splitlines(keepends=True)
        assert len(lines) == count
        assert max(map(len, lines)) <= RUN_BYTES


def test_small_messages_count_as_if_they_had_lines() -> None:
    """A grant of bytes bounds what they are in memory; both ends count the same."""
    end = granted()
    window = end.protocol.outgoing.window
    before = window.bytes_sent
    for _ in range(100):
        end.protocol.send(b"1")
    first, second = end.lines().splitlines()
    assert (first.count(b"1"), second.count(b"1")) == (64, 36)
    sent = window.bytes_sent - before
    assert sent == len(first) + len(second) + 2 + 5 * 100
    other = native()
    other.feed(b"%b\n%b\n" % (first, second))
    assert other.protocol.incoming.credit.bytes_in == sent


def test_handles_make_a_run() -> None:
    """As many as are alike; what follows is sent with them, but no other handle."""
    end = granted()
    for n in range(3):
        end.send(b"%d" % n, [5 + n], details={"key": "k"})
    end.protocol.send(b'"plain"')
    end.send(b"3", [8])
    end.send(b"4", [9], tag="fd")
    assert end.write() == [
        (b'[4,1,"net.Socket",[0,1,2],{"key":"k"}]\n[0,"plain"]\n', [5, 6, 7]),
        (b'[1,2]\n[2,4,1,"net.Socket",3]\n[2,5,1,"fd",4]\n', [8, 9]),
    ]


def test_a_type_too_long_for_a_run() -> None:
    """Its handles are sent one by one."""
    end = granted()
    for n in range(2):
        end.send(b"1", [n + 5], tag="t" * (LONGEST_TYPE + 1))
    ((data, fds),) = end.write()
    assert data.count(b"[2,") == 2
    assert fds == [5, 6]


@pytest.mark.parametrize("second", ["message", "two descriptors", "type", "options"])
def test_a_handle_with_something_else_behind_it(second: str) -> None:
    """One write for both is better than a run of one."""
    end = granted()
    end.send(b"1", [5])
    others = {
        "message": lambda: end.protocol.send(b"2"),
        "two descriptors": lambda: end.send(b"2", [6, 7]),
        "type": lambda: end.send(b"2", [6], tag="fd"),
        "options": lambda: end.send(b"2", [6], details={"key": "k"}),
    }
    others[second]()
    ((data, fds),) = end.write()
    assert data.startswith(b"[1,%d]\n[2,1,1," % len(fds))


def test_a_run_in_the_middle_of_a_stage() -> None:
    """The descriptors of a stage come with its first byte: behind a message there is no run."""
    end = granted()
    end.protocol.send(b"0")
    for n in (1, 2):
        end.send(b"%d" % n, [5 + n])
    assert end.write() == [
        (b'[1,2]\n[0,0]\n[2,1,1,"net.Socket",1]\n[2,2,1,"net.Socket",2]\n', [6, 7])
    ]


def test_a_run_of_handles_is_no_longer_than_all_may_take() -> None:
    """However long messages, options and types are."""
    end = granted()
    message = b'"%b"' % (b"x" * 2000)
    for n in range(9):
        end.send(message, [n + 5], details={"key": "k" * 1000})
    for n in range(2):
        end.send(b'"%b"' % (b"x" * HANDLES_BYTES), [n + 15])
    for n in range(2):
        end.send(b"1", [n + 25], tag="t" * (LONGEST_TYPE + 1))
        end.send(b"1", [n + 35], tag="é" * LONGEST_TYPE)
    while lines := end.lines().splitlines(keepends=True):
        assert all(len(line) <= RUN_BYTES or line[:3] == b"[2," for line in lines)


def test_a_run_counts_as_it_is_long() -> None:
    """Also one that was parked and taken apart: the peer counts the same bytes."""
    end = native()
    for n in range(2):
        end.send(b"%d" % n, [5 + n])
    last = end.send(b"2", [7])
    stage = end.protocol.next_stage()
    assert bytes(stage.data) == b'[4,1,"net.Socket",[0,1,2]]\n'
    end.protocol.wrote(Refused.IN_FLIGHT)
    assert end.protocol.outgoing.withdraw(last)
    ((data, _),) = end.write()
    assert data == b'[4,1,"net.Socket",[0,1]]\n'
    assert end.protocol.outgoing.window.bytes_sent == len(data)


def test_a_run_begins_within_the_grant() -> None:
    """And may end beyond it, as any line."""
    end = native()
    end.protocol.outgoing.window.bytes_sent = end.protocol.outgoing.window.may_bytes - 1
    for n in range(3):
        end.send(b"%d" % n, [5 + n])
    end.protocol.send(b"3")
    assert end.write() == [(b'[4,1,"net.Socket",[0,1,2]]\n', [5, 6, 7])]


def test_a_handle_of_a_run_that_was_closed() -> None:
    """It comes back, and those behind it begin another."""
    end = granted()
    end.send(b"1", [5], read=lambda: [-1])
    end.send(b"2", [6])
    end.send(b"3", [7])
    assert end.write() == [(b'[4,1,"net.Socket",[2,3]]\n', [6, 7])]


# -- what comes -----------------------------------------------------------------------------------


def test_a_run_arrives() -> None:
    """In order, each with its own descriptor; all are acknowledged by one line."""
    a, b = pair()
    for n in range(5):
        a.send(b"%d" % n, [5 + n])
        a.protocol.send(b'"m%d"' % n) if n > 2 else None
    exchange(a, b)
    got = b.take()
    assert [item[0] if isinstance(item, tuple) else item for item in got] == [
        0,
        1,
        2,
        3,
        "m3",
        4,
        "m4",
    ]
    assert [item[1].fds for item in got if isinstance(item, tuple)] == [[5], [6], [7], [8], [9]]
    exchange(a, b)
    assert [message for message, reason in a.outcomes() if reason is None] == list("01234")


@pytest.mark.parametrize("lines", [1, 2, 99])
def test_a_run_in_one_read_with_the_switch(lines: int) -> None:
    """However few lines of a read are taken at once: its set waits for its line."""
    end = Fed(invited_by=INVITED)
    end.write()
    end.framer.reader.max_ends = lines
    end.feed(b'"node"\n%b[4,1,"x",[1,2,3]]\n[0,4]\n' % SWITCH, [5, 6, 7])
    got = end.take()
    assert [item[0] if isinstance(item, tuple) else item for item in got] == ["node", 1, 2, 3, 4]
    assert not end.closed


@pytest.mark.parametrize("pace", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("made", [False, True])
def test_no_more_of_a_run_is_acknowledged_than_was_earned(pace: int, made: bool) -> None:
    """The others wait with their descriptors, in order."""
    a, b = granted(), native(Limits(ready=9), makes=made)
    b.protocol.incoming.deliveries.pace = pace
    for n in range(4):
        a.send(b"%d" % n, [5 + n])
    exchange(a, b)
    assert len(b.protocol.incoming.ready) == min(pace, 4)
    assert len(b.protocol.incoming.held) == 4 - min(pace, 4)
    b.protocol.incoming.deliveries.takes_all = True
    assert [message for message, _ in b.take()] == [0, 1, 2, 3]


@pytest.mark.parametrize("arrive", [0, 1, 2])
@pytest.mark.parametrize("made", [False, True])
def test_a_run_that_lost_descriptors(arrive: int, made: bool) -> None:
    """Those that came are given; the rest is asked for, and nothing passes it."""
    end = native(makes=made)
    end.feed(b'[4,1,"x",[1,2,3]]\n[0,"behind"]\n', [5, 6, 7][:arrive], lost=True)
    assert end.take() == [(n, Thing(end, "x", None, [4 + n])) for n in range(1, arrive + 1)]
    end.wait()
    assert b'"again":[%d,%d]' % (arrive + 1, 3 - arrive) in end.lines()
    again = b"".join(b"[3,%d,1]\n" % n for n in range(arrive + 1, 4))
    end.feed(b"[1,%d]\n%b" % (3 - arrive, again), [15, 16, 17][arrive:])
    assert [message for message, _ in end.take()[: 3 - arrive]] == [1, 2, 3][arrive:]


def test_a_handle_of_a_run_is_refused() -> None:
    """Alone: its neighbours are given."""
    end = native()
    end.feed(b'[4,1,"kind",[1,2]]\n', [5, 6])
    assert b'"refuse":[[1,2,"kind"]],"ack":2' in end.lines()
    assert end.closed == [5, 6]


def test_a_run_while_this_end_disconnects() -> None:
    """All of it goes back."""
    end = native()
    end.send(b"mine", [4])
    end.write()
    end.protocol.disconnect(9)
    end.feed(b'[4,1,"x",[1,2]]\n[5,[3,4]]\n', [5, 6])
    assert b'"refuse":[[1,2,"closing"]]' in end.lines()
    assert end.closed == [5, 6]


def test_messages_of_a_run_behind_a_hole() -> None:
    """They wait, as any message; internal ones among them too."""
    end = native()
    end.feed(b'[1,1]\n[2,1,1,"x",1]\n[5,[2,{"cmd":"NODE_x"},3]]\n', [], lost=True)
    assert end.take() == []
    assert end.protocol.incoming.held.internal == 1
    end.wait()
    end.write()
    end.feed(b"[1,1]\n[3,1,1]\n", [5])
    assert [item if type(item) is not tuple else item[0] for item in end.take()] == [
        *({"cmd": "NODE_x"}, 1, 2, 3)
    ]
    assert not end.protocol.incoming.held.bytes


def test_internal_messages_of_a_run() -> None:
    """They overtake what waits for a reader."""
    end = native()
    seen: list[object] = []

    def see(message: dict[str, str]) -> bool:
        seen.append(message)
        return message["cmd"] == "NODE_all"

    end.protocol.hooks.internal = see
    end.feed(b'[5,[1,{"cmd":"NODE_x"},{"cmd":"NODE_all"},{"cmd":"other"}]]\n')
    assert end.take() == [{"cmd": "NODE_x"}, 1, {"cmd": "other"}]
    assert seen == [{"cmd": "NODE_x"}, {"cmd": "NODE_all"}]


def test_an_internal_message_that_was_all_is_counted_as_taken() -> None:
    end = native()
    end.protocol.hooks.internal = lambda _: True
    line = b'[0,{"cmd":"NODE_x"}]\n'
    end.feed(line)
    assert end.take() == []
    assert end.protocol.incoming.deliveries.bytes_taken == len(line)
    assert not end.protocol.levels["held_bytes"].used


def test_internal_messages_with_handles_in_a_run() -> None:
    """They have listeners of their own, also when nobody looks at each handle."""
    end = native(makes=True)
    end.protocol.incoming.deliveries.takes_all = True
    end.feed(b'[4,1,"x",[{"cmd":"NODE_x"},2]]\n[4,3,"x",[3,4]]\n', [5, 6])
    end.feed(b"")
    assert end.protocol.state is State.CLOSED  # the second had none
    end = native(makes=True)
    end.protocol.incoming.deliveries.takes_all = True
    for first in (1, 3):
        end.feed(b'[4,%d,"x",[{"cmd":"NODE_x"},2]]\n' % first, [first + 4, first + 5])
    assert [message for message, _ in end.take()] == [{"cmd": "NODE_x"}, {"cmd": "NODE_x"}, 2, 2]


def test_the_bytes_of_a_run_are_granted_again() -> None:
    """All of them, however they divide."""
    end = native(Limits(bytes=100))
    credit = end.protocol.incoming.credit
    for _ in range(30):
        before = credit.size
        end.feed(b"[5,[1,2,3,44,55]]\n")
        end.take()
        end.write()
        assert credit.size >= before
    assert credit.bytes_in == 30 * (18 + 5 * 5) == end.protocol.incoming.deliveries.bytes_taken


@pytest.mark.parametrize(
    ("data", "fds", "why"),
    [
        (b'[4,1,"x",[1,2]]\n', [5], "declared 2 descriptors and sent 1"),
        (b'[4,1,"x",[1,2]]\n', [5, 6, 7], "declared 2 descriptors and sent 3"),
        (b'[4,1,"x",[1,2]]\n', [], "declared 2 descriptors and sent none"),
        (b'[4,2,"x",[1,2]]\n', [5, 6], "handle 2 after 0"),
        (
            b'[4,1,"x",[1,2,3,4,5,6,7,8,9]]\n',
            list(range(5, 14)),
            "sent 9 descriptors, and was granted 8",
        ),
        (b'[1,3]\n[4,1,"x",[1,2]]\n', [5, 6, 7], "before the last was used up"),
        (b'[4,1,"x",[]]\n', [5], "no line of the native dialect"),
        (b"[4,1,2,[1]]\n", [5], "no line of the native dialect"),
        (b'[4,1,"x",1]\n', [5], "no line of the native dialect"),
        (b'[4,0,"x",[1]]\n', [5], "no line of the native dialect"),
        (b'[4,1,"x",[1],2]\n', [5], "no line of the native dialect"),
        (b"[5,[]]\n", [], "no line of the native dialect"),
        (b"[5,[0%b]]\n" % (b",0" * 64), [], "no line of the native dialect"),
        (b"[5,1]\n", [], "no line of the native dialect"),
        (b"[5,[1]]\n", [5], "no line claims"),
    ],
)
def test_runs_that_break_a_rule(data: bytes, fds: list[int], why: str) -> None:
    """The channel ends, and everything that came is closed."""
    end = native(Limits(window=8))
    end.feed(data, fds)
    end.protocol.deadline
    if end.protocol.state is not State.CLOSED:
        end.feed(b"[0,1]\n")  # behind descriptors that nobody claims
    assert why in end.error
    assert isinstance(end.protocol.error, RemoteProtocolError)
    assert end.closed == fds


def test_an_interrupted_run() -> None:
    """A signal handler raises while handles are made: none is given, and none left open."""
    made: list[Thing] = []

    def maker(tag: str, options: object) -> Callable[[int], Thing]:
        def make(fd: int) -> Thing:
            if fd == 7:
                raise KeyboardInterrupt
            made.append(Thing(end, tag, options, [fd]))
            return made[-1]

        return make

    end = native(maker=maker)
    with pytest.raises(KeyboardInterrupt):
        end.feed(b'[4,1,"x",[1,2,3,4]]\n', [5, 6, 7, 8])
    assert "interrupted" in end.error
    assert sorted(end.closed) == [5, 6, 8]  # who made 7 may have it, or not


def test_an_interruption_between_two_handles_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is made and not noted: it may be anybody's, the others are closed, and it is told."""
    end = native(makes=True)
    calls: list[object] = []

    def as_received(*args: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return args

    monkeypatch.setattr(incoming, "as_received", as_received)
    with pytest.raises(KeyboardInterrupt):
        end.feed(b'[4,1,"x",[{"cmd":"a"},{"cmd":"b"},3]]\n', [5, 6, 7])
    assert "interrupted" in end.error
    assert sorted(end.closed) == [5, 7]


def test_each_handle_of_a_run_has_its_own_description() -> None:
    """A conversion may take it apart."""
    end = native()
    end.feed(b'[4,1,"x",[1,2],{"details":["a"]}]\n', [5, 6])
    (_, one), (_, two) = end.take()
    one.options["details"].clear()
    assert two.options == {"details": ["a"]}


@pytest.mark.parametrize("peer", ["node", "native"])
def test_sets_of_earlier_reads_while_lines_are_left(peer: str) -> None:
    """Few lines are taken at once: no more than the set of the last read waits for its line."""
    end = native() if peer == "native" else Fed()
    end.framer.reader.max_ends = 1
    line = b"[0,1]" if peer == "native" else b"1"
    end.feed(line[:1], [5, 6])  # a line that is unfinished, with a set
    end.feed(line[1:] + b"\n" + line + b"\n" + line + b"\n", [7, 8])
    assert "no line claims" in end.error
    assert sorted(end.closed) == [5, 6, 7, 8]


def test_an_interrupted_conversion_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Likewise where each is converted: the conversion owns its own, the others are closed."""
    end = native()

    def convert(*_: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(end.protocol.incoming, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        end.feed(b'[4,1,"x",[1,2,3]]\n', [5, 6, 7])
    assert "interrupted" in end.error
    assert end.closed == [6, 7]
