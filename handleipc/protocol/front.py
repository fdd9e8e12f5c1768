"""The front of a channel, as its protocol knows it: what to call, and where to leave faults."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

__all__ = ["Faults", "Hooks"]


@dataclasses.dataclass(slots=True)
class Hooks:
    """What a protocol calls while it works; the front puts its own functions here."""

    wake: Callable[[], None] = lambda: None
    """Called when another channel's progress lets this one go on: call ``next_stage``."""
    settling: Callable[[], None] = lambda: None
    """Called once, before anything is settled: shut the reading side of the socket down."""
    internal: Callable[[Any], bool] = lambda _: False
    """Called with each internal message when its line is read. Returns whether that was all: else
    the message is delivered in its turn, too."""
    peer_has_read: Callable[[], bool] = lambda: True
    """Says whether the peer has taken all that was written to it, as far as can be known."""


@dataclasses.dataclass(slots=True)
class Faults:
    """What nobody was told of yet. The front takes it out, and adds what it finds itself."""

    errors: list[Exception] = dataclasses.field(default_factory=list)
    """Faults that cost one handle and not the channel, for the ``error`` event."""
    closes: list[tuple[object, Exception]] = dataclasses.field(default_factory=list)
    """Handles, delivered or for nobody to get, whose own ``close`` then raised."""
    warnings: list[str] = dataclasses.field(default_factory=list)
    """What the peer did wrong without consequence: a stray reply."""

    def __bool__(self) -> bool:
        return bool(self.errors or self.closes or self.warnings)
