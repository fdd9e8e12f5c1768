"""The events of each object, for type checkers: their names, and what a listener is called with.

At run time ``Emitter.on`` is all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, overload

from handleipc.typing import JSON

__all__ = ["OnChannel", "OnChild", "OnServer"]

Message: TypeAlias = Literal["message", "internal_message"]
OnMessage: TypeAlias = Callable[[JSON, Any], object]
OnUndelivered: TypeAlias = Callable[[JSON, Any, str], object]
OnError: TypeAlias = Callable[[Exception], object]
OnDisconnect: TypeAlias = Callable[[], object]
OnExit: TypeAlias = Callable[[int | None, int | None], object]
OnDrop: TypeAlias = Callable[[Any], object]

M = TypeVar("M", bound=OnMessage)
U = TypeVar("U", bound=OnUndelivered)
E = TypeVar("E", bound=OnError)
D = TypeVar("D", bound=OnDisconnect)
X = TypeVar("X", bound=OnExit)
R = TypeVar("R", bound=OnDrop)


class OnChannel(Protocol):
    """``on`` and ``once`` of a ``Channel``; without a listener, a decorator."""

    @overload
    def __call__(self, event: Message, listener: M) -> M: ...
    @overload
    def __call__(self, event: Message) -> Callable[[M], M]: ...
    @overload
    def __call__(self, event: Literal["undelivered"], listener: U) -> U: ...
    @overload
    def __call__(self, event: Literal["undelivered"]) -> Callable[[U], U]: ...
    @overload
    def __call__(self, event: Literal["error"], listener: E) -> E: ...
    @overload
    def __call__(self, event: Literal["error"]) -> Callable[[E], E]: ...
    @overload
    def __call__(self, event: Literal["disconnect"], listener: D) -> D: ...
    @overload
    def __call__(self, event: Literal["disconnect"]) -> Callable[[D], D]: ...


class OnChild(OnChannel, Protocol):
    """``on`` and ``once`` of a ``Child``."""

    @overload
    def __call__(self, event: Message, listener: M) -> M: ...
    @overload
    def __call__(self, event: Message) -> Callable[[M], M]: ...
    @overload
    def __call__(self, event: Literal["undelivered"], listener: U) -> U: ...
    @overload
    def __call__(self, event: Literal["undelivered"]) -> Callable[[U], U]: ...
    @overload
    def __call__(self, event: Literal["error"], listener: E) -> E: ...
    @overload
    def __call__(self, event: Literal["error"]) -> Callable[[E], E]: ...
    @overload
    def __call__(self, event: Literal["disconnect"], listener: D) -> D: ...
    @overload
    def __call__(self, event: Literal["disconnect"]) -> Callable[[D], D]: ...
    @overload
    def __call__(self, event: Literal["exit", "close"], listener: X) -> X: ...
    @overload
    def __call__(self, event: Literal["exit", "close"]) -> Callable[[X], X]: ...


class OnServer(Protocol):
    """``on`` and ``once`` of a ``Server``."""

    @overload
    def __call__(self, event: Literal["drop"], listener: R) -> R: ...
    @overload
    def __call__(self, event: Literal["drop"]) -> Callable[[R], R]: ...
    @overload
    def __call__(self, event: Literal["error"], listener: E) -> E: ...
    @overload
    def __call__(self, event: Literal["error"]) -> Callable[[E], E]: ...
