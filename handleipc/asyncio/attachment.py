"""A channel's place in an event loop: what it has watched, scheduled and timed there.

Knows when something is to be done, and which thread and process may ask for it; what that is,
``driver`` knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator

from handleipc.asyncio import hangups
from handleipc.asyncio.emitter import Emitter
from handleipc.asyncio.posting import running_loop
from handleipc.exceptions import ChannelBusy, ChannelClosed
from handleipc.ownership import in_copies
from handleipc.system import System
from handleipc.wire.syscalls import discard

__all__ = ["NO_THREAD", "Attachment", "process_system"]

# What a channel that no thread may use has for its thread.
NO_THREAD = -1

# One process, one budget of descriptors in flight.
process_system: System = System(close=discard)
in_copies(process_system.is_copied)


class Attachment(Emitter):
    """Something that one event loop serves, through one descriptor.

    Args:
        fd: the descriptor, borrowed: it stays open until ``_detach`` was called.
    """

    def __init__(self, fd: int) -> None:
        super().__init__(asyncio.get_running_loop())
        self._fd = fd
        self._thread = NO_THREAD
        self._is_reading = self._is_writing = self._watches_hangup = False
        self._turn_scheduled = self._read_scheduled = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0

    # -- what a subclass does --------------------------------------------------------------------

    def _turn(self, *, reading: bool = False, due: bool = False) -> None:
        """Do what can be done now."""
        raise NotImplementedError

    def _on_hangup(self) -> None:
        """The peer has hung up."""
        raise NotImplementedError

    def _loop_ends(self) -> None:
        """The event loop is about to close."""
        raise NotImplementedError

    @property
    def _is_closed(self) -> bool:
        raise NotImplementedError

    # -- who may use it --------------------------------------------------------------------------

    def _refuse_use(self) -> None:
        """Say why the caller may not use the channel: the loop that runs is not the channel's.

        On the thread of the channel's loop it may, too, while no loop runs there at all.

        Raises:
            ForkedCopy: it is a forked copy's.
            ChannelClosed: the loop has ended, whether it said so or not.
            ChannelBusy: the loop runs in another thread, or another one runs in this.
        """
        self._refuse_copy()
        if self._is_closed:
            return  # nothing is done with it any more, and the caller is told so
        if self._thread == NO_THREAD or self._loop.is_closed():
            raise ChannelClosed(
                "the event loop of this channel has ended, and nothing is written or read without"
                " one: a child calls parent() again in the next loop"
            )
        if running_loop() is self._loop:
            self._thread = threading.get_ident()  # the loop goes on in another thread now
            return
        if threading.get_ident() == self._thread:
            if running_loop() is None:
                return
            where = "is not the one that runs here"
        else:
            where = "runs in another thread"
        raise ChannelBusy(
            f"the event loop of this channel {where}: use"
            " loop.call_soon_threadsafe(channel.send_nowait, message), or"
            " asyncio.run_coroutine_threadsafe(channel.send(message), loop)"
        )

    # -- the event loop --------------------------------------------------------------------------

    def _attach(self) -> None:
        """Serve the channel on the running loop, until it ends or the loop does."""
        self._detach()  # from a loop that was closed without a word
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._keeper = _until_the_loop_ends(self)
        # Runs up to its yield, which never suspends: now the loop will close it when it ends.
        with contextlib.suppress(StopIteration):
            self._keeper.__anext__().send(None)
        self._turn_scheduled = self._read_scheduled = False
        self._schedule_turn()

    def _dismiss_keeper(self) -> None:
        with contextlib.suppress(StopIteration, RuntimeError):  # RuntimeError: it is running us
            self._keeper.aclose().send(None)

    def _detach(self) -> None:
        """Take everything off the loop; the socket stays open."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        is_closed = self._loop.is_closed()
        for remove, was_watched in (
            (self._loop.remove_reader, self._is_reading),
            (self._loop.remove_writer, self._is_writing),
        ):
            if was_watched and not is_closed:
                with contextlib.suppress(OSError):  # the loop has forgotten it all the same
                    remove(self._fd)
        if self._watches_hangup:
            hangups.unwatch(self._loop, self._fd)
        self._is_reading = self._is_writing = self._watches_hangup = False

    def _watch(self, *, reading: bool, writing: bool, hangup: bool = False) -> None:
        # Said before it is done: an end that follows a failure does not undo what was not done.
        if reading is not self._is_reading:
            self._is_reading = False
            if reading:
                self._loop.add_reader(self._fd, self._on_readable)
            else:
                self._loop.remove_reader(self._fd)
            self._is_reading = reading
        if writing is not self._is_writing:
            self._is_writing = False
            if writing:
                self._loop.add_writer(self._fd, self._turn)
            else:
                self._loop.remove_writer(self._fd)
            self._is_writing = writing
        if hangup is not self._watches_hangup:
            self._watches_hangup = hangup
            if hangup:
                hangups.watch(self._loop, self._fd, self._on_hangup)
            else:
                hangups.unwatch(self._loop, self._fd)

    def _on_readable(self) -> None:
        if self._is_reading and not self._read_scheduled:  # one slice for each turn of the loop
            self._turn(reading=True)

    def _schedule_read(self) -> None:
        if not self._read_scheduled:
            self._read_scheduled = True
            self._loop.call_soon(self._scheduled_read)

    def _scheduled_read(self) -> None:
        self._read_scheduled = False
        self._on_readable()

    def _schedule_turn(self) -> None:
        if not self._turn_scheduled and not self._loop.is_closed():
            self._turn_scheduled = True
            self._loop.call_soon(self._scheduled_turn)

    def _wake(self) -> None:
        """Schedule a turn from wherever the budget of the process was released."""
        if running_loop() is self._loop:
            self._schedule_turn()
        else:
            self._post(self._schedule_turn)

    def _scheduled_turn(self) -> None:
        self._turn_scheduled = False
        self._turn()

    def _on_timer(self) -> None:
        self._timer = None
        self._turn(due=True)

    def _arm_timer(self, deadline: float) -> None:
        when = deadline - process_system.clock() + self._loop.time()
        # An earlier timer that fires for nothing costs less than one rearmed at every read.
        # Kept here: what uvloop returns for one that is due already cannot be asked.
        if self._timer is None or self._timer_at > when:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = when
            self._timer = self._loop.call_at(when, self._on_timer)


async def _until_the_loop_ends(driver: Attachment) -> AsyncGenerator[None, None]:
    # An asynchronous generator, since loops close those when they end (shutdown_asyncgens, which
    # asyncio.run calls last), and say nothing about one that was dropped.
    try:
        yield
    finally:
        driver._loop_ends()
