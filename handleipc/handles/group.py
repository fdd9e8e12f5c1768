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

What a peer says of connections is true for the acknowledgements it sent before and not after. So
its words are taken when their line is read, and our own counts are made when their line is written.

A connection may be closed on any thread, and by the collector in the middle of anything. So a close
is only noted where it happens; the group's owner takes the notes, on its own thread, when it has
nothing else in hand. All else is the owner's alone. Counts tell closes from the moment they happen.

Pure: sends and posts through callables, knows no clock and no thread. Every question ends when its
channel does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, TypeGuard

from handleipc.typing import JSON

__all__ = [
    "ALL_CLOSED",
    "CLOSED",
    "COUNT",
    "COUNTING",
    "GET_COUNT",
    "MOST_WAITING",
    "NONSENSE",
    "NOTIFY_CLOSE",
    "QUESTIONS",
    "STATEMENTS",
    "Group",
    "SocketListSend",
    "Tally",
    "is_key",
]

GET_COUNT = "NODE_SOCKET_GET_COUNT"
COUNT = "NODE_SOCKET_COUNT"
NOTIFY_CLOSE = "NODE_SOCKET_NOTIFY_CLOSE"
ALL_CLOSED = "NODE_SOCKET_ALL_CLOSED"
CLOSED = "NODE_SOCKET_CLOSED"
STATEMENTS = frozenset({COUNT, ALL_CLOSED, CLOSED})
"""What a peer says of connections it was handed, to be taken when its line is read."""
QUESTIONS = frozenset({GET_COUNT, NOTIFY_CLOSE})
COUNTING = STATEMENTS | QUESTIONS
"""All of them: no listener gets these."""

# The answer of a peer that made no sense.
NONSENSE = -1
# Questions kept at once. Node asks once for each close() of a server, we once for each count; more
# than this is a peer that fills our memory, or one that hangs.
MOST_WAITING = 100
# Node's keys and ours have less than a hundred characters.
LONGEST_KEY = 512


def is_key(key: object) -> TypeGuard[str]:
    """Say whether this can be the name of a server."""
    return isinstance(key, str) and len(key) <= LONGEST_KEY


class Group:
    """The connections of one key, here and wherever this process has handed them.

    Args:
        key: the name of the server on the wire.
        on_shrunk: called with how many connections are known to have closed, here or further on.
        on_empty: called whenever none is left anywhere.
        post: has the owner call what it is given, soon; called on any thread. None if whoever
            closes is the owner.
    """

    __slots__ = (
        "_closes",
        "_is_posted",
        "_on_empty",
        "_on_shrunk",
        "_open",
        "_post",
        "_tallies",
        "_when_empty",
        "key",
        "lists",
        "moved",
    )

    def __init__(
        self,
        key: str,
        on_shrunk: Callable[[int], None] | None = None,
        on_empty: Callable[[Group], None] | None = None,
        post: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        self.key: str = key
        self._open = 0
        # One entry for each close that was noted and not taken: a deque takes and gives them
        # whole, on any thread, with a GIL or without.
        self._closes: deque[None] = deque()
        self._is_posted = False
        self._post = post
        self.lists: set[SocketListSend] = set()
        self.moved: int = 0
        """Closes that a peer will report of connections which only moved on from it."""
        self._on_shrunk = on_shrunk
        self._on_empty = on_empty
        self._tallies: set[Tally] = set()
        self._when_empty: list[Callable[[], None]] = []

    @property
    def local(self) -> int:
        """Connections open in this process; exact on the owner's thread."""
        return self._open - len(self._closes)

    @property
    def known(self) -> int:
        """Connections open here and with peers that report each close."""
        return self.local + sum(one.open for one in self.lists if one.reports)

    @property
    def waiting(self) -> int:
        """How many wait for the group to be empty."""
        return len(self._when_empty)

    @property
    def counting(self) -> int:
        """How many counts are under way."""
        return len(self._tallies)

    @property
    def is_empty(self) -> bool:
        """Whether none is open here, and no peer may have one."""
        return not self._open and all(one.settled for one in self.lists)

    def opened_here(self) -> None:
        """One more is open in this process."""
        self._open += 1

    def closed_here(self) -> None:
        """One was closed, or given to somebody who does not count: on any thread, at any time."""
        self._closes.append(None)
        if self._post is None:
            self.take_closes()
        elif not self._is_posted:
            # Read after the note was made, and unset before notes are taken: none is forgotten.
            self._is_posted = True
            self._post(self.take_closes)

    def take_closes(self) -> None:
        """Take the closes that were noted. The owner's alone."""
        self._is_posted = False
        count = 0
        while self._closes:
            self._closes.pop()
            count += 1
        if count:
            self.closed(count)

    def closed(self, count: int) -> None:
        """So many were closed here. The owner's alone."""
        self._open -= count
        self.shrunk(count)

    def handed_on(self, through: SocketListSend) -> None:
        """One that was open here is the peer's now."""
        self._open -= 1
        for tally in self._tallies:
            tally.handed_on(through)
        through.delivered()
        if self._when_empty:
            through.ask_when_closed()

    def came_home(self, count: int, before: SocketListSend) -> None:
        """So many are open here again, for which the peer of a list answered."""
        self._open += count
        for tally in self._tallies:
            tally.came_home(count, before)

    def shrunk(self, count: int) -> None:
        """So many are known to have closed."""
        moved = min(count, self.moved)
        self.moved -= moved
        count -= moved
        if count and self._on_shrunk is not None:
            self._on_shrunk(count)
        self.check_empty()

    def count(self, done: Callable[[Tally], None], *, late: bool = False) -> Tally:
        """Ask every peer, and call ``done`` when all have answered or ended.

        Args:
            done: gets the tally.
            late: keep the tally exact while connections move on, until ``Tally.end``.
        """
        tally = Tally(self, done, late)
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
        if not self.is_empty:
            return
        waiting, self._when_empty = self._when_empty, []
        for callback in waiting:
            callback()
        if self._on_empty is not None:
            self._on_empty(self)


class Tally:
    """One question, how many, to all that may know.

    Attributes:
        missing: the lists whose peer has not answered, or not sensibly.
    """

    __slots__ = ("_done", "_elsewhere", "_final", "_group", "_late", "_waiting", "missing")

    def __init__(self, group: Group, done: Callable[[Tally], None], late: bool) -> None:
        self._group = group
        self._done: Callable[[Tally], None] | None = done
        self._late = late
        self._waiting = set(group.lists)
        self._elsewhere = 0
        self._final: int | None = None
        self.missing: set[SocketListSend] = set()

    @property
    def count(self) -> int:
        """Connections here, and with those who have answered."""
        if self._final is not None:
            return self._final
        # Read last: what was acknowledged meanwhile is counted there, and no longer here.
        return self._elsewhere + self._group.local

    def ask(self) -> None:
        """Put the question."""
        for one in list(self._waiting):
            one.get_count(self)
        self._check()

    def handed_on(self, through: SocketListSend) -> None:
        """A connection went through a list: if that was asked and still owes, it will count it."""
        if through not in self._waiting and through not in self.missing:
            self._elsewhere += 1

    def came_home(self, count: int, before: SocketListSend) -> None:
        """Connections are counted here again: not twice, if a peer has counted them."""
        if before not in self._waiting and before not in self.missing:
            self._elsewhere -= min(count, self._elsewhere)

    def give_up(self) -> None:
        """Who has not answered by now is missing."""
        for one in self._waiting:
            one.withdraw(self)
        self.missing |= self._waiting
        self._waiting.clear()
        self._check()

    def answer(self, one: SocketListSend, count: int | None) -> None:
        """Take a peer's count; None if it is gone, and holds none."""
        self._waiting.discard(one)
        if count == NONSENSE:
            self.missing.add(one)
        elif count is not None:
            self._elsewhere += count
        self._check()

    def end(self) -> None:
        """The count was used: nothing changes it any more."""
        self._final = self.count
        self._group.counted(self)

    def _check(self) -> None:
        if self._waiting or self._done is None:
            return
        done, self._done = self._done, None
        if not self._late:
            self.end()
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
        "_on_forget",
        "_requests",
        "_send",
        "group",
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
        self.group: Group = group
        self._send = send
        self._on_forget = on_forget
        self.reports: bool = False
        """Whether the peer reports each close."""
        # Resends come in the order of the questions, and carry no number to match them by.
        self._requests: deque[set[Tally]] = deque()
        self._awaits_close = False
        self.peer: object = peer
        self.open: int = 0
        """Connections delivered and not known to have closed. Node tells only when all have."""

    @property
    def settled(self) -> bool:
        """Whether the peer has none, as far as it has said."""
        return not self.open

    def delivered(self) -> None:
        """The peer acknowledged one more."""
        self.open += 1

    def get_count(self, tally: Tally) -> None:
        """Ask, for this tally."""
        if len(self._requests) >= MOST_WAITING:
            # It hangs: when it answers the last question, that will do.
            self._requests[-1].add(tally)
            return
        self._requests.append({tally})
        self._send({"cmd": GET_COUNT, "key": self.group.key})

    def withdraw(self, tally: Tally) -> None:
        """Nobody waits for this answer any more, though it may come."""
        for tallies in self._requests:
            tallies.discard(tally)

    def ask_when_closed(self) -> None:
        """Have the peer tell when the last has closed."""
        if not self._awaits_close:
            self._awaits_close = True
            self._send({"cmd": NOTIFY_CLOSE, "key": self.group.key})

    def received(self, command: str, message: dict[str, Any]) -> bool:
        """Take what the peer says of this key. Returns False if it makes no sense."""
        if command == ALL_CLOSED:
            return self._all_closed()
        count = message.get("count")
        if type(count) is not int or count < 0:
            count = NONSENSE
        if command == CLOSED:
            if count == NONSENSE:
                return False
            # It may name one more than we know of, when a connection went forth and back through
            # peers of both dialects, of which one reports and the other does not.
            count = min(count, self.open)
            self.open -= count
            self.group.shrunk(count)
            return True
        if not self._requests:
            return False
        for tally in self._requests.popleft():
            tally.answer(self, count)
        return count != NONSENSE

    def _all_closed(self) -> bool:
        if not self._awaits_close:
            return False
        self._awaits_close = False
        closed, self.open = self.open, 0
        self.group.shrunk(closed)
        return True

    def forget(self) -> None:
        """The group is empty: its channel may forget this list. What was asked, is none."""
        self.group.lists.discard(self)
        self._on_forget(self.group.key)
        self._answer_all(0)

    def ended(self) -> None:
        """The channel is gone, and with it the peer's connections, as far as we can know."""
        closed, self.open = self.open, 0
        self.group.lists.discard(self)
        self._answer_all(None)
        self.group.shrunk(closed)

    def _answer_all(self, count: int | None) -> None:
        requests, self._requests = self._requests, deque()
        for tallies in requests:
            for tally in tallies:
                tally.answer(self, count)
