"""What the pure layers ask of the operating system: free slots, and the budget in flight."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from handleipc.system import InFlight, System, close_quietly, free_slots


@pytest.fixture
def slots(descriptor_limit: Callable[[int], None]) -> Callable[[int], None]:
    """A function that leaves this many descriptor slots free until the end of the test."""

    def leave(count: int) -> None:
        highest = max(map(int, os.listdir("/proc/self/fd")))
        descriptor_limit(highest + 32)
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                fillers.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(count):
            os.close(fillers.pop())

    fillers: list[int] = []
    yield leave  # type: ignore[misc]
    for fd in fillers:
        os.close(fd)


# -- closing what nobody is to get ---------------------------------------------------------------


def test_close_quietly() -> None:
    """Numbers and objects are closed, whatever was said of those before."""
    first, second, third = (os.memfd_create("file") for _ in range(3))
    file = open(second, "rb", buffering=0)  # noqa: SIM115
    os.close(first)
    os.close(second)
    close_quietly(first, file, third)
    assert file.closed
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(third)


# -- free_slots ----------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [0, 1, 2, 20])
def test_free_slots_with_plenty(most: int) -> None:
    """Counting stops where the caller has enough, and leaves nothing open."""
    before = len(os.listdir("/proc/self/fd"))
    assert free_slots(most) == most
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("free", [1, 2, 5])
def test_free_slots_with_few(slots: Callable[[int], None], free: int) -> None:
    """With few slots left their number is told, each time."""
    slots(free)
    assert [free_slots(16), free_slots(16), free_slots(1)] == [free, free, 1]


def test_free_slots_with_none(slots: Callable[[int], None]) -> None:
    """With no slot left the pure layers hear of none; the function itself says why."""
    slots(0)
    assert System().free_slots(16) == 0
    assert free_slots(0) == 0
    with pytest.raises(OSError, match="Too many open files"):
        free_slots(1)


# -- InFlight ------------------------------------------------------------------------------------


def test_budget_of_one_channel() -> None:
    """A lone channel gets half of the limit: its own count is held against what is free."""
    budget = InFlight()
    own = 0
    while budget.allowance(own, 100) > 0:
        budget.add(1)
        own += 1
    assert own == budget.total == 50


def test_budget_of_several_channels() -> None:
    """A stopped channel does not starve the others: each next one gets half of the rest."""
    budget = InFlight()
    counts = []
    for _ in range(5):
        own = 0
        while budget.allowance(own, 100) > 0:
            budget.add(1)
            own += 1
        counts.append(own)
    assert counts == [50, 25, 13, 6, 3]


def test_budget_that_is_used_up() -> None:
    """A channel with nothing in flight may always send one, or it would never be woken."""
    budget = InFlight()
    budget.add(1000)
    assert budget.allowance(0, 100) == 1
    assert budget.allowance(1, 100) <= 0


def test_budget_of_a_channel_that_was_dropped() -> None:
    """It is uncounted, and wakes nobody."""
    budget, woken = InFlight(), []
    budget.wait(lambda: woken.append(1))
    budget.add(3)
    budget.drop(2)
    assert (budget.total, woken) == (1, [])


@pytest.mark.parametrize("total", range(12))
@pytest.mark.parametrize("own", range(4))
def test_budget_of_many_at_once_is_that_of_one_by_one(own: int, total: int) -> None:
    """The allowance is as many as may be added when each is asked for alone."""
    budget = InFlight()
    budget.add(total)
    allowed = max(0, budget.allowance(own, 10))
    one_by_one = 0
    while budget.allowance(own, 10) > 0:
        budget.add(1)
        own += 1
        one_by_one += 1
    assert allowed == one_by_one


def test_release_wakes_all_who_wait_once() -> None:
    """A release wakes each waiter once; who wants more waits again."""
    budget = InFlight()
    budget.add(3)
    woken: list[str] = []

    def again() -> None:
        woken.append("again")
        budget.wait(again)

    def once() -> None:
        woken.append("once")

    budget.wait(once)
    budget.wait(again)
    budget.wait(once)
    budget.release(1)
    assert (woken, budget.total) == (["once", "again"], 2)
    budget.release(2)
    assert (woken, budget.total) == (["once", "again", "again"], 0)


def test_forget() -> None:
    """Who withdrew is not woken; withdrawing twice does nothing."""
    budget = InFlight()
    woken: list[int] = []

    def wake() -> None:
        woken.append(1)

    budget.wait(wake)
    budget.forget(wake)
    budget.forget(wake)
    budget.release(0)
    assert woken == []


def test_a_copy_starts_again() -> None:
    """A forked copy has nothing in flight, and none of its channels waits; nothing is uncounted."""
    system = System()
    before = system.in_flight
    woken: list[int] = []
    before.add(7)
    before.wait(lambda: woken.append(1))
    system.is_copied()
    budget = system.in_flight
    assert budget.total == 0
    budget.release(0)
    assert woken == []
    budget.add(5)
    before.drop(7)
    assert budget.total == 5


# -- System --------------------------------------------------------------------------------------


def test_system_is_the_real_one() -> None:
    """By default the clock is the monotonic one, and close closes."""
    system = System()
    assert system.clock is time.monotonic
    assert system.free_slots(3) == 3
    fd = os.memfd_create("file")
    system.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_systems_do_not_share_a_budget() -> None:
    """Each system has a budget of its own, unless it is given one."""
    budget = InFlight()
    assert System().in_flight is not System().in_flight
    assert System(in_flight=budget).in_flight is budget
