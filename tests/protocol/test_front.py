"""What a front sees of a protocol: values, levels, room, and what an interruption leaves."""

from __future__ import annotations

from typing import Any

import pytest

from handleipc.exceptions import ChannelFull
from handleipc.limits import Limits
from handleipc.protocol.front import Faults, Hooks
from handleipc.stats import Level
from tests.protocol_pair import Fed, Thing, native


def node_handle(message: str) -> bytes:
    return b'{"cmd":"NODE_HANDLE","type":"net.Socket","msg":"%b"}\n' % message.encode()


@pytest.mark.parametrize("dialect", ["node", "native"])
def test_values(dialect: str) -> None:
    """They are the parts' own."""
    end = native() if dialect == "native" else Fed()
    protocol = end.protocol
    assert protocol.peer_is_native is (dialect == "native")
    assert protocol.was_opened is (dialect == "native")
    assert protocol.idle
    assert not (protocol.is_above_water or protocol.lost_something or protocol.handles_out)
    end.send(b"1", [5])
    end.write()
    assert protocol.handles_out == 1
    assert not protocol.idle
    protocol.end()
    assert protocol.lost_something


def test_levels() -> None:
    """Under the name of its limit each queue, with what it holds."""
    limits = Limits(queued_bytes=100, queued_handles=9, ready=1, window=8)
    end = native(limits, reads=False)
    end.protocol.incoming.deliveries.pace = 1
    for number in range(3):
        end.send(b"%d" % number, [5 + number])
    end.feed(b'[1,3]\n[2,1,1,"x",1]\n[2,2,2,"x",2]\n', [20, 21, 22])
    levels = end.protocol.levels
    assert levels["queued_bytes"] == Level(3, 100)
    assert levels["queued_handles"] == Level(3, 9)
    assert levels["held_messages"] == Level(2, limits.held_messages)
    assert levels["held_bytes"].limit == limits.bytes
    assert levels["held_bytes"].used > 20
    assert levels["ready"] == Level(1, 1)
    assert levels["window"] == Level(2, 8)
    assert Fed().protocol.levels["held_bytes"].limit == Limits().held_bytes


def test_room() -> None:
    """Bytes and descriptors have a limit each; one that is larger goes alone."""
    end = Fed(Limits(queued_bytes=10, queued_handles=2))
    protocol = end.protocol
    protocol.check_room(1000)
    end.send(b"12345")
    protocol.check_room(5)
    with pytest.raises(ChannelFull, match="5 bytes are queued, and Limits.queued_bytes is 10"):
        protocol.check_room(6)
    with pytest.raises(ChannelFull, match="queued_bytes"):
        end.send(b"123456")
    end.lines()
    end.send(b"1", [5])
    protocol.check_room(1, is_handle=True)
    end.send(b"2", [6])
    with pytest.raises(ChannelFull, match=r"with 2 descriptors .* Limits.queued_handles is 2"):
        protocol.check_room(1, is_handle=True)
    protocol.check_room(1)


def test_water_counts_all_descriptors_of_a_handle() -> None:
    """One handle may go above the mark by itself."""
    end = native(Limits(high_water_handles=10, low_water_handles=1))
    send, answers = end.protocol.send, []
    end.protocol.send = lambda item: answers.append(send(item)) or answers[-1]  # type: ignore[func-returns-value]
    end.send(b"1", [5, 6])
    end.send(b"2", list(range(20, 29)))
    assert answers == [False, True]
    assert end.protocol.is_above_water


def test_an_acknowledgement_behind_a_refused_tail() -> None:
    """Nothing is left then, though the last number was never acknowledged."""
    end = native()
    for number in (1, 2):
        end.send(b"%d" % number, [5 + number])
    end.write()
    end.feed(
        b'{"cmd":"NODE_HANDLEIPC","refuse":[[2,1,"kind"]],"ack":1,"descriptors":9,"bytes":2097152}\n'
    )
    assert [message for message, _ in end.outcomes()] == ["2", "1"]
    assert end.protocol.idle


def test_who_takes() -> None:
    """A listener takes all at once, and is a reader; ``batches`` waits for all; else one comes."""
    end = native(reads=False)
    deliveries = end.protocol.incoming.deliveries
    assert (deliveries.pace, deliveries.takes_all, deliveries.holds_back) == (0, False, True)
    end.protocol.set_taker(listens=False, takes_all=True, listens_internal=False)
    assert (deliveries.pace, deliveries.takes_all, deliveries.holds_back) == (0, True, True)
    end.protocol.set_taker(listens=True, takes_all=False, listens_internal=True)
    assert (deliveries.pace, deliveries.takes_all, deliveries.holds_back) == (1, True, False)
    assert end.protocol.incoming.listens_internal
    end.protocol.set_taker(listens=False, takes_all=False, listens_internal=False)
    assert (deliveries.pace, deliveries.takes_all, deliveries.holds_back) == (1, False, True)


def test_a_reader_that_waits_earns() -> None:
    """One handle ahead at first, twice as much each time it took all and waits again."""
    end = native(reads=False)
    deliveries = end.protocol.incoming.deliveries
    for pace in (1, 2, 4, 8):
        end.protocol.begin_turn(reader_waits=True)
        assert deliveries.pace == pace
        number = pace.bit_length()
        end.feed(b'[1,1]\n[2,%d,1,"x",0]\n' % number, [number + 20])
        end.take()
    end.feed(b'[1,1]\n[2,5,1,"x",0]\n', [30])
    end.write()
    for pace in (8, 1):
        end.protocol.begin_turn(reader_waits=False)
        assert deliveries.pace == pace
    assert deliveries.waiting_descriptors == 1  # the last one was left lying


def test_hooks_do_nothing_by_default() -> None:
    hooks = Hooks()
    hooks.wake()
    hooks.settling()
    assert not hooks.internal({"cmd": "x"})
    assert hooks.peer_has_read()
    assert not Faults()
    assert Faults(warnings=["x"])


@pytest.mark.parametrize("dialect", ["node", "native"])
def test_a_held_handle_whose_conversion_is_interrupted(dialect: str) -> None:
    """It goes back to its sender, once; the conversion has closed it, and nobody does so again."""
    interrupt = [True]

    def convert(tag: str, options: Any, fds: list[int]) -> Thing:
        if interrupt:
            interrupt.clear()
            end.closed += fds
            raise KeyboardInterrupt
        return Thing(end, tag, options, fds)

    limits = Limits(window=1)
    end = native(limits, reads=False) if dialect == "native" else Fed(limits, reads=False)
    incoming = end.protocol.incoming
    incoming._convert = incoming.node._convert = convert
    if dialect == "native":
        end.feed(b'[1,1]\n[2,1,1,"x","held"]\n[0,"behind"]\n', [5])
        incoming.deliveries.pace = 9
    else:
        incoming.deliveries.waiting_descriptors = 1  # of one that nobody has taken
        end.feed(node_handle("held") + b'"behind"\n', [5])
        incoming.deliveries.waiting_descriptors = 0
    assert len(incoming.held) == 2
    with pytest.raises(KeyboardInterrupt):
        end.protocol.next_stage()
    lines = end.lines()
    if dialect == "native":
        assert b'"refuse":[[1,1,"kind"]],"ack":1' in lines
    else:
        assert lines == b'{"cmd":"NODE_HANDLE_NACK"}\n'
    assert end.take() == ["behind"]
    end.protocol.end()
    assert end.closed == [5]
