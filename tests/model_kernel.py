"""Two protocol ends joined by a model of the kernel: every order of events, without a socket.

The model has what the protocol must survive: writes cut short, reads that join writes and stop
after descriptors (or before them, as BSD does), tables without free slots, ETOOMANYREFS, processes
that die, abort or disconnect at any step. Descriptors are numbers with a count for each process and
for the flight, so that a leak, a double close or two owners are seen at once.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from collections import Counter, deque
from collections.abc import Callable
from functools import partial

from handleipc.exceptions import LocalProtocolError
from handleipc.handles.pending import Held
from handleipc.handles.refusal import Refusal
from handleipc.limits import Invitation, Limits
from handleipc.protocol.channel import ChannelProtocol, State
from handleipc.protocol.stages import Entry, EntryState
from handleipc.system import InFlight, System
from handleipc.wire.framing import DescriptorSet, LineFramer
from handleipc.wire.syscalls import Refused
from tests.protocol_pair import take_one

ENDLESS = 1e9


class Violation(AssertionError):
    """A promise of the contract was broken."""


@dataclasses.dataclass
class Token:
    """A handle of the model: one or more descriptors that belong together."""

    number: int
    fds: list[int]
    world: World
    owner: str
    closed: bool = False

    def read(self) -> list[int]:
        return [-1] if self.closed else self.fds

    def close(self) -> None:
        for fd in self.fds:
            self.world.close(self.owner, fd)


@dataclasses.dataclass
class Scenario:
    """Who sends what, and how narrow the world is."""

    scripts: dict[str, list[tuple[str, int]]]
    roles: str = "fork"  # fork: B was invited by A. node: B is a Node peer. both: as Node and Node
    slots: dict[str, int] = dataclasses.field(default_factory=lambda: {"A": 999, "B": 999})
    in_flight: int = 999
    capacity: int = 1 << 16
    stops_before: bool = False
    reads: dict[str, bool] = dataclasses.field(default_factory=lambda: {"A": True, "B": True})
    limits: Limits = dataclasses.field(default_factory=Limits)
    fds_each: int = 1
    withdraws: float = 0.0  # how often an application changes its mind
    refused: frozenset[int] = frozenset()  # handles the peer cannot make sense of
    late: frozenset[str] = frozenset()  # ends that do not read from the start
    copies: frozenset[str] = frozenset()  # ends whose socket a forked copy holds, too
    burst: int = 1  # sends of one turn
    lines: int = 1024  # taken of one read at once


def narrow_limits(rng: random.Random) -> Limits:
    """Limits small enough that a short script meets them."""
    return Limits(
        window=rng.choice([1, 2, 4, 9]),
        ready=rng.choice([1, 2, 99]),
        set_size=rng.choice([1, 3, 64]),
        bytes=rng.choice([1, 40, 120, 1 << 16]),
        ask_delay=1.0,
        ask_delay_max=1.0,
        retry_time=4.0,
        in_flight_delay=1.0,
        in_flight_delay_max=1.0,
        node_retries=3,
        incomplete_timeout=ENDLESS,
        disconnect_timeout=ENDLESS,
        hello_timeout=ENDLESS,
    )


class End:
    """One process: its protocol, its application, its descriptor table."""

    def __init__(self, world: World, name: str, protocol: ChannelProtocol) -> None:
        self.world = world
        self.name = name
        self.protocol = protocol
        self.framer = LineFramer(protocol.limits.line)
        self.framer.reader.max_ends = world.scenario.lines
        self.received = 0
        self.sent: list[tuple[str, int]] = []
        self.got: list[int] = []
        self.back: list[tuple[int, str]] = []
        self.acked: list[int] = []
        self.held: dict[int, Token] = {}
        self.entries: list[Entry] = []
        self.withdrawn: list[int] = []
        self.position = 0
        self.alive = True
        self.open = True
        self.shut_reading = False
        self.shut_writing = False
        self.reads = True
        self.has_earned = False  # somebody read here, or something waited for the peer
        protocol.hooks.settling = self.shut_down_reading

    def shut_down_reading(self) -> None:
        """No acknowledgement that the peer has not written yet arrives any more."""
        self.shut_reading = True


class World:
    """Both ends, and the bytes and descriptors on their way TO each."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.now = 0.0
        self.now_used = 0
        self.counts: dict[int, Counter[str]] = {}
        self.pipes: dict[str, deque[tuple[bytes, list[int]]]] = {"A": deque(), "B": deque()}
        self.ended: set[tuple[str, str]] = set()
        limits = scenario.limits
        invitation = Invitation(limits.window, limits.bytes)
        fork = scenario.roles == "fork"
        self.ends = {
            "A": End(self, "A", self._protocol("A", inviting=scenario.roles != "both")),
            "B": End(self, "B", self._protocol("B", invited_by=invitation if fork else None)),
        }
        for name, end in self.ends.items():
            end.reads = name not in scenario.late
            end.protocol.hooks.peer_has_read = partial(self._is_read, self.other(name))
        for name, script in scenario.scripts.items():
            for kind, number in script:
                if kind == "h":
                    for fd in self.fds_of(number):
                        self.counts[fd] = Counter({name: 1})

    def fds_of(self, number: int) -> list[int]:
        """Handles of one run have from one to ``fds_each`` descriptors."""
        return [number * 10 + i for i in range(1 + number * 7 % self.scenario.fds_each)]

    def _is_read(self, name: str) -> bool:
        return not self.pipes[name]

    def _protocol(self, name: str, **roles: object) -> ChannelProtocol:
        system = System(
            clock=lambda: self.now,
            close=lambda fd: self.close(name, fd),
            free_slots=lambda most: max(0, min(most, self.free(name))),
            in_flight=InFlight(),
        )

        def convert(tag: str, options: object, fds: list[int]) -> Token:
            if {fd // 10 for fd in fds} != {fds[0] // 10}:
                raise Violation(f"mixed up: descriptors {fds} in one handle")
            if fds[0] // 10 in self.scenario.refused:
                for fd in fds:
                    self.close(name, fd)
                raise Refusal("kind", "not what it claims to be")
            return Token(fds[0] // 10, fds, self, name)

        def maker(tag: str, options: object) -> Callable[[int], Token] | None:
            if self.scenario.refused:
                return None
            return lambda fd: Token(fd // 10, [fd], self, name)

        return ChannelProtocol(self.scenario.limits, system, convert, maker=maker, **roles)

    # -- descriptors -----------------------------------------------------------------------------

    def used(self, name: str) -> int:
        return sum(count[name] for count in self.counts.values())

    def free(self, name: str) -> int:
        return self.scenario.slots[name] - self.used(name)

    def in_flight(self) -> int:
        return sum(count["flight"] for count in self.counts.values())

    def close(self, name: str, fd: int) -> None:
        if self.counts[fd][name] <= 0:
            raise Violation(f"{name} closed {fd}, which it does not own")
        self.counts[fd][name] -= 1

    # -- what may happen -------------------------------------------------------------------------

    @staticmethod
    def other(name: str) -> str:
        return "B" if name == "A" else "A"

    def is_gone(self, end: End) -> bool:
        """Whether the kernel has seen the last of this end's socket: no copy holds it."""
        return not end.open and end.name not in self.scenario.copies

    def hangs_up(self, end: End) -> bool:
        """Whether this end's peer finds EOF behind what is left to read."""
        return self.is_gone(end) or end.shut_writing

    def steps(self) -> list[tuple[str, str]]:
        found = []
        for name, end in self.ends.items():
            if not end.alive:
                continue
            protocol, peer = end.protocol, self.ends[self.other(name)]
            script = self.scenario.scripts.get(name, [])
            if end.position < len(script) and protocol.state is State.OPEN:
                found.append(("send", name))
            if end.open:
                found.append(("write", name))
                if self.pipes[name] and protocol.want_read(waiting=False):
                    found.append(("read", name))
                if not self.pipes[name] and (self.hangs_up(peer) or end.shut_reading):
                    found.append(("eof", name))
                if not peer.alive and not self.is_gone(peer):
                    found.append(("reap", name))
                deadline = protocol.deadline
                if deadline is not None and deadline < ENDLESS / 2:
                    found.append(("tick", name))
            if not end.reads:
                found.append(("begin", name))
            elif protocol.incoming.ready or protocol.incoming.deliveries.urgent:
                found.append(("take", name))
            elif end.open:
                found += [("want", name), ("leave", name)]
            if end.open:
                found.append(("await", name))
            if end.held:
                found.append(("close", name))
            if (
                end.open
                and self.scenario.withdraws
                and any(
                    entry.state is EntryState.QUEUED or entry.state is EntryState.STAGED
                    for entry in end.entries
                )
            ):
                found.append(("withdraw", name))
        return found

    def do(self, step: tuple[str, str], size: int = 1 << 20) -> None:
        what, name = step
        end = self.ends[name]
        if what in ("crash", "abort", "disconnect"):
            self.ended.add(step)
        getattr(self, f"_do_{what}")(end, size)
        if end.alive:
            self._after(end)

    def _do_send(self, end: End, size: int) -> None:
        script = self.scenario.scripts[end.name]
        for _ in range(min(self.scenario.burst, len(script) - end.position)):
            self._send(end)

    def _send(self, end: End) -> None:
        kind, number = self.scenario.scripts[end.name][end.position]
        end.position += 1
        end.sent.append((kind, number))
        line = b"%d" % number
        if kind == "m":
            end.protocol.send(line)
            return
        if kind == "w":
            entry = Entry(line, number, None)
            entry.waiter = "somebody"
            end.entries.append(entry)
            end.protocol.send(entry)
            return
        token = Token(number, self.fds_of(number), self, end.name)
        pending = Held(
            token,
            "net.Socket",
            read=token.read,
            fds_needed=len(token.fds),
            on_delivered=token.close,
        )
        entry = Entry(line, number, pending)
        entry.waiter = "somebody"
        end.entries.append(entry)
        end.protocol.send(entry)

    def _do_withdraw(self, end: End, size: int) -> None:
        """The application cancels a send, or closes the handle while it waits."""
        waiting = [
            entry for entry in end.entries if entry.state in (EntryState.QUEUED, EntryState.STAGED)
        ]
        entry = waiting[self.now_used % len(waiting)]
        self.now_used += 1
        if entry.pending is not None and self.now_used % 3 == 0:
            entry.pending.handle.closed = True
            return
        if not end.protocol.outgoing.withdraw(entry):
            raise Violation(f"{entry.message} has not left and could not be withdrawn")
        end.withdrawn.append(entry.message)
        if entry.pending is not None:
            end.held[entry.message] = entry.pending.handle

    def _do_begin(self, end: End, size: int) -> None:
        """The application begins to read."""
        end.reads = True
        self._do_want(end, size)

    def _do_leave(self, end: End, size: int) -> None:
        """The reader is cancelled, and a turn ends; perhaps another comes, later."""
        self.now_used += 1
        end.protocol.begin_turn(reader_waits=False)
        end.reads = bool(self.now_used % 2)

    def _do_want(self, end: End, size: int) -> None:
        """A reader waits, and a turn begins."""
        end.has_earned = True
        end.protocol.begin_turn(reader_waits=True)
        end.protocol.incoming.pump()

    def _do_await(self, end: End, size: int) -> None:
        """A turn of the loop: its sends are awaited, or are not any more."""
        self.now_used += 1
        protocol = end.protocol
        protocol.begin_turn(reader_waits=False)
        waits = bool(protocol.outgoing.waiting_descriptors) and self.now_used % 3 > 0
        protocol.watch_waits(for_peer=waits, for_kernel=False)
        end.has_earned |= waits
        protocol.incoming.pump()

    def _do_write(self, end: End, size: int) -> None:
        protocol = end.protocol
        stage = protocol.next_stage()
        if stage is None:
            return
        peer = self.ends[self.other(end.name)]
        if self.is_gone(peer) or peer.shut_reading:
            protocol.wrote(BrokenPipeError())
            self._end(end, protocol.end)
            return
        room = self.scenario.capacity - sum(len(data) for data, _ in self.pipes[peer.name])
        fds = stage.fds if not stage.offset else []
        if fds and self.in_flight() > self.scenario.in_flight:
            protocol.wrote(Refused.IN_FLIGHT)
            return
        if room <= 0:
            return
        data = bytes(stage.data)[stage.offset :][: min(room, size)]
        self.pipes[peer.name].append((data, list(fds)))
        for fd in fds:
            self.counts[fd]["flight"] += 1
        protocol.wrote(len(data))

    def _do_read(self, end: End, size: int) -> None:
        data, sets = self._receive(end, size)
        for i, batch in enumerate(end.framer.feed(data)):
            end.protocol.received(dataclasses.replace(batch, sets=() if i else sets))

    def _receive(self, end: End, size: int) -> tuple[bytes, list[DescriptorSet]]:
        """One recvmsg: joins plain bytes with what carries descriptors, and then stops."""
        pipe, data, got, lost, found = self.pipes[end.name], b"", [], False, False
        while pipe and len(data) < size:
            bytes_, fds = pipe[0]
            if fds and (found or (data and self.scenario.stops_before)):
                break
            part = bytes_[: size - len(data)]
            data += part
            if fds:
                found = True
                arrived = fds[: max(0, self.free(end.name))]
                for fd in fds:
                    self.counts[fd]["flight"] -= 1
                for fd in arrived:
                    self.counts[fd][end.name] += 1
                got, lost = arrived, len(arrived) < len(fds)
            pipe.popleft()
            if len(part) < len(bytes_):
                pipe.appendleft((bytes_[len(part) :], []))
                break
            if fds and not self.scenario.stops_before:
                break
        start = end.received
        end.received += len(data)
        if not (got or lost):
            return data, []
        return data, [DescriptorSet(got, start, end.received, lost)]

    def _do_eof(self, end: End, size: int) -> None:
        end.protocol.end()

    def _do_reap(self, end: End, size: int) -> None:
        """The peer's process is known to be dead, though a copy of its socket lives on."""
        self._end(end, partial(end.protocol.end, peer_is_dead=True))

    def _do_tick(self, end: End, size: int) -> None:
        self.now = max(self.now, end.protocol.deadline or 0)
        end.protocol.on_deadline()

    def _do_take(self, end: End, size: int) -> None:
        number, handle = take_one(end.protocol.incoming.deliveries)
        end.got.append(number)
        if handle is not None:
            if handle.number != number:
                raise Violation(f"message {number} came with handle {handle.number}")
            end.held[number] = handle
        end.protocol.incoming.pump()

    def _do_close(self, end: End, size: int) -> None:
        end.held.pop(min(end.held)).close()

    def _do_disconnect(self, end: End, size: int) -> None:
        end.protocol.disconnect(ENDLESS)

    def _do_abort(self, end: End, size: int) -> None:
        self._end(end, partial(end.protocol.end, LocalProtocolError("aborted")))

    def _end(self, end: End, settle: Callable[[], None]) -> None:
        """The order of every end: shut the reading side down, read to the end, settle."""
        end.shut_down_reading()
        while self.pipes[end.name] and end.protocol.state is not State.CLOSED:
            self._do_read(end, 1 << 20)
        settle()

    def _do_crash(self, end: End, size: int) -> None:
        end.alive = False
        for count in self.counts.values():
            count[end.name] = 0
        self._close_socket(end)
        end.held.clear()

    def _after(self, end: End) -> None:
        protocol = end.protocol
        outcomes = protocol.outgoing.outcomes
        while outcomes:
            entry, reason = outcomes.popleft()
            if entry.pending is None:
                continue
            number = entry.message
            if entry.pending.handle.closed and reason is not None:
                entry.pending.handle.closed = False
            if reason is None:
                end.acked.append(number)
            elif not entry.in_doubt:
                end.back.append((number, reason))
                end.held[number] = entry.pending.handle
                if number in self.ends[self.other(end.name)].got:
                    raise Violation(f"handle {number} came back and was delivered ({reason})")
            else:
                end.back.append((number, "in doubt"))
        if protocol.finished:
            self._end(end, partial(protocol.end, politely=True))
        elif protocol.give_up is not None and protocol.state is not State.CLOSED:
            self._end(end, partial(protocol.end, protocol.give_up))
        if protocol.state is State.CLOSED and end.open:
            self._close_socket(end)

    def _close_socket(self, end: End) -> None:
        """The last step of every end; a crash has no other. A copy keeps what nobody has read."""
        end.open = False
        end.shut_writing = end.alive
        if end.name not in self.scenario.copies:
            self._drop_unread(end)

    def _drop_unread(self, end: End) -> None:
        for _, fds in self.pipes[end.name]:
            for fd in fds:
                self.counts[fd]["flight"] -= 1
        self.pipes[end.name].clear()

    # -- what must hold --------------------------------------------------------------------------

    def check_order(self) -> None:
        for name, end in self.ends.items():
            sent = iter([number for _, number in end.sent])
            got = self.ends[self.other(name)].got
            if not all(number in sent for number in got):
                raise Violation(f"order: sent {end.sent}, got {got}")

    def check_bounds(self) -> None:
        for end in self.ends.values():
            incoming, limits = end.protocol.incoming, end.protocol.limits
            largest = self.scenario.fds_each
            out = end.protocol.outgoing.window.descriptors_out
            if out > max(limits.window, largest):
                raise Violation(f"{out} descriptors unacknowledged, {limits.window} granted")
            deliveries = incoming.deliveries
            # An invited end may get one handle in the node dialect, acknowledged at arrival.
            early = int(self.scenario.roles != "fork" or end.name == "B")
            ahead = early + (max(limits.ready, largest) if end.has_earned else 0)
            if incoming.native and deliveries.waiting_descriptors > ahead:
                raise Violation(f"{deliveries.waiting_descriptors} acknowledged descriptors wait")
            held = sum(len(item.fds or ()) for item in incoming.held)
            if held > max(limits.window, largest) + 1:
                raise Violation(f"{held} descriptors are held")

    def key(self) -> object:
        return (
            [
                (
                    end.position,
                    len(end.got),
                    len(end.back),
                    len(end.acked),
                    end.received,
                    end.open,
                    len(end.held),
                    end.protocol.outgoing.window.bytes_sent,
                    len(end.protocol.outgoing.queue.items),
                    end.protocol.state,
                )
                for end in self.ends.values()
            ],
            [sum(len(data) for data, _ in pipe) for pipe in self.pipes.values()],
            sorted((fd, *count.items()) for fd, count in self.counts.items()),
        )

    def run_fair(self, rng: random.Random) -> None:
        """Everything that can happen does, and nobody dies, until nothing changes any more."""
        quiet = 0
        for _ in range(4000):
            before = self.key()
            for step in self.steps():
                if step[0] not in ("withdraw", "leave") and step in self.steps():
                    self.do(step, rng.choice([3, 9, 1 << 20]))
                    self.check_bounds()
            quiet = quiet + 1 if self.key() == before else 0
            if quiet > 12:
                return
        raise Violation("it never comes to rest")

    def check_done(self) -> None:
        """At rest: every handle was delivered once, came back once, or died with its owner."""
        crashed = {name for what, name in self.ended if what == "crash"}
        for name, end in self.ends.items():
            if name in crashed:
                continue
            peer = self.ends[self.other(name)]
            back = [number for number, _ in end.back]
            for kind, number in end.sent:
                delivered, returned = number in peer.got, number in back
                if number in end.withdrawn:
                    if delivered or returned:
                        raise Violation(f"{number} was withdrawn, and yet it went somewhere")
                    continue
                doubtful = (number, "in doubt") in end.back
                if delivered and returned and not doubtful:
                    raise Violation(f"{number} was delivered and came back")
                if delivered or returned:
                    continue
                self._check_undelivered(kind, number, end, peer, crashed)

    def _check_undelivered(
        self, kind: str, number: int, end: End, peer: End, crashed: set[str]
    ) -> None:
        if kind in "mw":
            if not self.ended and self.scenario.reads[peer.name]:
                raise Violation(f"message {number} never arrived")
            return
        waits = any(
            handle is not None and message == number
            for message, handle in peer.protocol.incoming.ready
        )
        if peer.name in crashed and number in end.acked:
            return  # acknowledged, then its owner died
        if waits and peer.name not in crashed:
            return  # acknowledged, and the application does not read
        raise Violation(f"handle {number} was neither delivered nor came back")

    def check_leaks(self) -> None:
        for name, end in self.ends.items():
            if not end.alive:
                self._drop_unread(end)  # the copies of a dead process end some time, too
                continue
            if end.open:
                raise Violation(f"{name} never closed")
            mine = {fd for fd, count in self.counts.items() if count[name]}
            known = {fd for token in end.held.values() for fd in token.fds}
            for _, handle in end.protocol.incoming.ready:
                if handle is not None:
                    known |= set(handle.fds)
            script = self.scenario.scripts.get(name, [])
            for kind, number in script[end.position :]:
                known |= set(self.fds_of(number)) if kind == "h" else set()
            if mine - known:
                raise Violation(f"{name} leaks {mine - known}")
        if self.in_flight():
            raise Violation("descriptors in flight at the end")


def random_scenario(rng: random.Random) -> Scenario:
    """A short script for each end, in a world that is narrow somewhere."""
    number = 0
    scripts: dict[str, list[tuple[str, int]]] = {}
    for name in "AB":
        scripts[name] = []
        kinds = rng.choice(["mwhh", "mwhh", "hhhhhhm", "mmmmmmh"])
        for _ in range(rng.randint(0, 10)):
            number += 1
            scripts[name].append((rng.choice(kinds), number))
    fds_each = rng.choice([1, 1, 1, 2, 3, 7])
    roles = rng.choice(["fork", "fork", "node", "both"])
    if roles != "fork":
        fds_each = 1
    return Scenario(
        scripts=scripts,
        roles=roles,
        slots={
            name: rng.choice([999, 999, 4, 3, 2, 1, 0])
            + (fds_each - 1)
            + fds_each * sum(kind == "h" for kind, _ in scripts[name])
            for name in "AB"
        },
        in_flight=rng.choice([999, 999, 3, 1]),
        capacity=rng.choice([400, 60, 25]),
        stops_before=rng.random() < 0.3,
        limits=narrow_limits(rng),
        fds_each=fds_each,
        withdraws=rng.choice([0, 0, 0.1]),
        refused=frozenset(rng.sample(range(1, 21), 3)) if rng.random() < 0.3 else frozenset(),
        late=frozenset(rng.choice(["", "", "A", "B", "AB"])),
        copies=frozenset(rng.choice(["", "", "", "A", "B", "AB"])),
        burst=rng.choice([1, 3, 9]),
        lines=rng.choice([1, 2, 1024]),
    )


FAULTS = {
    "none": [],
    "crash": ["crash"],
    "abort": ["abort"],
    "disconnect": ["disconnect"],
    "both disconnect": ["disconnect", "disconnect"],
    "disconnect, then crash": ["disconnect", "crash"],
}


def run_random(seed: int) -> World:
    """One run: random steps with a fault somewhere, then fair steps to the end, then the checks.

    Raises:
        Violation: a promise was broken. The seed reproduces it.
    """
    rng = random.Random(seed)
    world = World(random_scenario(rng))
    plan = list(FAULTS[rng.choice(list(FAULTS))])
    at = rng.randint(0, 120)
    sizes = rng.choice([[1 << 20], [1, 2, 7, 1 << 20], [5, 30, 1 << 20], [1]])
    lazy = {name: rng.choice([1, 1, 0.2, 0.03]) for name in "AB"}
    for i in range(rng.randint(20, 400)):
        if plan and i >= at:
            what, name = plan.pop(0), rng.choice("AB")
            end = world.ends[name]
            if end.alive and (end.open or what == "crash"):
                world.do((what, name))
            at = i + rng.randint(0, 40)
        steps = [
            step
            for step in world.steps()
            if (step[0] not in ("take", "close") or rng.random() < lazy[step[1]])
            and (step[0] != "withdraw" or rng.random() < world.scenario.withdraws)
        ]
        if steps:
            world.do(rng.choice(steps), rng.choice(sizes))
        world.check_bounds()
        world.check_order()
    world.run_fair(rng)
    world.check_order()
    world.check_done()
    if not world.ended:
        for name in rng.choice(["A", "B", "AB"]):
            world.do(("disconnect", name))
        world.run_fair(rng)
    for end in world.ends.values():
        if end.protocol.error is not None and "aborted" not in str(end.protocol.error):
            raise Violation(f"an honest peer was accused: {end.protocol.error}")
    world.check_done()
    world.check_leaks()
    world.check_order()
    return world


def main() -> None:
    """Run the seeds of a range: ``python -m tests.model_kernel 0 100000``."""
    first, last = int(sys.argv[1]), int(sys.argv[2])
    for seed in range(first, last):
        try:
            run_random(seed)
        except Violation as violation:
            sys.exit(f"seed {seed}: {violation}")
    print(f"{last - first} runs, no violation")


if __name__ == "__main__":
    main()
