"""What is acknowledged, on its way to the application."""

from __future__ import annotations

import itertools

import pytest

from handleipc.protocol.deliveries import MESSAGE_COST, Deliveries, Internal
from handleipc.protocol.front import Faults
from tests.protocol_pair import take_one


class Handle:
    """Something that can be closed."""

    closed = False

    def close(self) -> None:
        """Note it."""
        self.closed = True


def test_nothing_to_wait_for() -> None:
    """A message with no acknowledgement before it is ready at once."""
    deliveries = Deliveries(32, Faults())
    deliveries.add_plain((1, None), 10)
    assert deliveries.settled
    assert (list(deliveries.ready), deliveries.bytes) == ([(1, None)], 10)
    assert deliveries.take() == (1, None)
    assert (deliveries.bytes, deliveries.bytes_taken) == (0, 10)


def test_a_chunk_waits_for_its_stage() -> None:
    """A handle, and what is behind it, is given when its control stage has passed, not before."""
    deliveries = Deliveries(32, Faults())
    deliveries.add_handle((1, "a"), 10)
    deliveries.add_plain((2, None), 5)
    first = deliveries.control_staged()
    deliveries.add_plain((3, None), 5)
    deliveries.add_handle((4, "b"), 10)
    deliveries.add_plain((5, None), 5)
    deliveries.pump()
    assert not deliveries.ready
    second = deliveries.control_staged()
    assert not deliveries.settled
    deliveries.control_passed(first)
    assert deliveries.take_all() == [(1, "a"), (2, None), (3, None)]
    deliveries.control_passed(second)
    assert deliveries.settled
    assert deliveries.take_all() == [(4, "b"), (5, None)]
    assert (deliveries.bytes, deliveries.bytes_taken) == (0, 35)


def test_a_stage_that_acknowledges_nothing() -> None:
    """It makes no chunk, and what comes behind it is ready."""
    deliveries = Deliveries(32, Faults())
    deliveries.control_staged()
    deliveries.add_plain((1, None), 1)
    assert list(deliveries.ready) == [(1, None)]


def earned(ready: int) -> Deliveries:
    """Deliveries whose reader has earned all that may be acknowledged ahead."""
    deliveries = Deliveries(ready, Faults())
    deliveries.pace = ready
    return deliveries


def give(deliveries: Deliveries, *handles: object, descriptors: int = 1) -> None:
    """Acknowledge handles, and let the kernel have that."""
    for handle in handles:
        deliveries.add_handle((handle, handle), 1, descriptors)
    deliveries.control_passed(deliveries.control_staged())


@pytest.mark.parametrize("at_once", [True, False])
def test_handles_untaken(at_once: bool) -> None:
    """So many acknowledged handles may wait; room is made from half on, however they are taken."""
    deliveries = earned(4)
    for n in range(4):
        assert deliveries.may_add_handle()
        deliveries.add_handle((n, "h"), 1)
    assert not deliveries.may_add_handle()
    deliveries.control_passed(deliveries.control_staged())
    if at_once:
        assert len(deliveries.take_all()) == 4
    else:
        deliveries.take()
        assert not deliveries.may_add_handle()
        deliveries.take()
    assert deliveries.may_add_handle()
    deliveries.takes_all = True
    for n in range(9):
        assert deliveries.may_add_handle()
        deliveries.add_handle((n, "h"), 1)


def test_handles_taken_while_others_wait() -> None:
    """What waits for its stage still counts when all that is ready is taken."""
    deliveries = earned(4)
    deliveries.add_handle((1, "h"), 1)
    deliveries.control_passed(deliveries.control_staged())
    for n in (2, 3, 4):
        deliveries.add_handle((n, "h"), 1)
    assert deliveries.take_all() == [(1, "h")]
    assert deliveries.may_add_handle()
    deliveries.add_handle((5, "h"), 1)
    assert not deliveries.may_add_handle()


def test_nothing_is_acknowledged_before_the_first_reader() -> None:
    """A process killed while it starts takes no handle with it; then one, and no more."""
    deliveries = Deliveries(32, Faults())
    assert not deliveries.may_add_handle()
    deliveries.reader_came()
    assert deliveries.may_add_handle()
    give(deliveries, "a")
    assert not deliveries.may_add_handle()
    deliveries.reader_came()
    assert deliveries.pace == 1


def test_the_pace_doubles_when_a_reader_that_took_handles_finds_nothing() -> None:
    """Up to ``ready``; a reader of plain messages, or of nothing at all, earns nothing."""
    deliveries = Deliveries(5, Faults())
    deliveries.reader_came()
    deliveries.found_nothing()
    deliveries.add_plain((1, None), 1)
    deliveries.take()
    deliveries.found_nothing()
    assert deliveries.pace == 1
    paces = []
    for handle in "abcd":
        give(deliveries, handle)
        deliveries.take()
        deliveries.found_nothing()
        deliveries.found_nothing()
        paces.append(deliveries.pace)
    assert paces == [2, 4, 5, 5]


@pytest.mark.parametrize(
    ("takes", "is_waited_for", "pace"), [(0, False, 1), (0, True, 8), (1, False, 8)]
)
def test_the_pace_falls_when_all_was_left_lying(takes: int, is_waited_for: bool, pace: int) -> None:
    """Back to one when nobody took any of it for a whole turn, and nobody was about to."""
    deliveries = earned(8)
    deliveries.begin_turn(reader_waits=False)
    assert deliveries.pace == 8  # nothing waits
    give(deliveries, "a", "b")
    for _ in range(takes):
        deliveries.take()
    deliveries.begin_turn(reader_waits=is_waited_for)
    assert deliveries.pace == pace
    deliveries.begin_turn(reader_waits=False)
    assert deliveries.pace == 1
    deliveries.begin_turn(reader_waits=False)
    assert deliveries.pace == 1


def test_something_awaited_needs_no_reader() -> None:
    """Up to ``ready`` at once: who waits for the peer must not make it wait for a reader here."""
    deliveries = Deliveries(2, Faults())
    deliveries.is_awaited = True
    for handle in "ab":
        assert deliveries.may_add_handle()
        give(deliveries, handle)
    assert not deliveries.may_add_handle()
    deliveries.is_awaited = False
    assert not deliveries.may_add_handle()
    assert deliveries.pace == 0


def test_descriptors_are_counted_not_handles() -> None:
    """A handle weighs what it has, until it is taken, one by one or all at once."""
    deliveries = earned(8)
    give(deliveries, "a", descriptors=3)
    give(deliveries, "b")
    assert deliveries.waiting_descriptors == 4
    assert deliveries.may_add_handle(4)
    assert not deliveries.may_add_handle(5)
    deliveries.take()
    assert deliveries.waiting_descriptors == 1
    deliveries.take()
    give(deliveries, "c", descriptors=5)
    deliveries.add_handle(("d", "d"), 1, 2)  # its stage has not left
    assert [message for message, _ in deliveries.take_all()] == ["c"]
    assert deliveries.waiting_descriptors == 2
    deliveries.control_passed(deliveries.control_staged())
    assert [message for message, _ in deliveries.take_all()] == ["d"]
    assert deliveries.waiting_descriptors == 0
    give(deliveries, "e", descriptors=2)
    deliveries.take()
    assert deliveries.waiting_descriptors == 0


def test_one_object_twice_weighs_what_it_had_each_time() -> None:
    """As an application's own builder may return it."""
    deliveries = earned(8)
    give(deliveries, "a", descriptors=3)
    give(deliveries, "a", descriptors=2)
    deliveries.take()
    assert deliveries.waiting_descriptors == 2
    deliveries.take()
    assert deliveries.waiting_descriptors == 0


def test_messages_without_handles_are_no_weight() -> None:
    """Taken all at once, with something left that waits: only handles are counted out."""
    deliveries = earned(8)
    give(deliveries, "a")
    deliveries.add_plain((1, None), 1)
    deliveries.add_handle(("b", "b"), 1)
    assert len(deliveries.take_all()) == 2
    assert deliveries.waiting_descriptors == 1


def test_a_handle_larger_than_what_is_allowed_passes_alone() -> None:
    """When nothing waits; and nothing beside it until it is taken."""
    deliveries = Deliveries(4, Faults())
    assert not deliveries.may_add_handle(9)
    deliveries.reader_came()
    assert deliveries.may_add_handle(9)
    give(deliveries, "a", descriptors=9)
    assert not deliveries.may_add_handle()
    deliveries.take()
    assert deliveries.may_add_handle()


def test_refilled_from_half_on() -> None:
    """Once what may wait was reached, acknowledgements go on in batches and not one by one."""
    deliveries = earned(8)
    give(deliveries, *"abcdefgh")
    assert not deliveries.may_add_handle()
    for _ in range(3):
        deliveries.take()
        assert not deliveries.may_add_handle()
    deliveries.take()
    assert not deliveries.may_add_handle(5)
    assert deliveries.may_add_handle(4)
    give(deliveries, "i")
    assert deliveries.may_add_handle()


def test_what_it_costs() -> None:
    """Small messages take many times their bytes: each counts, wherever it waits."""
    deliveries = Deliveries(8, Faults())
    deliveries.add_plain((1, None), 10)
    deliveries.add_plain(Internal((2, None)), 20)
    deliveries.add_handle((3, "h"), 30)
    deliveries.control_staged()
    deliveries.add_plain((4, None), 40)
    deliveries.add_handle((5, "i"), 50)
    assert deliveries.bytes_held == 150
    assert deliveries.cost == 150 + 5 * MESSAGE_COST


@pytest.mark.parametrize("holds_back", [True, False])
def test_internal_messages_overtake_while_nobody_listens(holds_back: bool) -> None:
    """Held back, plain messages wait and internal ones do not; else order is kept."""
    deliveries = Deliveries(32, Faults())
    deliveries.hold_back(holds_back)
    deliveries.add_plain((0, None), 1)
    deliveries.add_plain(Internal(("i", None)), 2)
    deliveries.add_handle((1, "h"), 4)
    deliveries.add_plain(Internal(("j", None)), 8)
    deliveries.add_handle(Internal(("k", "h")), 16)
    deliveries.control_passed(deliveries.control_staged())
    got = [take_one(deliveries)[0] for _ in range(5)]
    assert got == (["i", "j", "k", 0, 1] if holds_back else [0, "i", 1, "j", "k"])
    assert (deliveries.bytes, deliveries.bytes_taken) == (0, 31)


def test_a_listener_that_went() -> None:
    """Internal messages in line behind plain ones overtake them when nobody listens any more."""
    deliveries = Deliveries(32, Faults())
    deliveries.hold_back(False)
    deliveries.add_plain((1, None), 1)
    deliveries.hold_back(True)
    assert list(deliveries.ready) == [(1, None)]
    deliveries.hold_back(False)
    deliveries.add_plain(Internal(("i", None)), 2)
    deliveries.add_plain((2, None), 4)
    deliveries.hold_back(True)
    assert deliveries.take(urgent=True) == ("i", None)
    assert (deliveries.bytes, deliveries.bytes_taken) == (5, 2)
    assert deliveries.take_all() == [(1, None), (2, None)]
    assert (deliveries.bytes, deliveries.bytes_taken) == (0, 7)


@pytest.mark.parametrize("deliver_unacked", [True, False])
def test_settle(deliver_unacked: bool) -> None:
    """At the end a handle that was not acknowledged is closed, unless it is ours all the same."""
    deliveries = Deliveries(32, Faults())
    staged, chunk = Handle(), Handle()
    deliveries.add_handle((1, staged), 1)
    deliveries.control_staged()
    deliveries.add_handle((2, chunk), 1)
    deliveries.add_plain((3, None), 1)
    deliveries.add_handle((4, object()), 1)  # nothing to close
    deliveries.settle(deliver_unacked=deliver_unacked)
    assert staged.closed is chunk.closed is not deliver_unacked
    got = [message for message, _ in deliveries.take_all()]
    assert got == ([1, 2, 3, 4] if deliver_unacked else [3])


class Stubborn:
    """Something that cannot be closed."""

    def close(self) -> None:
        raise OSError("close failed")


def test_settle_when_a_close_raises() -> None:
    """It is kept for a report, and the others are closed all the same."""
    faults = Faults()
    deliveries = Deliveries(32, faults)
    stubborn, other = Stubborn(), Handle()
    deliveries.add_handle((1, stubborn), 1)
    deliveries.add_handle((2, other), 1)
    deliveries.settle(deliver_unacked=False)
    assert other.closed
    ((handle, error),) = faults.closes
    assert (handle, str(error)) == (stubborn, "close failed")


def test_bytes_behind_an_acknowledgement() -> None:
    """They are counted while they wait, whichever way they came, and then as held."""
    deliveries = Deliveries(32, Faults())
    deliveries.add_run([(0, None)], [1])
    deliveries.add_handle((1, "h"), 2)
    deliveries.add_plain((2, None), 4)
    deliveries.add_run([(3, None)], [8])
    number = deliveries.control_staged()
    deliveries.add_plain((4, None), 16)
    deliveries.add_run([(5, None), (6, None)], [32, 64])
    assert (deliveries.bytes, deliveries.bytes_waiting) == (1, 126)
    deliveries.control_passed(number)
    assert (deliveries.bytes, deliveries.bytes_waiting) == (127, 0)
    assert [message for message, _ in deliveries.take_all()] == [0, 1, 2, 3, 4, 5, 6]


def test_a_handle_of_nothing_is_not_counted() -> None:
    """A conversion may make None of it: it is taken like a plain message."""
    deliveries = earned(1)
    deliveries.add_handle((1, None), 1)
    deliveries.control_passed(deliveries.control_staged())
    assert deliveries.may_add_handle()
    assert deliveries.take() == (1, None)
    assert deliveries.may_add_handle()


@pytest.mark.parametrize("how", ["pace", "awaited", "all"])
def test_room_for_a_run(how: str) -> None:
    """As many pass at once as would one after the other, from every state."""
    for limit, waiting, more, refilling in itertools.product(
        range(6), range(8), range(1, 9), (0, 1)
    ):
        ends = []
        for _ in range(2):
            deliveries = Deliveries(limit if how == "awaited" else 99, Faults())
            deliveries.pace = limit if how == "pace" else 0
            deliveries.is_awaited = how == "awaited"
            deliveries.takes_all = how == "all"
            deliveries.waiting_descriptors = waiting
            deliveries._refilling = bool(refilling)
            ends.append(deliveries)
        one_by_one, at_once = ends
        room = at_once.room(more)
        at_once.add_handles([(n, "h") for n in range(room)], [1] * room)
        passed = 0
        while passed < more and one_by_one.may_add_handle():
            one_by_one.add_handle((passed, "h"), 1)
            passed += 1
        assert room == passed, (limit, waiting, more, refilling)
        assert at_once.may_add_handle() == one_by_one.may_add_handle()
        assert at_once.bytes_waiting == one_by_one.bytes_waiting
