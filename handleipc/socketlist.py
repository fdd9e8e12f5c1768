"""Connections of one server that live in other processes: counted, waited for, reported.

Node's SocketListSend and SocketListReceive (lib/internal/socket_list.js), with its four internal
messages, and one of our own between native ends::

    NODE_SOCKET_GET_COUNT     ->      how many connections of this key are open with you?
    NODE_SOCKET_COUNT         <-      so many
    NODE_SOCKET_NOTIFY_CLOSE  ->      tell me when the last of them has closed
    NODE_SOCKET_ALL_CLOSED    <-      now
    NODE_SOCKET_CLOSED        <-      so many have closed (native: Node has no such message)

A ``Group`` is the connections of one key as one process knows them: those open here, and a
``SocketListSend`` for each channel that some went through. A server has one; a process that was
handed connections has one for each channel and key, and answers for those that it handed on.

Pure: sends through a callable, knows no clock. Every question ends when its channel does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from handleipc.typing import JSON

__all__ = ["Group", "SocketListSend", "SocketLists", "Tally"]

GET_COUNT = "NODE_SOCKET_GET_COUNT"
COUNT = "NODE_SOCKET_COUNT"
NOTIFY_CLOSE = "NODE_SOCKET_NOTIFY_CLOSE"
ALL_CLOSED = "NODE_SOCKET_ALL_CLOSED"
CLOSED = "NODE_SOCKET_CLOSED"

# A count, None from a peer that is gone, or -1 from one whose answer made no sense.
Answer = Callable[[int | None], None]
NONSENSE = -1
# Node asks once for each close() of a server; more than this is a peer that fills our memory.
MOST_WAITING = 1000


class Group:
    """The connections of one key, here and wherever this process has handed them.

    Args:
        key: the name of the server on the wire.
        on_shrunk: called with how many connections are known to have closed, here or further on.
    """

    __slots__ = ("_on_shrunk", "_tallies", "_when_empty", "key", "lists", "local")

    def __init__(self, key: str, on_shrunk: Callable[[int], None] | None = None) -> None:
        self.key = key
        self.local = 0
        """Connections open in this process."""
        self.lists: set[SocketListSend] = set()
        self._on_shrunk = on_shrunk
        self._tallies: set[Tally] = set()
        self._when_empty: list[Callable[[], None]] = []

    @property
    def known(self) -> int:
        """Connections open here and with peers that report each close."""
        return self.local + sum(one.open for one in self.lists if one.reports)

    @property
    def waiting(self) -> int:
        """How many wait for the group to be empty."""
        return len(self._when_empty)

    @property
    def is_empty(self) -> bool:
        """Whether none is open here, and no peer may have one."""
        return not self.local and all(one.settled for one in self.lists)

    def opened_here(self) -> None:
        """One more is open in this process."""
        self.local += 1

    def closed_here(self) -> None:
        """One was closed, or given to somebody who does not count."""
        self.local -= 1
        self.shrunk(1)

    def handed_on(self, through: SocketListSend) -> None:
        """One that was open here is the peer's now."""
        self.local -= 1
        for tally in self._tallies:
            tally.handed_on(through)
        through.delivered()
        if self._when_empty:
            through.ask_when_closed()
        self.check_empty()

    def shrunk(self, count: int) -> None:
        """So many are known to have closed."""
        if count and self._on_shrunk is not None:
            self._on_shrunk(count)
        self.check_empty()

    def count(self, done: Callable[[Tally], None]) -> Tally:
        """Ask every peer, and call ``done`` when all have answered or ended."""
        tally = Tally(self, done)
        self._tallies.add(tally)
        tally.ask()
        return tally

    def counted(self, tally: Tally) -> None:
        """The question is answered, or given up."""
        self._tallies.discard(tally)

    def when_empty(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once, when the last connection anywhere has closed."""
        self._when_empty.append(callback)
        for one in self.lists:
            if not one.settled:
                one.ask_when_closed()
        self.check_empty()

    def check_empty(self) -> None:
        """Call those who wait, if it is time."""
        if self._when_empty and self.is_empty:
            waiting, self._when_empty = self._when_empty, []
            for callback in waiting:
                callback()


class Tally:
    """One question, how many, to all that may know.

    Attributes:
        missing: the lists whose peer has not answered, or not sensibly.
    """

    __slots__ = ("_answered", "_done", "_group", "_waiting", "count", "missing")

    def __init__(self, group: Group, done: Callable[[Tally], None]) -> None:
        self._group = group
        self._done: Callable[[Tally], None] | None = done
        self._waiting = set(group.lists)
        self._answered: set[SocketListSend] = set()
        self.missing: set[SocketListSend] = set()
        self.count = 0

    def ask(self) -> None:
        """Put the question."""
        for one in list(self._waiting):
            one.get_count(partial(self._answer, one))
        self._check()

    def handed_on(self, through: SocketListSend) -> None:
        """A connection went through a list: if that has answered already, it did not count it."""
        if through in self._answered:
            self.count += 1

    def give_up(self) -> None:
        """Who has not answered by now is missing."""
        self.missing |= self._waiting
        self._waiting.clear()
        self._check()

    def _answer(self, one: SocketListSend, count: int | None) -> None:
        if one not in self._waiting:
            return
        self._waiting.discard(one)
        if count == NONSENSE:
            self.missing.add(one)
        elif count is not None:  # a peer that is gone holds none
            self.count += count
            self._answered.add(one)
        self._check()

    def _check(self) -> None:
        if self._waiting or self._done is None:
            return
        # Read last: what was acknowledged meanwhile is counted there, and no longer here.
        self.count += self._group.local
        done, self._done = self._done, None
        self._group.counted(self)
        done(self)


class SocketListSend:
    """Connections of one group that went through one channel.

    Args:
        group: whose they are.
        send: sends an internal message to the peer.
        peer: whom to name when it does not answer.
        on_forget: called with the key when the list is not needed any more.
    """

    __slots__ = (
        "_awaits_close",
        "_group",
        "_on_forget",
        "_requests",
        "_send",
        "open",
        "peer",
        "reports",
    )

    def __init__(
        self,
        group: Group,
        send: Callable[[JSON], None],
        peer: object,
        on_forget: Callable[[str], None],
    ) -> None:
        self._group = group
        self._send = send
        self._on_forget = on_forget
        self.reports = False
        """Whether the peer reports each close."""
        self._requests: deque[list[Answer]] = deque()
        self._awaits_close = False
        self.peer = peer
        self.open = 0
        """Connections delivered and not known to have closed. Node tells only when all have."""

    @property
    def settled(self) -> bool:
        """Whether the peer has none, as far as it has said."""
        return not self.open

    def delivered(self) -> None:
        """The peer acknowledged one more."""
        self.open += 1

    def get_count(self, answer: Answer) -> None:
        """Ask. Answers come in the order of the questions, and carry no number to match by."""
        self._requests.append([answer])
        self._send({"cmd": GET_COUNT, "key": self._group.key})

    def ask_when_closed(self) -> None:
        """Have the peer tell when the last has closed."""
        if not self._awaits_close:
            self._awaits_close = True
            self._send({"cmd": NOTIFY_CLOSE, "key": self._group.key})

    def received(self, command: str, message: dict[str, Any]) -> bool:
        """Take what the peer says of this key. Returns False if it makes no sense."""
        if command == ALL_CLOSED:
            return self._all_closed()
        count = message.get("count")
        if type(count) is not int or count < 0:
            count = NONSENSE
        if command == CLOSED:
            if count == NONSENSE or count > self.open:
                return False
            self.open -= count
            self._group.shrunk(count)
            return True
        if not self._requests:
            return False
        for answer in self._requests.popleft():
            answer(count)
        return count != NONSENSE

    def _all_closed(self) -> bool:
        if not self._awaits_close:
            return False
        self._awaits_close = False
        closed, self.open = self.open, 0
        self._group.shrunk(closed)
        return True

    def forget(self) -> None:
        """The server has ended: its channel may forget this list."""
        self._group.lists.discard(self)
        self._on_forget(self._group.key)

    def ended(self) -> None:
        """The channel is gone, and with it the peer's connections, as far as we can know."""
        requests, self._requests = self._requests, deque()
        closed, self.open = self.open, 0
        self._group.lists.discard(self)
        for answers in requests:
            for answer in answers:
                answer(None)
        self._group.shrunk(closed)
        self._group.check_empty()


class SocketLists:
    """All lists of one channel, and the one dispatcher of its NODE_SOCKET messages.

    Args:
        send: sends an internal message to the peer, or does nothing once the channel has ended.
        peer: whom to name when the peer does not answer.
        on_report: called when closes wait to be reported, with ``flush_reports``.
    """

    def __init__(
        self, send: Callable[[JSON], None], peer: object, on_report: Callable[[], None]
    ) -> None:
        self._send = send
        self._peer = peer
        self._on_report = on_report
        self._sent: dict[str, SocketListSend] = {}
        self._received: dict[str, Group] = {}
        self._reports: dict[str, int] = {}
        self.has_ended = False

    def __len__(self) -> int:
        return len(self._sent) + len(self._received)

    def sender(self, group: Group, *, reports: bool) -> SocketListSend:
        """Return the list of this channel for connections of ``group``, a new one if need be."""
        found = self._sent.get(group.key)
        if found is None or found not in group.lists:
            found = SocketListSend(group, self._send, self._peer, self._forget)
            self._sent[group.key] = found
            group.lists.add(found)
        found.reports = found.reports or reports
        return found

    def _forget(self, key: str) -> None:
        self._sent.pop(key, None)

    def receiver(self, key: str) -> Group:
        """Return the group of the connections received here with this key."""
        group = self._received.get(key)
        if group is None:
            group = self._received[key] = Group(key, partial(self._shrunk, key))
        return group

    def received(self, message: JSON) -> str | None:
        """Take a NODE_SOCKET message of the peer.

        Returns:
            What was wrong with it, in words; None if nothing was, or it is no such message.
        """
        command, key = message["cmd"], message.get("key")
        if command not in (GET_COUNT, COUNT, NOTIFY_CLOSE, ALL_CLOSED, CLOSED):
            return None
        if not isinstance(key, str):
            return f"the peer sent {command} without a key"
        if command in (GET_COUNT, NOTIFY_CLOSE):
            self._asked(command, key)
            return None
        found = self._sent.get(key)
        if found is None:
            # A late answer about a server that has ended; Node may send one, too.
            return None
        if not found.received(command, message):
            return f"the peer sent a {command} that makes no sense: {message!r}"
        return None

    def _asked(self, command: str, key: str) -> None:
        # Of a key never seen, or forgotten since, there are none. Node would not answer at all.
        group = self._received.get(key) or Group(key)
        if command == GET_COUNT:
            group.count(lambda tally: self._reply(COUNT, key, count=tally.count))
        elif group.waiting < MOST_WAITING:
            group.when_empty(lambda: self._reply(ALL_CLOSED, key))

    def _reply(self, command: str, key: str, **fields: int) -> None:
        if not self.has_ended:
            # Reports first: what the peer learns next includes them.
            self.flush_reports()
            self._send({"cmd": command, "key": key, **fields})

    def _shrunk(self, key: str, count: int) -> None:
        if not self.has_ended:
            self._reports[key] = self._reports.get(key, 0) + count
            self._on_report()
        group = self._received.get(key)
        if group is not None and group.is_empty and not group.lists:
            group.check_empty()
            del self._received[key]

    def flush_reports(self) -> None:
        """Report the closes of this turn, if the peer takes such reports."""
        reports, self._reports = self._reports, {}
        for key, count in reports.items():
            self._send({"cmd": CLOSED, "key": key, "count": count})

    def discard_reports(self) -> None:
        """The peer speaks node: it knows no such message."""
        self._reports.clear()

    def ended(self) -> None:
        """The channel has ended."""
        self.has_ended = True
        self._reports.clear()
        lists: Iterable[SocketListSend] = list(self._sent.values())
        self._sent.clear()
        for one in lists:
            one.ended()
        self._received = {k: group for k, group in self._received.items() if not group.is_empty}
