"""A handle between ``send`` and its acknowledgement: what travels, and what happens to our copy.

Made by the registry, held by the protocol, which asks for descriptors each time it writes and says
once how it ended.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

from handleipc.exceptions import DescriptorReleased
from handleipc.fds import DescriptorOwner
from handleipc.typing import Options

__all__ = ["PendingHandle"]


class PendingHandle:
    """One handle on its way.

    A ``DescriptorOwner`` that is to be handed over is *moved*: its descriptor lives here until the
    end. Anything else is *held*: the object keeps its descriptors, which are read when the line is
    written, so that a number closed and reused meanwhile is never sent.

    Args:
        handle: the object the application gave to ``send``.
        tag: its type on the wire.
        options: what travels beside the message, or None.
        read: returns the descriptors of a held object as they are now; None to move ``handle``.
        fds_needed: how many descriptors it takes.
        native_only: True if a node-dialect peer has no word for it.
        on_delivered: called at the acknowledgement of a held object; None if it stays as it is.
    """

    __slots__ = (
        "_fd",
        "_read",
        "fds_needed",
        "handle",
        "native_only",
        "on_delivered",
        "on_handed_on",
        "options",
        "tag",
    )

    def __init__(
        self,
        handle: object,
        tag: str,
        options: Options | None = None,
        *,
        read: Callable[[], list[int]] | None = None,
        fds_needed: int = 1,
        native_only: bool = False,
        on_delivered: Callable[[], None] | None = None,
    ) -> None:
        self.handle = handle
        self.tag = tag
        self.options = options
        self.fds_needed = fds_needed
        self.native_only = native_only
        self.on_handed_on: Callable[[], None] | None = None
        """Called first when the peer owns it, for those who count."""
        self._read = read
        self.on_delivered = on_delivered
        self._fd = -1
        if read is None:
            assert isinstance(handle, DescriptorOwner)
            self._fd = handle.move()

    @property
    def is_given_away(self) -> bool:
        """Whether this end's copy is to go at the acknowledgement."""
        return self._read is None or self.on_delivered is not None

    def filenos(self) -> list[int]:
        """Return the descriptors as they are now, borrowed for one write.

        Raises:
            DescriptorReleased: the application closed the object while it waited.
        """
        if self._read is None:
            return [self._fd]
        fds = self._read()
        if len(fds) != self.fds_needed or min(fds) < 0:
            raise DescriptorReleased("the handle was closed while it waited to be sent")
        return fds

    def delivered(self) -> None:
        """The peer owns it: our copy goes, unless it is to stay."""
        if self.on_handed_on is not None:
            self.on_handed_on()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self.handle.moved()  # type: ignore[attr-defined]
        elif self.on_delivered is not None:
            self.on_delivered()

    def returned(self) -> None:
        """It was not delivered: it is the application's again."""
        if self._fd >= 0:
            self.handle.restore(self._fd)  # type: ignore[attr-defined]
            self._fd = -1

    def __del__(self) -> None:
        # Only when a channel was dropped together with its loop and nobody settled it.
        if getattr(self, "_fd", -1) >= 0:
            text = f"{self.handle!r} was dropped on its way"
            os.close(self._fd)
            self._fd = -1
            self.handle.moved()  # type: ignore[attr-defined]
            # Last, since a filter may turn it into an exception.
            warnings.warn(text, ResourceWarning, stacklevel=2)
