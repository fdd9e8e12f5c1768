"""Peers that lose a descriptor which they read together with earlier bytes, and how to spare them.

Deno (2.9) gives the descriptor of a read to the first line of that read: behind an
acknowledgement or a plain message that it has not read yet, a handle is lost without a word, and
its sender waits for ever. No system call keeps two writes apart for a reader, so the handle waits
until the rest was read. Knows who the peer is; waiting is the driver's.
"""

from __future__ import annotations

import os
from collections.abc import Callable

__all__ = ["Gaps", "loses_descriptors"]


class Gaps:
    """Whether handles for one peer wait until it has read what is before them.

    Args:
        peer_pid: returns the id of the process at the other end, 0 if that is not known.
        peer_has_read: says whether it has read all that was written.
    """

    __slots__ = ("_peer_has_read", "_peer_pid", "matter")

    def __init__(self, peer_pid: Callable[[], int], peer_has_read: Callable[[], bool]) -> None:
        self._peer_pid = peer_pid
        self._peer_has_read = peer_has_read
        self.matter: bool | None = None
        """None: not known yet, ask ``must_be_left``."""

    def must_be_left(self, *, has_spoken: bool) -> bool:
        """Say whether the peer would lose the descriptors of the next write."""
        if self.matter is None:
            needs = loses_descriptors(self._peer_pid())
            if has_spoken:
                # Before, it may have been a program that starts the one we mean.
                self.matter = needs
            if not needs:
                return False
        return not self._peer_has_read()


def loses_descriptors(pid: int) -> bool:
    """Say whether this process runs a program known for it.

    A guess by the program's name: a wrong one costs some milliseconds, or is as if there were none.
    """
    try:
        return os.path.basename(os.readlink(f"/proc/{pid}/exe")) == "deno"
    except OSError:
        return False  # another user's, gone, or a system without /proc
