"""An event loop that runs only while somebody waits for something: that of ``handleipc.blocking``.

One for the process. Whoever calls runs it until what it called for is done. A second thread that
calls meanwhile has the first do its work too, and runs the loop on if the first is done before.
Between two calls nothing runs: what peers send waits in the kernel, and so do they.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import selectors
import signal
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Generic, TypeVar

# What the signal module puts around it makes an object of each of 64 signals: 80 us a call.
from _signal import pthread_sigmask  # type: ignore[import-not-found]  # isort: skip

from handleipc.asyncio.posting import running_loop
from handleipc.ownership import in_copies
from handleipc.system import close_quietly

__all__ = ["Runner", "close_first", "the_runner"]

T = TypeVar("T")

# How long the end of the program waits for a thread that runs the loop.
LAST_WORK = 2.0
# A thread looks again after so long: its notice may be lost to a signal handler that raised.
NOTICE = 1.0
ALL_SIGNALS = frozenset(map(int, signal.valid_signals()))
Mask = set[int]


class _Call(Generic[T]):
    """What one caller waits for."""

    def __init__(self, begin: Callable[[], Coroutine[Any, Any, T]], mask: Mask | None) -> None:
        self.begin = begin
        self.mask = mask
        """That of the caller's signals, if they are held back until it waits."""
        self.thread = threading.get_ident()
        self.task: asyncio.Task[T] | None = None

    async def body(self) -> T:
        """Make the coroutine and wait for it, so that what making it raises is the caller's too."""
        return await self.begin()

    @property
    def is_done(self) -> bool:
        """Whether it has a result, whatever became of who was to be told."""
        return self.task is not None and self.task.done()


@contextlib.contextmanager
def _held_back(*, but: bool) -> Iterator[Mask | None]:
    """Hold signals back in the main thread, where alone Python handles them; else do nothing.

    What their handlers raise, as Ctrl-C's does, then ends a call where it waits. Anywhere else it
    would meet a channel in the middle of a write, of which nobody could say how far it went. (In a
    program of several threads the kernel may give a signal to another one, and Python runs the
    handler in the main thread at once.)
    """
    if but or threading.current_thread() is not threading.main_thread():
        yield None
        return
    mask = pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        pthread_sigmask(signal.SIG_BLOCK, ALL_SIGNALS)  # raises what is due already
        yield mask
    finally:
        pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def _let_through(mask: Mask | None) -> Iterator[None]:
    """Let signals through that are held back."""
    if mask is None:
        yield
        return
    try:
        pthread_sigmask(signal.SIG_SETMASK, mask)
        yield
    finally:
        pthread_sigmask(signal.SIG_BLOCK, ALL_SIGNALS)


class _Selector(selectors.DefaultSelector):
    """A selector that lets signals through while it waits."""

    mask: Mask | None = None
    """Of the thread that runs the loop."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait, as any selector does."""
        if timeout == 0:
            return super().select(timeout)
        with _let_through(self.mask):
            return super().select(timeout)


class Runner:
    """The loop, and who runs it."""

    def __init__(self) -> None:
        # Ours, since a forked copy has to let go of the original's epoll, and the loop would not.
        self._selector = _Selector()
        self._loop = asyncio.SelectorEventLoop(self._selector)
        # The kernel may tell another thread of a signal, whose handler is to run in the main one.
        self._noticed, self._notice = socket.socketpair()
        for sock in (self._noticed, self._notice):
            sock.setblocking(False)
        self._loop.add_reader(self._noticed, self._noticed.recv, 4096)
        self._has_notices = False
        self._changed = threading.Condition()
        self._leader: int | None = None
        """The thread that runs the loop."""

    def run(self, begin: Callable[[], Coroutine[Any, Any, T]], *, starts: bool = False) -> T:
        """Run a coroutine until it is done, and all else that the loop has to do meanwhile.

        An exception that a signal handler raises, such as Ctrl-C's, cancels it.

        Args:
            begin: makes the coroutine, in the loop: one that is interrupted before is none.
            starts: it starts a process, which would inherit that signals are held back.

        Raises:
            RuntimeError: an event loop runs on this thread, which would stand still meanwhile.
        """
        if running_loop() is not None:
            raise RuntimeError(
                "handleipc.blocking is for threads without an event loop, and one runs here: use"
                " handleipc itself, with await"
            )
        interrupted: BaseException | None = None
        with _held_back(but=starts) as mask:
            call = _Call(begin, mask)
            self._post(self._begin, call)
            while not call.is_done or self._leader == call.thread:
                try:
                    self._wait(call)
                except BaseException as error:
                    interrupted = interrupted or error
                    self._post(self._cancel, call)
        if interrupted is not None:
            raise interrupted
        assert call.task is not None
        return call.task.result()

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call a function in the loop, and let the loop look once at what has come."""

        async def call() -> T:
            result = function(*args, **kwargs)
            await asyncio.sleep(0)
            return result

        return self.run(call)

    def _post(self, callback: Callable[[_Call[Any]], object], call: _Call[Any]) -> None:
        with self._changed:
            if self._leader in (None, call.thread):
                self._loop.call_soon(callback, call)  # nobody else begins to run it meanwhile
            else:
                self._loop.call_soon_threadsafe(callback, call)

    def _wait(self, call: _Call[Any]) -> None:
        """Run the loop, or wait while another thread does."""
        with self._changed:
            # One that was interrupted may still be named.
            leads = not call.is_done and self._leader in (None, call.thread)
            if leads:
                self._leader = call.thread
            elif self._leader == call.thread:
                self._leader = None
                self._changed.notify_all()
            elif not call.is_done:
                with _let_through(call.mask):
                    self._changed.wait(NOTICE)
        if leads:
            try:
                self._selector.mask = call.mask
                self._take_notices(call.mask)
                self._loop.run_forever()
            finally:
                self._leave_notices()
                with self._changed:
                    self._leader = None
                    self._changed.notify_all()

    def _take_notices(self, mask: Mask | None) -> None:
        if mask is None:
            return
        before = signal.set_wakeup_fd(self._notice.fileno(), warn_on_full_buffer=False)
        self._has_notices = True
        if before >= 0:  # the application's, which it reads itself
            signal.set_wakeup_fd(before)
            self._has_notices = False

    def _leave_notices(self) -> None:
        if self._has_notices:
            self._has_notices = False
            signal.set_wakeup_fd(-1)

    def _begin(self, call: _Call[Any]) -> asyncio.Task[Any]:
        call.task = self._loop.create_task(call.body())
        call.task.add_done_callback(lambda _: self._done(call))
        return call.task

    def _cancel(self, call: _Call[Any]) -> None:
        # Without a task its beginning was interrupted.
        (call.task or self._begin(call)).cancel()

    def _done(self, call: _Call[Any]) -> None:
        with self._changed:
            self._changed.notify_all()
            if self._leader == call.thread:
                self._loop.stop()

    # -- ends ------------------------------------------------------------------------------------

    def close(self) -> None:
        """End what goes on, as the end of ``asyncio.run`` does: what is queued has a second."""
        with self._changed:
            is_free = self._leader is None
        if not is_free:
            # Another thread is in a call, and ends with the process: it does this first.
            flushed = asyncio.run_coroutine_threadsafe(self._loop.shutdown_asyncgens(), self._loop)
            with contextlib.suppress(TimeoutError):
                flushed.result(LAST_WORK)
            return
        self.run(self._stop_all)
        self._loop.remove_reader(self._noticed)
        self._loop.close()
        close_quietly(self._noticed, self._notice)

    async def _stop_all(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._loop.shutdown_asyncgens()

    def give_up(self) -> None:
        """Let go of what a forked copy shares with the original, whose epoll it is."""
        self._leave_notices()
        close_quietly(self._noticed, self._notice)
        self._selector.close()
        # An empty one of its own: what closes the loop asks it to forget what it never had.
        self._selector.__init__()  # type: ignore[misc]
        if not self._loop.is_running():
            self._loop.close()


_runner: Runner | None = None
_given_up: list[Runner] = []  # never collected: a loop that "runs" cannot be closed


def the_runner() -> Runner:
    """Return the runner of this process."""
    global _runner
    if _runner is None:
        _runner = Runner()
        close_first()
    return _runner


def close_first() -> None:
    """Have the end of the program end the runner before what was registered so far."""
    atexit.unregister(_close)
    atexit.register(_close)


def _close() -> None:
    global _runner
    runner, _runner = _runner, None
    if runner is not None:
        runner.close()


def _forked() -> None:
    global _runner
    runner, _runner = _runner, None
    if runner is not None:
        _given_up.append(runner)
        runner.give_up()


in_copies(_forked)
