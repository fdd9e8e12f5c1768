"""Descriptors that are here before their lines are: no more of them than a grant allows."""

from __future__ import annotations

from handleipc.limits import Limits
from handleipc.protocol.channel import State
from tests.protocol_pair import SWITCH, Fed


def native(window: int = 8) -> Fed:
    """An end whose peer has switched, and was granted so many descriptors."""
    end = Fed(Limits(window=window), inviting=True)
    end.feed(SWITCH)
    end.write()
    return end


def handles(first: int, count: int) -> bytes:
    """Lines of handles with one descriptor each."""
    return b"".join(b'[2,%d,1,"x",1]\n' % (first + n) for n in range(count))


def test_a_set_beyond_the_grant() -> None:
    """A peer that has used its grant cannot have one more set kept, by not finishing its lines."""
    for data in (b"[1,3", b"[1,3]\n"):
        end = native()
        end.feed(b"[1,6]\n" + handles(1, 6), [1, 2, 3, 4, 5, 6])
        end.feed(data, [7, 8, 9])
        assert "2 were left of its grant" in end.error
        assert {7, 8, 9} <= set(end.closed)


def test_a_set_as_large_as_the_grant() -> None:
    """What is left of the grant may come in a set, byte by byte."""
    end = native()
    end.feed(b"[1,6]\n" + handles(1, 6), [1, 2, 3, 4, 5, 6])
    end.feed(b"[1,", [7, 8])
    end.feed(b"2]\n" + handles(7, 2))
    assert end.protocol.state is State.OPEN


def test_a_larger_handle_alone() -> None:
    """A set larger than the whole window may come when everything before it is acknowledged."""
    end = native(window=2)
    end.feed(b"[1,1]\n" + handles(1, 1), [1])
    end.write()
    end.feed(b"[1,3]\n", [2, 3, 4])
    end.feed(b'[2,2,3,"x",1]\n')
    assert end.protocol.state is State.OPEN


def test_a_set_that_was_asked_for() -> None:
    """What was lost comes again beyond the grant, and no more than was asked for."""
    for count in (2, 3):
        end = native(window=2)
        end.feed(b"[1,2]\n" + handles(1, 2), lost=True)
        end.now = end.protocol.deadline
        end.protocol.on_deadline()
        assert b'"again":[1,2]' in end.lines()
        end.feed(b"[1,%d" % count, list(range(1, count + 1)))
        assert (end.protocol.state is State.OPEN) is (count == 2)


def test_a_node_set_keeps_two() -> None:
    """Node sends one descriptor with a line; of a set that is too large, two are enough to say."""
    end = Fed()
    end.feed(b'{"cmd":"NODE_HANDLE",', [1, 2, 3, 4])
    assert end.closed == [3, 4]
    end.feed(b'"type":"x","msg":1}\n')
    assert end.closed == [3, 4, 1, 2]
    assert "2 descriptors" in str(end.protocol.faults.errors[0])
    assert b"NODE_HANDLE_NACK" in end.lines()
