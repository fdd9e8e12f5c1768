"""What belongs to the process that made it, and not to a copy of that process made by fork(2).

A copy has the same descriptors and the same objects. If it wrote what is queued, shut a socket
down, removed a path or reaped a child, it would do so in the original's name: 277 of 400 messages
arrived twice, and the event loop that both share through one epoll was left without its channel.

So each such object is an ``Owned``, and asks whether it still is itself before it does any of this.
In a copy, channel sockets and pidfds are closed at once, or the end of a channel would not reach
its peer while the copy lives. Listeners, connections and other descriptors stay open: servers that
fork after they listen inherit them on purpose.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable

from handleipc.exceptions import ForkedCopy

__all__ = ["Owned", "in_copies"]

_owned: weakref.WeakSet[Owned] = weakref.WeakSet()
_in_copies: list[Callable[[], None]] = []


class Owned:
    """Something that one process owns. A subclass says what a copy gives up."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        _owned.add(self)

    @property
    def _is_copy(self) -> bool:
        """Whether this is a forked copy's."""
        return os.getpid() != self._owner

    def _disown(self) -> None:
        # No process has this id. The owner's may be the copy's, too: in a PID namespace of its own
        # (a container's first process is 1 there and here), or when the owner's is in use again.
        self._owner = 0
        self._give_up()

    def _give_up(self) -> None:
        """Give up in a copy, right after the fork, what the original needs to have alone.

        Must only close descriptors: an event loop's epoll is shared with the original.
        """

    def _refuse_copy(self) -> None:
        """Refuse to be used in a copy.

        Raises:
            ForkedCopy: this is one.
        """
        if self._is_copy:
            raise ForkedCopy(f"this {type(self).__name__}")


def in_copies(callback: Callable[[], None]) -> None:
    """Call ``callback`` in each forked copy, before anything of it runs."""
    _in_copies.append(callback)


def _after_fork() -> None:
    # Hooks run in reverse order of what they need: nobody hears of an exception here, and one that
    # fails must not keep the others from running.
    for callback in [*(one._disown for one in list(_owned)), *_in_copies]:
        try:
            callback()
        except OSError:
            continue  # of close(2): the number is free whatever it says


os.register_at_fork(after_in_child=_after_fork)
