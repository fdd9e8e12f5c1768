"""Names of Unix sockets in the file system, and who may remove them: whoever bound them.

A name that came from another process may be anything, and mean anything here.
"""

from __future__ import annotations

import contextlib
import os
import stat

from handleipc.handles.addresses import Address
from handleipc.ownership import Owned

__all__ = ["BoundPath", "remove_socket"]


class BoundPath(Owned):
    """A name in the file system that this process has bound, whatever its directory is later."""

    def __init__(self, path: str) -> None:
        super().__init__()
        directory, name = os.path.split(path)
        self._path = os.path.join(os.path.realpath(directory), name)
        self._identity = self._look()

    def _look(self) -> tuple[int, int] | None:
        try:
            found = os.lstat(self._path)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def remove(self) -> None:
        """Remove it, if it is still ours.

        Another server may have bound the name meanwhile; and a forked copy did not bind it.
        """
        with contextlib.suppress(OSError):
            is_ours = self._identity is not None and not self._is_copy
            if is_ours and self._look() == self._identity:
                os.unlink(self._path)


def remove_socket(path: Address) -> None:
    """Remove what another process bound, which the caller answers for."""
    if not isinstance(path, str) or not path:
        return  # abstract, or nameless
    if not os.path.isabs(path):
        raise ValueError(
            f"close(unlink=True): {path!r} is relative to the directory of the process that bound"
            " it, which need not be ours: remove it yourself"
        )
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)
