"""``Emitter``: listeners for named events."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

import pytest

from handleipc.asyncio.emitter import Emitter
from tests.asyncio.helpers import Recorder, turns, until


class Bell(Emitter):
    EVENTS: ClassVar[frozenset[str]] = frozenset({"ring", "stop"})

    def __init__(self) -> None:
        super().__init__(asyncio.get_running_loop())

    def emit(self, event: str, *args: Any) -> bool:
        return self._emit(event, *args)


async def test_on_returns_the_listener() -> None:
    """``on`` and ``once`` return the listener, and work as decorators of a bound name."""
    bell = Bell()
    listener = Recorder()
    assert bell.on("ring", listener) is listener
    assert bell.once("ring", listener) is listener


async def test_a_decorator() -> None:
    """Without a listener ``on`` and ``once`` decorate one, and know at once if there is the event."""
    bell = Bell()
    calls: list[str] = []

    @bell.on("ring")
    def always() -> None:
        calls.append("on")

    @bell.once("ring")
    def first() -> None:
        calls.append("once")

    bell.emit("ring")
    bell.emit("ring")
    assert calls == ["on", "once", "on"]
    bell.off("ring", always)
    assert bell.emit("ring") is False
    assert first is not None
    with pytest.raises(ValueError, match="no event 'sing'"):
        bell.on("sing")


async def test_emit_says_whether_anybody_listened() -> None:
    """An event without listeners is said to be nobody's."""
    bell = Bell()
    assert bell.emit("ring") is False
    bell.once("ring", Recorder())
    assert bell.emit("ring") is True
    assert bell.emit("ring") is False
    assert bell.emit("stop") is False


async def test_arguments_and_order() -> None:
    """Listeners get the arguments, in the order they were added."""
    bell = Bell()
    order: list[Any] = []
    bell.on("ring", lambda *args: order.append((1, args)))
    bell.once("ring", lambda *args: order.append((2, args)))
    bell.on("ring", lambda *args: order.append((3, args)))
    bell.emit("ring", "a", 1)
    bell.emit("ring")
    assert order == [(1, ("a", 1)), (2, ("a", 1)), (3, ("a", 1)), (1, ()), (3, ())]


async def test_once_is_removed_before_it_is_called() -> None:
    """A ``once`` listener that emits again is not called again."""
    bell = Bell()
    calls = []

    def listener() -> None:
        calls.append(1)
        bell.emit("ring")

    bell.once("ring", listener)
    bell.emit("ring")
    assert calls == [1]


async def test_off_of_once() -> None:
    """``off`` removes a ``once`` listener too."""
    bell = Bell()
    listener = bell.once("ring", Recorder())
    bell.off("ring", listener)
    bell.emit("ring")
    assert listener.calls == []


async def test_off_of_a_method() -> None:
    """A bound method can be removed: each access makes another object, and they are equal."""

    class Ear:
        heard = 0

        def hear(self) -> None:
            self.heard += 1

    bell, ear = Bell(), Ear()
    bell.on("ring", ear.hear)
    bell.emit("ring")
    bell.off("ring", ear.hear)
    bell.emit("ring")
    assert ear.heard == 1


async def test_off_of_one_of_two_registrations() -> None:
    """As in Node, ``off`` of a listener that was added twice removes one of them."""
    bell = Bell()
    listener = Recorder()
    bell.on("ring", listener)
    bell.on("ring", listener)
    bell.off("ring", listener)
    bell.emit("ring")
    assert len(listener.calls) == 1


async def test_changes_while_emitting() -> None:
    """Listeners added during an event get the next one; removed ones still get this one."""
    bell = Bell()
    late, removed = Recorder(), Recorder()

    def listener() -> None:
        bell.on("ring", late)
        bell.off("ring", removed)

    bell.once("ring", listener)
    bell.on("ring", removed)
    bell.emit("ring")
    assert (len(late.calls), len(removed.calls)) == (0, 1)
    bell.emit("ring")
    assert (len(late.calls), len(removed.calls)) == (1, 1)


@pytest.mark.unhandled("plain", "task")
async def test_exceptions_go_to_the_loop() -> None:
    """Exceptions of plain and async listeners go to the loop's handler; the others still run."""
    bell = Bell()

    def plain() -> None:
        raise ValueError("plain")

    async def task() -> None:
        raise ValueError("task")

    last = Recorder()
    for listener in (plain, task, last):
        bell.on("ring", listener)
    bell.emit("ring")
    assert last.calls == [()]
    await turns()


async def test_async_listeners_are_kept_alive() -> None:
    """The task of an ``async def`` listener is not collected while it waits."""
    import gc

    bell = Bell()
    go: list[asyncio.Future[None]] = []
    done = []

    async def listener() -> None:
        future = asyncio.get_running_loop().create_future()
        go.append(future)
        await future
        done.append(1)

    bell.on("ring", listener)
    bell.emit("ring")
    await turns()
    gc.collect()
    go.pop().set_result(None)
    await until(lambda: done)


async def test_async_once() -> None:
    """An ``async def`` listener may be ``once``, and a callable that returns a coroutine too."""
    bell = Bell()
    done = []

    class Callable:
        async def __call__(self, value: int) -> None:
            done.append(value)

    bell.once("ring", Callable())
    bell.emit("ring", 1)
    bell.emit("ring", 2)
    await turns()
    assert done == [1]


async def test_cancelled_listener_task_is_no_error() -> None:
    """A listener's task that is cancelled is nobody's error."""
    bell = Bell()

    async def listener() -> None:
        asyncio.current_task().cancel()
        await asyncio.sleep(0)

    bell.on("ring", listener)
    bell.emit("ring")
    await turns()


async def test_unknown_events() -> None:
    """An event that does not exist is ``ValueError``, which names those that do."""
    with pytest.raises(ValueError, match=r"Bell.*'rong'.*ring, stop"):
        Bell().on("rong", print)
