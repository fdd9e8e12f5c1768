"""Two protocol ends in the model of the kernel: no order of events breaks a promise."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from handleipc.deliveries import Deliveries, Received
from handleipc.incoming import Incoming
from handleipc.outgoing import Outgoing
from handleipc.pairing import Pairing
from handleipc.protocol import ChannelProtocol
from handleipc.holes import Holes
from tests.model_kernel import Violation, World, run_random

# A quarter of a second each; `python -m tests.model_kernel 0 1000000` is the long way.
BLOCKS = 40
RUNS = 75


@pytest.mark.parametrize("block", range(BLOCKS))
def test_random_orders(block: int) -> None:
    """Order, one owner, no leak and an end, whatever happens in whatever order."""
    for seed in range(block * RUNS, (block + 1) * RUNS):
        try:
            run_random(seed)
        except Violation as violation:
            raise AssertionError(f"seed {seed}: {violation}") from violation


def test_runs_are_not_empty() -> None:
    """The runs reach what they are to test: both dialects, losses, refusals, faults."""
    reasons: set[str] = set()
    native = got = 0
    for seed in range(400):
        world = run_random(seed)
        for end in world.ends.values():
            native += end.protocol.incoming.native
            got += len(end.got)
            reasons |= {reason for _, reason in end.back}
    assert native > 100
    assert got > 1000
    for expected in ("closing", "descriptors", "in doubt", "acknowledged", "NACK"):
        assert any(expected in reason for reason in reasons), expected


def give_before_the_ack_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def eager(self: Deliveries, received: Received, size: int) -> None:
        self._waiting_handles += 1
        self._make_ready(received, size)

    monkeypatch.setattr(Deliveries, "add_handle", eager)


def settle_without_reading_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChannelProtocol, "write_failed", ChannelProtocol.receive_eof)


def deliver_unacknowledged_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    settle = Incoming.settle
    monkeypatch.setattr(
        Incoming, "settle", lambda self, deliver_unacked: settle(self, deliver_unacked=True)
    )


def attach_descriptors_to_every_write(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = Outgoing.begun

    def keep(self: Outgoing, stage: object) -> None:
        fds = stage.fds  # type: ignore[attr-defined]
        begun(self, stage)  # type: ignore[arg-type]
        stage.fds = fds  # type: ignore[attr-defined]

    monkeypatch.setattr(Outgoing, "begun", keep)
    write = World._do_write

    def careless(self: World, end: object, size: int) -> None:
        stage = end.protocol.outgoing.stage  # type: ignore[attr-defined]
        if stage is not None and stage.offset and stage.fds:
            raise Violation("descriptors attached twice")
        write(self, end, size)  # type: ignore[arg-type]

    monkeypatch.setattr(World, "_do_write", careless)


def give_what_is_behind_a_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    drain = Incoming._drain_held

    def impatient(self: Incoming) -> None:
        drain(self)
        for line in list(self._held):
            if not line.sequence:
                self._held.remove(line)
                self._release_plain(line)

    monkeypatch.setattr(Incoming, "_drain_held", impatient)


def return_the_handle_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    settle = Outgoing.settle
    monkeypatch.setattr(
        Outgoing, "settle", lambda self, reason, in_doubt: settle(self, reason, in_doubt=False)
    )


def leave_holes_unfilled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Holes, "on_ask_time", lambda self: None)


def forget_to_close_what_nobody_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pairing, "close", lambda self: None)


def say_nothing_when_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    def close(self: Incoming) -> None:
        self.closing = False

    monkeypatch.setattr(Incoming, "close", close)


def put_data_before_control(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ChannelProtocol,
        "_control",
        lambda self, control=ChannelProtocol._control: (
            None if self.outgoing.queue.items or self.outgoing.parked else control(self)
        ),
    )


MUTATIONS = [
    give_before_the_ack_is_written,
    settle_without_reading_what_is_left,
    deliver_unacknowledged_at_the_end,
    attach_descriptors_to_every_write,
    give_what_is_behind_a_hole,
    return_the_handle_in_doubt,
    leave_holes_unfilled,
    forget_to_close_what_nobody_claims,
    put_data_before_control,
]


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda m: m.__name__)
def test_the_model_notices(
    mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The net is tested too: with one rule broken, a promise is seen to break."""
    mutate(monkeypatch)
    for seed in range(4000):
        try:
            run_random(seed)
        except (Violation, AssertionError, KeyError, IndexError):
            return
    pytest.fail("4,000 runs noticed nothing")


def test_a_seed_reproduces_its_run() -> None:
    """The same seed makes the same run."""
    first, second = run_random(7), run_random(7)
    assert first.key() == second.key()
    assert random.Random(7).random() == random.Random(7).random()
