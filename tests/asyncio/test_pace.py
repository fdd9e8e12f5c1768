"""What one turn may take, by what the last ones took and by who else reads."""

from __future__ import annotations

import pytest

from handleipc.asyncio import pace
from handleipc.asyncio.pace import LONG, LONG_BYTES, MEMORY, SHORT, SHORT_BYTES, Pace


class Clock:
    """Stands in for ``time`` in ``pace``."""

    now = 0.0

    def thread_time(self) -> float:
        return self.now

    def turn(self, end: Pace, lines: int, cost: float, *, left: int = 0) -> None:
        """Let ``end`` take so many lines, which cost so many seconds each."""
        end.begin(0)
        more = lines >= end.lines
        end.taken = lines
        self.now += lines * cost
        end.end(left, more=more)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pace, "time", clock)
    monkeypatch.setattr(Pace, "_turns", 0)
    monkeypatch.setattr(Pace, "_light", None)
    monkeypatch.setattr(Pace, "_light_at", -MEMORY)
    monkeypatch.setattr(Pace, "_other_at", -MEMORY)
    return clock


def flood(clock: Clock, end: Pace, cost: float, turns: int = 40) -> float:
    """Let ``end`` take all that it may, again and again; returns what the last turn took."""
    before = 0.0
    for _ in range(turns):
        before = clock.now
        clock.turn(end, end.lines, cost)
    return clock.now - before


@pytest.mark.parametrize("cost", [1e-7, 1e-6, 1e-5, 1e-4])
def test_a_flood_alone_has_long_turns(clock: Clock, cost: float) -> None:
    end = Pace()
    took = flood(clock, end, cost)
    assert LONG / 2 < took <= LONG + cost
    assert not end.is_short
    assert end.bytes == LONG_BYTES


@pytest.mark.parametrize("cost", [1e-7, 1e-6, 1e-5, 5e-5])
def test_a_flood_beside_a_neighbour_has_short_turns(clock: Clock, cost: float) -> None:
    """The neighbour takes one line now and then, as in an exchange."""
    end, neighbour = Pace(), Pace()
    longest = 0.0
    for round_ in range(20):
        clock.turn(neighbour, 1, 1e-6)
        before = clock.now
        flood(clock, end, cost, 1)
        if round_ > 10:
            longest = max(longest, clock.now - before)
    assert longest <= SHORT + cost
    assert end.is_short
    assert end.bytes == SHORT_BYTES
    assert not neighbour.lines < pace.FIRST


def test_turns_are_long_again_when_the_neighbour_is_silent(clock: Clock) -> None:
    end, neighbour = Pace(), Pace()
    clock.turn(neighbour, 1, 1e-6)
    flood(clock, end, 1e-6, MEMORY)
    assert end.is_short
    took = flood(clock, end, 1e-6, 20)
    assert not end.is_short
    assert took > SHORT


def test_an_end_is_no_neighbour_of_itself(clock: Clock) -> None:
    """A turn that found little before the next flood does not make its own turns short."""
    end = Pace()
    clock.turn(end, 1, 1e-6)
    end.begin(0)
    assert not end.is_short


def test_a_light_turn_of_the_flood_does_not_hide_the_neighbour(clock: Clock) -> None:
    end, neighbour = Pace(), Pace()
    clock.turn(neighbour, 1, 1e-6)
    clock.turn(end, 1, 1e-6)
    clock.turn(end, 1, 1e-6)
    end.begin(0)
    assert end.is_short


def test_two_floods_leave_each_other_long_turns(clock: Clock) -> None:
    ends = [Pace(), Pace()]
    clock.turn(Pace(), 1, 1e-6)  # short ones at first, beside a third end
    for _ in range(MEMORY):
        for end in ends:
            clock.turn(end, end.lines, 1e-6)
    assert not any(end.is_short for end in ends)


def test_what_is_left_to_a_reader_counts(clock: Clock) -> None:
    """A reader takes it in the same turn of the event loop, one by one."""
    end = Pace()
    for _ in range(20):
        clock.turn(end, end.lines, 0.0, left=end.lines)
    assert end.lines <= LONG / pace.READING


def test_what_was_left_before_does_not_count(clock: Clock) -> None:
    """Or an end whose reader is late would read one line a turn."""
    end = Pace()
    for _ in range(20):
        end.begin(1000)
        end.taken = end.lines
        end.end(1000, more=True)
    assert end.lines == pace.MAX_ENDS


@pytest.mark.parametrize("taken", [0, 1, 2, 7, 3000, 4095, 4096])
def test_a_turn_takes_no_more_lines_than_the_report_has_room(clock: Clock, taken: int) -> None:
    """Whatever was taken before: the C core writes as many ends as it is told to."""
    end = Pace()
    clock.turn(end, taken, 1.0 / (taken or 1))
    for _ in range(20):
        clock.turn(end, end.lines, 0.0)
        assert 1 <= end.lines <= pace.MAX_ENDS


def test_a_lone_message_says_nothing_of_how_many_may_be_taken(clock: Clock) -> None:
    """A process that wakes for one message is slow with it, and is to take a burst at once."""
    end = Pace()
    for _ in range(20):
        clock.turn(end, 1, 2 * LONG)
    assert end.lines == pace.FIRST


def test_one_line_a_turn_is_not_none(clock: Clock) -> None:
    """However long a line takes, the next turn takes one; short ones make it more again."""
    end = Pace()
    flood(clock, end, 100 * LONG)
    assert end.lines == 1
    end.begin(0)
    end.taken = 1
    clock.now += 2 * LONG
    end.end(0, more=False)
    assert end.lines == 1
    flood(clock, end, LONG / 100)
    assert end.lines > 50
