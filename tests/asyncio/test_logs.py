"""One line a kind and minute."""

from __future__ import annotations

import logging

import pytest

from handleipc.asyncio.logs import Throttle, cut


class Clock:
    """Time, as the test has it."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def throttle(clock: Clock) -> Throttle:
    return Throttle(logging.getLogger("handleipc.test"), clock=clock)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return found


def test_one_line_a_minute(throttle: Throttle, clock: Clock, caplog) -> None:
    """The first of a kind is logged, then none for a minute, then one that counts them."""
    assert throttle.warning("accept", "cannot accept: %s", "EMFILE")
    for _ in range(1000):
        clock.now += 0.05
        assert not throttle.warning("accept", "cannot accept: %s", "EMFILE")
    assert lines(caplog) == ["cannot accept: EMFILE"]
    clock.now += 20
    assert throttle.warning("accept", "cannot accept: %s", "ENFILE")
    assert lines(caplog) == ["cannot accept: ENFILE (1000 more of this kind in the 70 s before)"]
    clock.now += 60
    assert throttle.warning("accept", "100 %")
    assert lines(caplog) == ["100 %"]


def test_kinds_do_not_hide_each_other(throttle: Throttle, caplog) -> None:
    """Each kind has its own minute."""
    throttle.warning("accept", "one")
    throttle.log(logging.ERROR, "protocol", "two")
    assert lines(caplog) == ["one", "two"]


def test_lines_are_cut(throttle: Throttle, caplog) -> None:
    """What a peer may have written is cut, and the count is not."""
    throttle.warning("protocol", "the peer sent %s", "x" * 100_000)
    (line,) = lines(caplog)
    assert line == "the peer sent " + "x" * 283 + "..."
    assert len(line) == 300
    assert cut("x" * 300) == "x" * 300
    assert cut("x" * 301, 10) == "xxxxxxx..."


def test_nothing_is_made_of_what_nobody_reads(throttle: Throttle, caplog) -> None:
    """Below the logger's level nothing is formatted, counted, or kept from being logged later."""

    class Costly:
        def __str__(self) -> str:
            raise AssertionError("nobody reads this")

    assert not throttle.log(logging.DEBUG, "kind", "%s", Costly())
    assert throttle.warning("kind", "read")
    assert lines(caplog) == ["read"]
