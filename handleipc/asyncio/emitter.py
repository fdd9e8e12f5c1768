"""Listeners for named events, as Node's EventEmitter has them."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from handleipc.asyncio.posting import post
from handleipc.ownership import Owned

__all__ = ["Emitter"]

# Tasks of `async def` listeners: the loop itself holds tasks weakly.
_tasks: set[asyncio.Task[Any]] = set()


class Emitter(Owned):
    """Something with events, of one process and one loop. A subclass names them in ``EVENTS``."""

    EVENTS: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._loop = loop
        self._listeners: dict[str, list[tuple[Callable[..., Any], bool]]] = {}

    if TYPE_CHECKING:
        # Each subclass says what its listeners are called with (``events``).
        on: Any
        once: Any
    else:

        def on(self, event: str, listener: Any = None) -> Any:
            """Call ``listener`` at every ``event``; if it is ``async def``, run it as a task.

            An exception in it goes to the event loop's exception handler; other listeners still
            run. Without a listener it is a decorator: ``@channel.on("message")``.

            Returns:
                The listener.

            Raises:
                ValueError: there is no such event.
            """
            return self._add_or_decorate(event, listener, once=False)

        def once(self, event: str, listener: Any = None) -> Any:
            """As ``on``, for the next ``event`` alone."""
            return self._add_or_decorate(event, listener, once=True)

    def _add_or_decorate(self, event: str, listener: Any, *, once: bool) -> Any:
        if listener is None:
            self._check_event(event)
            return partial(self._add_or_decorate, event, once=once)
        self._add(event, listener, once=once)
        return listener

    def off(self, event: str, listener: Callable[..., Any]) -> None:
        """Remove ``listener``, once if it was added several times; nothing if it is not there."""
        listeners = self._listeners.get(event, [])
        for index in reversed(range(len(listeners))):
            if listeners[index][0] == listener:
                del listeners[index]
                self._listeners_changed(event)
                return

    def _add(self, event: str, listener: Callable[..., Any], *, once: bool) -> None:
        self._check_event(event)
        if not callable(listener):
            raise TypeError(
                f"a listener is called with what happened: {listener!r} cannot be called"
            )
        self._listeners.setdefault(event, []).append((listener, once))
        self._listeners_changed(event)

    def _check_event(self, event: str) -> None:
        if event not in self.EVENTS:
            known = ", ".join(sorted(self.EVENTS))
            raise ValueError(f"{type(self).__name__} has no event {event!r}: it has {known}")

    def _listeners_changed(self, event: str) -> None:
        """Called after a listener came or went."""

    def _has_listeners(self, event: str) -> bool:
        return bool(self._listeners.get(event))

    def _emit(self, event: str, *args: object) -> bool:
        """Call the listeners; returns whether there was one."""
        listeners = self._listeners.get(event)
        if not listeners:
            return False
        for pair in list(listeners):
            if pair[1]:
                if pair not in listeners:
                    continue  # a listener before it removed it, or caused the event again
                listeners.remove(pair)
                self._listeners_changed(event)
            try:
                result = pair[0](*args)
                if inspect.iscoroutine(result):
                    self._run(event, result)
            except Exception as error:
                self._report(event, error)
        return True

    def _post(self, callback: Callable[[], object]) -> None:
        """Have the loop call ``callback`` soon, from any thread; not in a forked copy."""
        if not self._is_copy:
            post(self._loop, callback)

    def _run(self, event: str, coroutine: Any) -> None:
        def done(task: asyncio.Task[Any]) -> None:
            _tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                self._report(event, error)

        task = self._loop.create_task(coroutine)
        _tasks.add(task)
        task.add_done_callback(done)

    def _report(self, event: str, error: BaseException) -> None:
        self._loop.call_exception_handler(
            {
                "message": f"exception in a listener for {event!r} of {self!r}",
                "exception": error,
            }
        )
