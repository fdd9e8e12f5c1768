"""Owners of descriptors: each descriptor has one, and it is closed exactly once.

What is here owns and lends; it never reads or writes. A number that was given away is forgotten at
once, since the kernel hands the same number out again for the next file. Whatever is closed here
may have been in a peer's hands, so it is closed without waiting for what the peer has set.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Self

from handleipc.exceptions import DescriptorReleased
from handleipc.wire.syscalls import close_received, discard

__all__ = ["FD", "DescriptorOwner", "FileDescriptor"]

FD = "fd"
"""The tag of a descriptor of any kind."""

# What takes the place of the number once it is gone.
CLOSED = -1
DETACHED = -2
MOVING = -3
MOVED = -4

_GONE = {
    CLOSED: "is closed",
    DETACHED: "was detached: its descriptor has another owner now",
    MOVING: "is on its way to another process: wait for send() to return",
    MOVED: "was handed to another process",
}


class DescriptorOwner:
    """Owns one descriptor until it is closed, detached or handed to another process.

    Dropped while it still owns one, it warns with ``ResourceWarning`` and closes it.

    Args:
        fd: an open descriptor; from here on it is this object's.
    """

    __slots__ = ("__weakref__", "_fd")

    def __init__(self, fd: int) -> None:
        if fd < 0:
            raise ValueError(f"{fd} is not a descriptor")
        self._fd = fd

    def fileno(self) -> int:
        """Return the descriptor, borrowed: it stays this object's.

        Raises:
            DescriptorReleased: it is closed, detached or on its way.
        """
        fd = self._fd
        if fd < 0:
            raise DescriptorReleased(f"this {type(self).__name__} {_GONE[fd]}")
        return fd

    @property
    def closed(self) -> bool:
        """Whether this object owns no descriptor any more."""
        return self._fd < 0

    def close(self) -> None:
        """Close the descriptor, if it is still here. Does nothing the second time.

        Raises:
            DescriptorReleased: it is on its way to another process.
            OSError: what was written to a file may be lost. It is closed all the same.
        """
        fd = self._fd
        if fd >= 0:
            self._fd = CLOSED
            try:
                close_received(fd)
            finally:
                self._released()
        elif fd == MOVING:
            raise DescriptorReleased(f"this {type(self).__name__} {_GONE[fd]}")

    def detach(self) -> int:
        """Give the descriptor away: the caller owns it from here on.

        Raises:
            DescriptorReleased: it is closed, detached or on its way.
        """
        fd = self.fileno()
        self._fd = DETACHED
        self._released()
        return fd

    def _released(self) -> None:
        """Called once when the descriptor was closed or detached here; for those who count."""

    # -- used by the channel while it hands the descriptor over --------------------------------

    def _move(self) -> int:
        """Take the descriptor out for the journey; only ``moved`` or ``restore`` may follow."""
        fd = self.fileno()
        self._fd = MOVING
        return fd

    def _restore(self, fd: int) -> None:
        """Put the descriptor back: it was not delivered."""
        self._fd = fd

    def _moved(self) -> None:
        """Forget it: another process owns it, and our copy has been closed."""
        self._fd = MOVED

    # -- the usual protocols --------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._fd >= 0:
            self.close()

    def __repr__(self) -> str:
        state = f"fd={self._fd}" if self._fd >= 0 else _GONE[self._fd].partition(":")[0]
        return f"<{type(self).__name__} {state}>"

    def __del__(
        self,
        # Bound here, since module globals may be gone at interpreter exit.
        _warn: Callable[..., None] = warnings.warn,
        _close: Callable[[int], None] = discard,
    ) -> None:
        fd = getattr(self, "_fd", CLOSED)
        if fd >= 0:
            text = f"unclosed {self!r}"
            self._fd = CLOSED
            _close(fd)
            self._released()
            # Last, since a filter may turn it into an exception.
            _warn(text, ResourceWarning, stacklevel=2, source=self)


class FileDescriptor(DescriptorOwner):
    """Owner of a descriptor of any kind: pipe, file, memfd, eventfd, ...

    Sent to a native peer it arrives as a ``FileDescriptor`` there, and this copy is closed at the
    acknowledgement (unless ``keep_open``). A node-dialect peer cannot take it.

    Args:
        fd: an open descriptor; from here on it is this object's.
        tag: what it was sent as: ``"fd"``, or ``"net.Native"`` for a FIFO that came so.
    """

    __slots__ = ("tag",)

    def __init__(self, fd: int, tag: str = FD) -> None:
        super().__init__(fd)
        self.tag: str = tag
