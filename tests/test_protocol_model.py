"""Two protocol ends in the model of the kernel: no order of events breaks a promise."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from handleipc.protocol import incoming, staging
from handleipc.protocol.channel import ChannelProtocol, State
from handleipc.protocol.deliveries import Deliveries, Received
from handleipc.protocol.front import Faults
from handleipc.protocol.incoming import Incoming
from handleipc.protocol.lost import HeldLines, Lost
from handleipc.protocol.outgoing import Outgoing
from handleipc.protocol.pairing import Pairing
from handleipc.protocol.stages import Entry
from handleipc.protocol.staging import NativeStages
from handleipc.protocol.waits import Waits
from handleipc.protocol.window import Window
from handleipc.protocol.writes import Writes
from tests import model_waits
from tests.model_kernel import End, Violation, World, run_random

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


def test_runs_are_not_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs reach what they are to test: both dialects, losses, refusals, faults."""
    lines = count_runs(monkeypatch)
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
    assert min(lines[what] for what in ("handles", "handles, some lost", "messages")) > 4, lines
    for expected in ("closing", "descriptors", "in doubt", "acknowledged", "NACK"):
        assert any(expected in reason for reason in reasons), expected


def count_runs(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the lines that came with more than one handle or message."""
    found: Counter[str] = Counter()
    claim_rest, messages = Pairing.claim_rest, Incoming.messages

    def claimed(self: Pairing) -> list[int]:
        places = self.places
        fds = claim_rest(self)
        if places > 1:
            found["handles" if len(fds) == places else "handles, some lost"] += 1
        return fds

    def took(self: Incoming, several: list[object], size: int) -> None:
        found["messages"] += len(several) > 1
        messages(self, several, size)

    monkeypatch.setattr(Pairing, "claim_rest", claimed)
    monkeypatch.setattr(Incoming, "messages", took)
    return found


def give_before_the_ack_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def eager(self: Deliveries, received: Received, size: int, descriptors: int = 1) -> None:
        self.waiting_descriptors += descriptors
        self._heavy.setdefault(id(received[1]), []).append(descriptors)
        self._make_ready(received, size)

    monkeypatch.setattr(Deliveries, "add_handle", eager)


def settle_without_reading_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = Writes._refused

    def settle(self: Writes, why: Any) -> Any:
        if isinstance(why, ConnectionError):
            self._give_up.__self__.end()  # type: ignore[attr-defined]
        return refused(self, why)

    monkeypatch.setattr(Writes, "_refused", settle)


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
        for line in list(self.held):
            if not line.sequence:
                self.held.remove(line)
                self._release_plain(line)

    monkeypatch.setattr(Incoming, "_drain_held", impatient)


def return_the_handle_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    settle = Outgoing.settle

    def sure(self: Outgoing, reason: str, **doubts: bool) -> None:
        settle(self, reason, node_in_doubt=False, all_in_doubt=False)

    monkeypatch.setattr(Outgoing, "settle", sure)


def leave_holes_unfilled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lost, "on_ask_time", lambda self: None)


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


def acknowledge_before_anybody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    init = Deliveries.__init__

    def trusting(self: Deliveries, ready: int, faults: Faults) -> None:
        init(self, ready, faults)
        self.pace = ready

    monkeypatch.setattr(Deliveries, "__init__", trusting)


def leave_the_writing_side_open(monkeypatch: pytest.MonkeyPatch) -> None:
    close = World._close_socket

    def only_close(self: World, end: End) -> None:
        close(self, end)
        end.shut_writing = False

    monkeypatch.setattr(World, "_close_socket", only_close)


def end_without_reading_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "_end", lambda self, end, settle: settle())


def leave_the_reading_side_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_settle(self: World, end: End, settle: Callable[[], None]) -> None:
        while self.pipes[end.name] and end.protocol.state is not State.CLOSED:
            self._do_read(end, 1 << 20)
        settle()

    monkeypatch.setattr(World, "_end", only_settle)
    monkeypatch.setattr(End, "shut_down_reading", lambda self: None)


def count_handles_instead_of_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Window, "room", lambda self: self.may_descriptors - self.numbered)


def acknowledge_handles_instead_of_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    may_add = Deliveries.may_add_handle
    monkeypatch.setattr(Deliveries, "may_add_handle", lambda self, descriptors=1: may_add(self, 1))


def let_no_large_handle_pass_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = NativeStages._descriptors_allowed
    monkeypatch.setattr(
        NativeStages, "_descriptors_allowed", lambda self, first, stage: allowed(self, 0, stage)
    )


def give_a_run_before_the_ack_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def eager(self: Deliveries, run: list[Received], sizes: list[int]) -> None:
        self.waiting_descriptors += len(run)
        for received, size in zip(run, sizes, strict=True):
            self._make_ready(received, size)

    monkeypatch.setattr(Deliveries, "add_handles", eager)


def put_handles_of_any_size_into_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        staging,
        "_are_alike",
        lambda first, other: isinstance(other, Entry) and other.pending is not None,
    )


def begin_a_run_in_the_middle_of_a_set(monkeypatch: pytest.MonkeyPatch) -> None:
    stage_handles = NativeStages._stage_handles
    monkeypatch.setattr(
        NativeStages,
        "_stage_handles",
        lambda self, stage, lines, room: (
            stage_handles(self, stage, [], room)
            if stage.fds
            else stage_handles(self, stage, lines, room)
        ),
    )


def make_a_run_over_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    make_run = Incoming._make_run

    def hasty(self: Incoming, line: object, fds: list[int], *rest: object) -> int:
        held, self.held = self.held, HeldLines()
        try:
            return make_run(self, line, fds, *rest)  # type: ignore[arg-type]
        finally:
            self.held = held

    monkeypatch.setattr(Incoming, "_make_run", hasty)


def lose_the_first_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    claim_rest = Pairing.claim_rest

    def shifted(self: Pairing) -> list[int]:
        lost = self.places > len(self._fds) - self._claimed
        fds = claim_rest(self)
        return fds[::-1] if lost else fds

    monkeypatch.setattr(Pairing, "claim_rest", shifted)


def grant_less_than_a_line_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming, "_shares", lambda size, count: [size // count] * count)


def hold_a_node_handle_when_this_end_disconnects(monkeypatch: pytest.MonkeyPatch) -> None:
    close = Incoming.close

    def forgetful(self: Incoming) -> None:
        held = [item for item in self.held if not item.sequence and item.fds is not None]
        fds = [item.fds for item in held]
        for item in held:
            item.fds = None
        close(self)
        for item, kept in zip(held, fds, strict=True):
            item.fds = kept

    monkeypatch.setattr(Incoming, "close", forgetful)


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
    acknowledge_before_anybody_reads,
    leave_the_writing_side_open,
    end_without_reading_what_is_left,
    leave_the_reading_side_open,
    count_handles_instead_of_descriptors,
    acknowledge_handles_instead_of_descriptors,
    let_no_large_handle_pass_alone,
    give_a_run_before_the_ack_is_written,
    put_handles_of_any_size_into_a_run,
    begin_a_run_in_the_middle_of_a_set,
    make_a_run_over_what_is_held,
    lose_the_first_of_a_run,
    grant_less_than_a_line_has,
    hold_a_node_handle_when_this_end_disconnects,
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


# -- two programs that wait for each other ----------------------------------------------------------


@pytest.mark.parametrize("block", range(8))
def test_two_programs_that_wait_for_each_other(block: int) -> None:
    """Whoever waits for the peer before it reads goes on, if need be with ``ChannelBusy``."""
    for seed in range(block * 50, (block + 1) * 50):
        try:
            model_waits.run_waiting(seed)
        except Violation as violation:
            raise AssertionError(f"seed {seed}: {violation}") from violation


def test_waiting_runs_are_not_empty() -> None:
    """In both dialects, with programs that go on and programs that are told that nobody reads."""
    dialects: set[str] = set()
    told = 0
    for seed in range(100):
        world = model_waits.run_waiting(seed)
        told += bool(world.told)
        dialects |= {end.protocol.dialect for end in world.ends.values()}
    assert dialects == {"node", "native"}
    assert 10 < told < 90


def patch_watch(monkeypatch: pytest.MonkeyPatch, change: Callable[..., dict[str, bool]]) -> None:
    watch = Waits.watch

    def changed(self: Waits, **waits: bool) -> bool:
        return watch(self, **change(self, **waits))

    monkeypatch.setattr(Waits, "watch", changed)


def waiting_earns_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_watch(monkeypatch, lambda self, **waits: {**waits, "for_peer": False})


def a_drain_earns_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_waits, "FOR_PEER", ["H", "F"])


def a_line_behind_a_handle_earns_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_watch(monkeypatch, lambda self, **waits: {**waits, "for_kernel": False})


def nobody_is_ever_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ChannelProtocol,
        "nobody_reads",
        property(lambda self: self.incoming.cost >= self.limits.held_hard),
    )


def only_native_ends_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_watch(
        monkeypatch,
        lambda self, **waits: {k: on and self._incoming.native for k, on in waits.items()},
    )


def told_only_when_all_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = Incoming.waits_for_a_reader.fget
    assert waits is not None
    monkeypatch.setattr(
        Incoming,
        "waits_for_a_reader",
        property(
            lambda self: waits(self) and self.deliveries.waiting_descriptors >= self._limits.ready
        ),
    )


def nothing_more_is_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    never = property(lambda self: False, lambda self, on: None)
    monkeypatch.setattr(Incoming, "wants_more", never, raising=False)


@pytest.mark.parametrize(
    "mutate",
    [
        waiting_earns_nothing,
        a_drain_earns_nothing,
        a_line_behind_a_handle_earns_nothing,
        nobody_is_ever_told,
        only_native_ends_are_told,
        told_only_when_all_is_full,
        nothing_more_is_granted,
    ],
    ids=lambda m: m.__name__,
)
def test_the_model_notices_who_waits_for_ever(
    mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one rule of waiting broken, two programs are seen to hang."""
    mutate(monkeypatch)
    with pytest.raises(Violation, match="deadlock"):
        for seed in range(400):
            model_waits.run_waiting(seed)
