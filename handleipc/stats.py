"""What a channel holds at one moment, for whoever operates it: each bounded queue and its limit."""

from __future__ import annotations

import dataclasses

__all__ = ["ChannelStats", "Level"]


@dataclasses.dataclass(frozen=True, slots=True)
class Level:
    """How full a queue is: ``used`` of ``limit``."""

    used: int
    limit: int


@dataclasses.dataclass(frozen=True, slots=True)
class ChannelStats:
    """A channel at one moment. ``dataclasses.asdict`` makes a JSON value of it.

    Each level has the name of the field of ``Limits`` that bounds it.
    """

    pid: int
    """The process at the other end; 0 where the system hides it."""
    state: str
    """``"open"``, ``"closing"`` or ``"closed"``."""
    dialect: str
    """``"native"`` or ``"node"``."""
    opened: bool
    """Whether the peer has said anything."""
    connections: int
    """Connections of this process's servers that the peer has, as far as it has told: a handleipc
    peer tells of each close, a Node.js peer when the last has closed."""
    above_water: bool
    """Whether ``send_nowait`` returns False, until the queue is below the low-water mark."""
    queued_bytes: Level
    """Bytes that wait to be written."""
    queued_handles: Level
    """Descriptors that wait to be written, or for the peer's acknowledgement."""
    held_messages: Level
    """Messages that have come and that nobody has taken."""
    held_bytes: Level
    """Their bytes; of a native peer the limit is ``Limits.bytes``."""
    ready: Level
    """Descriptors acknowledged to the peer that the application has not taken: what a kill of this
    process would swallow. More than the limit pass while a listener takes them."""
    window: Level
    """Descriptors that have come and are not acknowledged: the peer's still."""
