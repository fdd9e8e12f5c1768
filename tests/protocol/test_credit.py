"""What a native peer may send: granted in advance, counted as it comes."""

from __future__ import annotations

import pytest

from handleipc.exceptions import RemoteProtocolError
from handleipc.limits import Limits
from handleipc.protocol.credit import Credit


def test_what_was_invited_is_granted_from_the_start() -> None:
    """And nothing else, until it is said."""
    grants = Credit(Limits(window=8, bytes=100), 2, 10)
    assert (grants.descriptors, grants.size) == (2, 10)
    assert grants.say(0) == (0, 8, 100)


def test_one_line_may_overshoot() -> None:
    """A line may begin below the grant, whatever its length; none begins at it."""
    grants = Credit(Limits(), 8, 10)
    grants.take_bytes(9)
    grants.take_bytes(1000)
    with pytest.raises(RemoteProtocolError, match="sent 1009 bytes, and was granted 10"):
        grants.take_bytes(1)


def test_handles_come_in_the_order_of_their_numbers() -> None:
    """None is left out, and none comes twice."""
    grants = Credit(Limits(), 8, 10)
    grants.take_handles(1, 1, 1)
    for number in (1, 3):
        with pytest.raises(RemoteProtocolError, match=f"handle {number} after 1"):
            grants.take_handles(number, 1, 1)


def test_descriptors_are_what_is_granted() -> None:
    """Two handles of four fill a window of eight; what is done with is granted again."""
    grants = Credit(Limits(window=8), 8, 10)
    grants.take_handles(1, 1, 4)
    grants.take_handles(2, 1, 4)
    grants.done(1, 4)
    assert grants.say(0)[1] == 12
    grants.take_handles(3, 1, 4)
    with pytest.raises(RemoteProtocolError, match="sent 13 descriptors, and was granted 12"):
        grants.take_handles(4, 1, 1)


def test_a_handle_larger_than_the_window_comes_alone() -> None:
    """Right only when all before it is acknowledged, and the peer has been told so."""
    grants = Credit(Limits(window=2), 2, 10)
    grants.take_handles(1, 1, 9)
    grants.done(1, 9)
    with pytest.raises(RemoteProtocolError, match="was granted 2"):
        grants.take_handles(2, 1, 9)  # it cannot know of the acknowledgement
    grants = Credit(Limits(window=2), 2, 10)
    grants.take_handles(1, 1, 9)
    grants.done(1, 9)
    assert grants.say(0) == (1, 11, Limits().bytes)
    grants.take_handles(2, 1, 9)


def test_grants_never_fall() -> None:
    """A loss halves the window: what was said stays, and more is said only beyond it."""
    grants = Credit(Limits(window=8, bytes=100), 8, 100)
    grants.lost_some()
    assert grants.say(0)[1] == 8
    for number in range(1, 6):
        grants.take_handles(number, 1, 1)
        grants.done(number, 1)
    # Four, half of it, and one more for each line since, are granted beyond the five.
    assert grants.say(0)[1] == 10
    assert grants.say(0)[2] == 100


def test_the_window_grows_back() -> None:
    """By one with each control line, up to the limit; it is never less than one."""
    grants = Credit(Limits(window=4), 0, 10)
    for _ in range(5):
        grants.lost_some()
    assert [grants.say(0)[1] for _ in range(6)] == [1, 2, 3, 4, 4, 4]


@pytest.mark.parametrize(("size", "taken"), [(100, 50), (1, 1), (3, 1)])
def test_half_a_window_of_bytes_is_worth_a_line(size: int, taken: int) -> None:
    """Less is not, or ends that take each line at once would send a grant for each."""
    grants = Credit(Limits(bytes=size), 8, size)
    assert grants.due_at == taken
    assert grants.say(taken)[2] == size + taken
    assert grants.due_at == 2 * taken
