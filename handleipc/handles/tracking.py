"""All socket lists of one channel: what it handed on, what it was handed, and the one dispatcher.

A connection that comes back through the channel it went out by is the peer's to answer for, who
asks us. When it goes out again it returns to the group it first went out from: otherwise two ends
would ask each other for ever. When the channel ends it comes home, since nobody answers for it.

Pure, as ``socketlist``, which has the two sides' bookkeeping.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from handleipc.handles.group import (
    ALL_CLOSED,
    CLOSED,
    COUNT,
    GET_COUNT,
    MOST_WAITING,
    QUESTIONS,
    STATEMENTS,
    Group,
    SocketListSend,
    Tally,
    is_key,
)
from handleipc.texts import quoted
from handleipc.typing import JSON

__all__ = ["SocketListReceive", "SocketLists"]


class SocketLists:
    """All lists of one channel, and the one dispatcher of its NODE_SOCKET messages.

    Args:
        send: sends an internal message to the peer, or does nothing once the channel has ended.
        peer: whom to name when the peer does not answer.
        on_report: called when closes wait to be reported, with ``flush_reports``.
        takes_reports: says whether the peer takes such reports; Node knows none.
        send_late: as ``send``, but makes the message when its line is written, and calls its second
            argument when it was, or never will be.
        post: as ``Group`` takes it.
    """

    def __init__(
        self,
        send: Callable[[JSON], None],
        peer: object,
        on_report: Callable[[], None],
        takes_reports: Callable[[], bool] = lambda: True,
        send_late: Callable[[Callable[[], JSON], Callable[[], None]], None] | None = None,
        *,
        post: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        self._send = send
        self._send_late = send_late or self._send_now
        self._peer = peer
        self._on_report = on_report
        self._takes_reports = takes_reports
        self.post = post
        self.sent_lists: dict[str, SocketListSend] = {}
        self.received_lists: dict[str, SocketListReceive] = {}
        self.reports: dict[str, int] = {}
        self.has_ended: bool = False

    def __len__(self) -> int:
        return len(self.sent_lists) + len(self.received_lists)

    def _send_now(self, make: Callable[[], JSON], ended: Callable[[], None]) -> None:
        self._send(make())
        ended()

    def sender(self, group: Group, *, reports: bool) -> SocketListSend:
        """Return the list of this channel for a connection of ``group``, a new one if need be.

        A channel has one list for each key, since the wire knows no other name. A connection that
        came back and goes out again counts in the group it first went out from.
        """
        if isinstance(group, SocketListReceive):
            group = group.home
        found = self.sent_lists.get(group.key)
        if found is None:
            found = SocketListSend(group, self._send, self._peer, self._forget)
            self.sent_lists[group.key] = found
            group.lists.add(found)
        found.reports = found.reports or reports
        return found

    def _forget(self, key: str) -> None:
        self.sent_lists.pop(key, None)

    def receiver(self, key: str) -> Group:
        """Return the group of the connections received here with this key."""
        group = self.received_lists.get(key)
        if group is None:
            group = self.received_lists[key] = SocketListReceive(key, self)
        return group

    def home_of(self, key: str) -> Group | None:
        """Return the group whose connections of this key went out through this channel."""
        found = self.sent_lists.get(key)
        return found.group if found is not None else None

    def went_out_again(self, key: str) -> None:
        """One that had come back is not the peer's to answer for any more."""
        found = self.sent_lists.get(key)
        if found is None:
            return
        if self._takes_reports():
            # A native peer says so itself, when it hears that it has closed here.
            found.group.moved += 1
        else:
            self.forget_some(key, 1)

    def forget_some(self, key: str, count: int) -> SocketListSend:
        """So many that the peer answered for are not its any more. Returns its list."""
        found = self.sent_lists[key]
        found.open -= min(count, found.open)
        return found

    def received(self, message: JSON) -> str | None:
        """Take a NODE_SOCKET message of the peer.

        Returns:
            What was wrong with it, in words; None if nothing was, or it is no such message.
        """
        command, key = message["cmd"], message.get("key")
        if command not in STATEMENTS and command not in QUESTIONS:
            return None
        if not is_key(key):
            return f"the peer sent {command} without a key"
        if command in QUESTIONS:
            return self._asked(command, key)
        found = self.sent_lists.get(key)
        # None: a late answer about a server that has ended. Node may send one, too.
        if found is not None and not found.received(command, message):
            return (
                f"the peer sent a {command} that makes no sense: {quoted(message.get('count'), 40)}"
            )
        return None

    def _asked(self, command: str, key: str) -> str | None:
        # Of a key never seen, or forgotten since, there are none. Node would not answer at all.
        group = self.received_lists.get(key) or Group(key)
        if group.counting + group.waiting >= MOST_WAITING:
            return f"the peer sent {command} more often than it was answered"
        if command == GET_COUNT:
            group.count(partial(self._reply_count, key), late=True)
        else:
            group.when_empty(partial(self._reply_all_closed, key))
        return None

    def _reply_count(self, key: str, tally: Tally) -> None:
        if self.has_ended:
            tally.end()
            return
        self.flush_reports()
        self._send_late(lambda: {"cmd": COUNT, "key": key, "count": tally.count}, tally.end)

    def _reply_all_closed(self, key: str) -> None:
        if not self.has_ended:
            # Reports first: this says the same of them, and then they would make no sense.
            self.flush_reports()
            self._send({"cmd": ALL_CLOSED, "key": key})

    def shrunk(self, key: str, count: int) -> None:
        """So many that were received with this key have closed."""
        if not self.has_ended:
            self.reports[key] = self.reports.get(key, 0) + count
            self._on_report()

    def take_closes(self) -> None:
        """Take the closes that were noted and not taken: whoever was to do it has gone."""
        for group in list(self.received_lists.values()):
            group.take_closes()

    def emptied(self, group: Group) -> None:
        """Nothing is left of a received group: forget it, and what it handed on."""
        if self.received_lists.get(group.key) is group:
            del self.received_lists[group.key]
        for one in list(group.lists):
            one.forget()

    def flush_reports(self) -> None:
        """Report the closes of this turn, if the peer takes such reports; else forget them."""
        if not self.reports:
            return
        reports, self.reports = self.reports, {}
        if self._takes_reports():
            for key, count in reports.items():
                self._send({"cmd": CLOSED, "key": key, "count": count})

    def ended(self) -> None:
        """The channel has ended."""
        self.has_ended = True
        self.reports.clear()
        for group in list(self.received_lists.values()):
            group.come_home()
        lists = list(self.sent_lists.values())
        self.sent_lists.clear()
        for one in lists:
            one.ended()
        self.received_lists = {
            k: group for k, group in self.received_lists.items() if not group.is_empty
        }


class SocketListReceive(Group):
    """The connections of one key that came through one channel."""

    __slots__ = ("_home", "_lists_of_channel")

    def __init__(self, key: str, lists: SocketLists) -> None:
        super().__init__(key, partial(lists.shrunk, key), lists.emptied, lists.post)
        self._lists_of_channel = lists
        self._home: Group | None = None

    @property
    def home(self) -> Group:
        """The group to go out from: that whose connections go by the channel these came by."""
        return self._home or self._lists_of_channel.home_of(self.key) or self

    def come_home(self) -> None:
        """The channel ends, and with it who answered for these: those that came back are ours."""
        self.take_closes()
        home = self.home
        if home is not self and self._open:
            self._home = home
            count, self._open = self._open, 0
            home.came_home(count, self._lists_of_channel.forget_some(self.key, count))

    def closed_here(self) -> None:
        """As of any group; at home once they came home."""
        if self._home is not None:
            self._home.closed_here()
        else:
            super().closed_here()

    def closed(self, count: int) -> None:
        """As of any group; at home, if they came home since it was noted."""
        if self._home is not None:
            self._home.closed(count)
        else:
            super().closed(count)

    def handed_on(self, through: SocketListSend) -> None:
        """As of any group, or from the group it first went out from."""
        if self._home is not None:
            self._home.handed_on(through)
        elif through.group is self:
            super().handed_on(through)
        else:
            through.group.opened_here()
            self.closed(1)
            self._lists_of_channel.went_out_again(self.key)
            through.group.handed_on(through)
