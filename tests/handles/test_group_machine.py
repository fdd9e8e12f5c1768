"""Socket lists in every order: a server, a tree of processes, and connections that wander in it.

Each process is a set of ``SocketLists`` joined to its neighbours' by queues, which are delivered in
any order between channels, and in order within one. The model is where each connection is, and by
which way it came: the server counts it as long as every process on that way lives.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import Any, ClassVar

import hypothesis
import hypothesis.stateful
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from handleipc.handles.group import Group, Tally
from handleipc.handles.tracking import SocketLists
from handleipc.wire import codec

KEY = "k"
MOST_PROCESSES = 6
MOST_CONNECTIONS = 25
PICK = st.integers(0, 10_000)


class Process:
    """A process: alive, and its channels' ends."""

    def __init__(self, name: str, depth: int) -> None:
        self.name, self.depth = name, depth
        self.alive = True
        self.up: End | None = None
        self.downs: list[End] = []
        self.posted: deque[Callable[[], None]] = deque()

    def take_posted(self) -> None:
        """What its loop would do next: take the closes that were noted."""
        while self.posted:
            self.posted.popleft()()

    def __repr__(self) -> str:
        return self.name

    @property
    def ends(self) -> list[End]:
        return [*([self.up] if self.up else []), *self.downs]


class End:
    """A process's end of a channel: its lists, what comes, and what was sent and not answered."""

    def __init__(self, process: Process, link: Link) -> None:
        self.process, self.link = process, link
        self.other: End
        self.open = True
        self.inbox: deque[tuple[Any, ...]] = deque()
        self.unacknowledged: deque[tuple[Connection, Group]] = deque()
        self.lists = SocketLists(
            self._send, self, lambda: None, lambda: link.native, post=process.posted.append
        )

    def put(self, *item: Any) -> None:
        """Write to the peer, if it lives."""
        if self.other.process.alive:
            self.other.inbox.append(item)

    def _send(self, message: Any) -> None:
        if self.open:
            self.put("message", codec.read(codec.spell(message), 1 << 20))

    def flush(self) -> None:
        """What a turn of the channel does with the closes of the turn."""
        self.lists.flush_reports()


class Link:
    """A channel between two processes, in one of the dialects."""

    def __init__(self, parent: Process, child: Process, *, native: bool) -> None:
        self.native = native
        self.a, self.b = End(parent, self), End(child, self)
        self.a.other, self.b.other = self.b, self.a

    @property
    def alive(self) -> bool:
        return self.a.process.alive and self.b.process.alive


class Connection:
    """Where a connection is, and by which channels it came there from the server."""

    def __init__(self, holder: Process, group: Group) -> None:
        self.holder: Process | None = holder
        self.group = group
        self.path: tuple[Link, ...] = ()
        self.flying = False
        self.unacknowledged = 0
        self.is_open = True

    @property
    def is_tracked(self) -> bool:
        """Whether every process that it came through lives."""
        return self.is_open and all(link.alive for link in self.path)

    @property
    def may_be_tracked(self) -> bool:
        """As that, but going forth and back through one channel may be forgotten."""
        way: list[Link] = []
        for link in self.path:
            if way and way[-1] is link:
                way.pop()
            else:
                way.append(link)
        return self.is_open and all(link.alive for link in way)

    @property
    def was_returned(self) -> bool:
        return len(set(self.path)) < len(self.path)


class Question:
    """A tally under way, and what it may come to."""

    def __init__(self, machine: ListsMachine) -> None:
        self.machine = machine
        self.at_least = [c for c in machine.connections if c.is_tracked]
        # Until its acknowledgement is read a sender counts a connection, closed or not.
        self.at_most = [c for c in machine.connections if c.may_be_tracked or c.unacknowledged]
        self.began = len(machine.connections)
        self.given_up = False
        self.done: list[int] = []
        machine.questions.append(self)
        self.tally: Tally = machine.server.count(self._answered)

    def _answered(self, tally: Tally) -> None:
        self.machine.questions.remove(self)
        self.done.append(tally.count)
        assert len(self.done) == 1
        assert self.given_up or not tally.missing
        if self.machine.counts_on_the_move:
            lower = 0 if self.given_up else sum(c.is_tracked for c in self.at_least)
            upper = len(self.at_most) + len(self.machine.connections) - self.began
            assert lower <= tally.count <= upper


class ListsMachine(RuleBasedStateMachine):
    """Connections of one server, moved about."""

    returned_travel_on: ClassVar[bool] = False
    """Whether a connection that was given back goes elsewhere afterwards."""
    counts_on_the_move: ClassVar[bool] = False
    """Whether a count is checked that was asked for while connections moved."""
    forgets: ClassVar[bool] = False
    """Whether lists in the middle must be gone with their last connection."""
    only_native: ClassVar[bool] = False

    @initialize()
    def begin(self) -> None:
        self.shrunk = 0
        self.root = Process("root", 0)
        self.server = Group(KEY, self._on_shrunk, post=self.root.posted.append)
        self.processes = [self.root]
        self.connections: list[Connection] = []
        self.questions: list[Question] = []
        self.closed = False
        self.told = self.asked = 0
        for native in (True, self.only_native, True):
            self.start_process(len(self.processes) - 1 if native else 0, native)
        self.accept(3)

    def _on_shrunk(self, count: int) -> None:
        self.shrunk += count

    # -- what there is to choose from ------------------------------------------------------------

    @property
    def living(self) -> list[Process]:
        return [p for p in self.processes if p.alive]

    @property
    def busy(self) -> list[End]:
        return [end for p in self.living for end in p.ends if end.inbox]

    @property
    def held(self) -> list[Connection]:
        return [c for c in self.connections if c.is_open and not c.flying]

    # -- rules -----------------------------------------------------------------------------------

    @precondition(lambda self: len(self.living) < MOST_PROCESSES)
    @rule(pick=PICK, native=st.booleans())
    def start_another(self, pick: int, native: bool) -> None:
        self.start_process(pick, native)

    def start_process(self, pick: int, native: bool) -> None:
        parents = [p for p in self.living if p.depth < 3]
        parent = parents[pick % len(parents)]
        child = Process(f"p{len(self.processes)}", parent.depth + 1)
        link = Link(parent, child, native=native or self.only_native)
        parent.downs.append(link.a)
        child.up = link.b
        self.processes.append(child)

    @precondition(lambda self: not self.closed and len(self.held) < MOST_CONNECTIONS)
    @rule(count=st.integers(1, 4))
    def accept_more(self, count: int) -> None:
        self.accept(count)

    def accept(self, count: int) -> None:
        for _ in range(count):
            self.server.opened_here()
            self.connections.append(Connection(self.root, self.server))

    @precondition(lambda self: self.held)
    @rule(pick=PICK, way=PICK)
    def send(self, pick: int, way: int) -> None:
        self._send(pick, way)

    @precondition(lambda self: self.held)
    @rule(pick=PICK, way=PICK)
    def hand_over(self, pick: int, way: int) -> None:
        end = self._send(pick, way)
        if end is not None:
            for one in (end.other, end):
                while one.inbox:
                    self._deliver(one)

    def _send(self, pick: int, way: int) -> End | None:
        connection = self.held[pick % len(self.held)]
        process = connection.holder
        assert process is not None
        ends = [end for end in process.ends if end.open]
        if not self.returned_travel_on:
            if connection.was_returned:
                return None
            # Down, or back from where it came.
            ends = [e for e in ends if e in process.downs or e.link in connection.path[-1:]]
        if not ends:
            return None
        end = ends[way % len(ends)]
        connection.flying = True
        connection.unacknowledged += 1
        end.unacknowledged.append((connection, connection.group))
        end.put("handle", connection)
        return end

    @precondition(lambda self: self.held)
    @rule(pick=PICK)
    def close_connection(self, pick: int) -> None:
        self._close(self.held[pick % len(self.held)])

    def _close(self, connection: Connection) -> None:
        connection.is_open = False
        connection.holder = None
        connection.group.closed_here()

    @rule(pick=PICK)
    def take_closes(self, pick: int) -> None:
        self.living[pick % len(self.living)].take_posted()

    @precondition(lambda self: len(self.living) > 1)
    @rule(pick=PICK)
    def kill(self, pick: int) -> None:
        victims = self.living[1:]
        self._kill(victims[pick % len(victims)])

    def _kill(self, victim: Process) -> None:
        victim.alive = False
        for connection in self.held:
            if connection.holder is victim:
                connection.is_open = False
        for end in victim.ends:
            lost, end.inbox = end.inbox, deque()
            for kind, *what in lost:
                # A living sender gets it back.
                if kind == "handle" and not end.other.process.alive:
                    what[0].is_open = False
            end.put("eof")

    @precondition(lambda self: self.busy)
    @rule(pick=PICK, count=st.integers(1, 5))
    def deliver(self, pick: int, count: int) -> None:
        end = self.busy[pick % len(self.busy)]
        for _ in range(min(count, len(end.inbox))):
            self._deliver(end)

    def _deliver(self, end: End) -> None:
        kind, *what = end.inbox.popleft()
        if kind == "message":
            assert end.lists.received(what[0]) is None, what
        elif kind == "handle":
            (connection,) = what
            connection.flying = False
            connection.holder = end.process
            connection.path += (end.link,)
            connection.group = end.lists.receiver(KEY)
            connection.group.opened_here()
            end.put("ack")
        elif kind == "ack":
            connection, group = end.unacknowledged.popleft()
            connection.unacknowledged -= 1
            group.handed_on(end.lists.sender(group, reports=end.link.native))
        else:
            end.open = False
            while end.unacknowledged:
                connection, group = end.unacknowledged.popleft()
                assert connection.group is group
                connection.flying = False
            end.lists.ended()

    @rule(pick=PICK)
    def flush(self, pick: int) -> None:
        ends = [end for p in self.living for end in p.ends if end.open]
        if ends:
            ends[pick % len(ends)].flush()

    @rule()
    def count(self) -> None:
        Question(self)

    @precondition(lambda self: self.questions)
    @rule(pick=PICK)
    def give_up(self, pick: int) -> None:
        question = self.questions[pick % len(self.questions)]
        question.given_up = True
        question.tally.give_up()
        assert question.done

    @rule()
    def close_server(self) -> None:
        self.closed = True
        self.asked += 1
        self.server.when_empty(self._on_empty)

    def _on_empty(self) -> None:
        assert not any(c.is_tracked for c in self.connections), "too early"
        self.told += 1
        for one in list(self.server.lists):
            one.forget()

    # -- what must hold --------------------------------------------------------------------------

    def drain(self) -> None:
        for _ in range(500):
            for process in self.living:
                process.take_posted()
                for end in process.ends:
                    if end.open:
                        end.flush()
            busy = self.busy
            if not (busy or any(process.posted for process in self.living)):
                return
            for end in busy:
                for _ in range(len(end.inbox)):
                    self._deliver(end)
        raise AssertionError("they never stop talking")

    @rule()
    def settle(self) -> None:
        """Once all is delivered, every count agrees with the model."""
        self.drain()
        assert not self.questions
        lower = sum(c.is_tracked for c in self.connections)
        upper = sum(c.may_be_tracked for c in self.connections)
        question = Question(self)
        self.drain()
        assert lower <= question.done[0] <= upper
        if all(end.link.native for p in self.processes for end in p.ends):
            assert lower <= self.server.known <= upper
            assert len(self.connections) - upper <= self.shrunk <= len(self.connections) - lower
        # Those of a channel that has ended came home, to the group they first went out from.
        local = Counter(id(getattr(c.group, "_home", None) or c.group) for c in self.held)
        assert self.server.local == local[id(self.server)]
        for process in self.living:
            for end in process.ends:
                for group in end.lists.received_lists.values():
                    assert group.local == local[id(group)]
        if self.asked and not upper:
            assert self.told == self.asked
        if lower and self.closed:
            assert self.server.waiting
            assert not self.server.is_empty

    def teardown(self) -> None:
        """In the end nothing is open, everybody was told, and no list remains."""
        if not hasattr(self, "server"):
            return
        self.settle()
        for connection in self.held:
            self._close(connection)
        self.close_server()
        self.settle()
        assert self.server.is_empty
        assert self.told == self.asked
        assert not self.server.lists
        if self.forgets:
            for process in self.living:
                assert [len(end.lists) for end in process.ends] == [0] * len(process.ends)
        for process in self.living[1:]:
            self._kill(process)
        self.drain()
        assert not any(len(end.lists) for end in self.root.ends)


def limits(examples: int) -> hypothesis.settings:
    """So many runs of fifty steps, which take a few seconds."""
    return hypothesis.settings(
        max_examples=examples,
        stateful_step_count=50,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


class CountsOnTheMove(ListsMachine):
    """A count asked for while connections move has all that were open all the time, each once."""

    counts_on_the_move = True


class ReturnedTravelOn(ListsMachine):
    """A connection that was given back is given out again, to the same process and to others."""

    returned_travel_on = True
    # Through node-dialect channels, which report no close, one may be counted where it has been
    # as well, until the server closes.
    only_native = True


class NativeOnly(ListsMachine):
    """Where each close is reported, what is known is right without asking."""

    only_native = True


class Forgets(NativeOnly):
    """And a process that handed connections on keeps nothing once they have closed."""

    forgets = True


@pytest.mark.parametrize(
    ("machine", "examples"),
    [
        (ListsMachine, 400),
        (NativeOnly, 300),
        (CountsOnTheMove, 400),
        (ReturnedTravelOn, 300),
        (Forgets, 200),
    ],
)
def test_every_order(machine: type[ListsMachine], examples: int) -> None:
    """Whatever happens in whatever order, every count is right once all is delivered."""
    hypothesis.stateful.run_state_machine_as_test(machine, settings=limits(examples))
