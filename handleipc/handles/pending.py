"""A handle between ``send`` and its acknowledgement: what travels, and what happens to our copy.

Made by the registry, held by the protocol, which asks for descriptors each time it writes and says
once how it ended.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from handleipc.exceptions import DescriptorReleased
from handleipc.handles.fds import DescriptorOwner
from handleipc.wire.syscalls import discard

__all__ = ["Held", "Lent", "Moved", "PendingHandle"]


class PendingHandle:
    """One handle on its way. Subclasses say where its descriptors are meanwhile.

    Args:
        handle: the object the application gave to ``send``.
        tag: its type on the wire.
        options: what travels beside the message, a JSON object spelled; empty if nothing.
        native_only: True if a node-dialect peer has no word for it.
    """

    __slots__ = ("handle", "native_only", "on_handed_on", "options", "tag")

    fds_needed: int = 1
    """How many descriptors it takes."""

    def __init__(
        self,
        handle: Any,
        tag: str,
        options: bytes = b"",
        native_only: bool = False,
    ) -> None:
        self.handle: Any = handle
        self.tag: str = tag
        self.options: bytes = options
        self.native_only: bool = native_only
        self.on_handed_on: Callable[[], None] | None = None
        """Called first when the peer owns it, for those who count."""

    @property
    def is_given_away(self) -> bool:
        """Whether this end's copy is to go at the acknowledgement."""
        return False

    def fileno(self) -> int:
        """Return the descriptor as it is now, borrowed for one write; of several the first.

        Raises:
            DescriptorReleased: the application closed the object while it waited.
        """
        raise NotImplementedError

    def filenos(self) -> list[int]:
        """Return all of them. Raises as ``fileno``."""
        return [self.fileno()]

    def delivered(self) -> None:
        """The peer owns it: our copy goes, unless it is to stay."""
        if self.on_handed_on is not None:
            self.on_handed_on()

    def returned(self) -> None:
        """It was not delivered: it is the application's again."""


class Lent(PendingHandle):
    """A ``DescriptorOwner`` that keeps its descriptor.

    Read when the line is written, so that a number closed and reused meanwhile is never sent.
    """

    __slots__ = ()

    def fileno(self) -> int:
        """As ``PendingHandle.fileno``."""
        return self.handle.fileno()  # type: ignore[no-any-return]


class Moved(PendingHandle):
    """A ``DescriptorOwner`` to be handed over: its descriptor lives here until the end."""

    __slots__ = ("_fd",)

    def __init__(
        self,
        handle: DescriptorOwner,
        tag: str,
        options: bytes = b"",
        native_only: bool = False,
    ) -> None:
        super().__init__(handle, tag, options, native_only)
        self._fd = handle._move()

    @property
    def is_given_away(self) -> bool:
        """It is."""
        return True

    def fileno(self) -> int:
        """As ``PendingHandle.fileno``; nobody can close it meanwhile."""
        return self._fd

    def delivered(self) -> None:
        """Close our copy."""
        if self.on_handed_on is not None:
            self.on_handed_on()
        fd, self._fd = self._fd, -1
        self.handle._moved()
        discard(fd)

    def returned(self) -> None:
        """Give the descriptor back to its owner."""
        if self._fd >= 0:
            self.handle._restore(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        # Only when a channel was dropped together with its loop and nobody settled it.
        if getattr(self, "_fd", -1) >= 0:
            text = f"{self.handle!r} was dropped on its way"
            discard(self._fd)
            self._fd = -1
            self.handle._moved()
            # Last, since a filter may turn it into an exception.
            warnings.warn(text, ResourceWarning, stacklevel=2)


class Held(PendingHandle):
    """An object that keeps its descriptors, which are read when the line is written.

    Args:
        handle, tag, options, native_only: as ``PendingHandle``.
        read: returns the descriptors as they are now.
        fds_needed: how many there are.
        on_delivered: called at the acknowledgement; None if the object stays as it is.
    """

    __slots__ = ("_read", "fds_needed", "on_delivered")

    def __init__(
        self,
        handle: object,
        tag: str,
        options: bytes = b"",
        *,
        read: Callable[[], list[int]],
        fds_needed: int = 1,
        native_only: bool = False,
        on_delivered: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(handle, tag, options, native_only)
        self._read = read
        self.fds_needed: int = fds_needed
        self.on_delivered: Callable[[], None] | None = on_delivered

    @property
    def is_given_away(self) -> bool:
        """Whether something happens to the object at the acknowledgement."""
        return self.on_delivered is not None

    def fileno(self) -> int:
        """As ``PendingHandle.fileno``."""
        return self.filenos()[0]

    def filenos(self) -> list[int]:
        """As ``PendingHandle.filenos``."""
        try:
            fds = list(self._read())
        except DescriptorReleased:
            raise
        except Exception as error:
            # An object has its own way of saying that it is closed; whichever, the handle alone
            # comes back, and what was sent with it goes on.
            raise DescriptorReleased(
                f"the handle could not be read when it was to be sent: {error!r}"
            ) from error
        if len(fds) != self.fds_needed or min(fds) < 0:
            raise DescriptorReleased("the handle was closed while it waited to be sent")
        return fds

    def delivered(self) -> None:
        """Tell the object."""
        super().delivered()
        if self.on_delivered is not None:
            self.on_delivered()
