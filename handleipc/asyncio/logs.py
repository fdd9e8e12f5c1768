"""A log that a peer, or a shortage, cannot fill: one line a kind and minute, of bounded length.

Knows no channel and no server; they say what kind of line it is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

__all__ = ["Throttle", "cut", "log", "throttle"]

# Seconds between two lines of one kind.
INTERVAL = 60.0
# Characters of a line: it may quote what a peer sent.
LONGEST = 300


def cut(text: str, most: int = LONGEST) -> str:
    """Return ``text``, or its beginning if it is longer than ``most`` characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


class Throttle:
    """Logs each kind of line at most once a minute, and says how many it kept to itself.

    One for a logger: whoever has a hundred channels has one line of a kind all the same.

    Args:
        logger: where the lines go.
        interval: seconds between two lines of one kind.
        clock: returns seconds that never go back.
    """

    def __init__(
        self,
        logger: logging.Logger,
        *,
        interval: float = INTERVAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger = logger
        self._interval = interval
        self._clock = clock
        # When each kind was logged last, and how often it was not since.
        self._kinds: dict[str, tuple[float, int]] = {}

    def log(self, level: int, kind: str, text: str, *args: object) -> bool:
        """Log ``text % args``, cut at 300 characters, unless a line of this kind was just logged.

        Args:
            level: as of ``logging``.
            kind: a name that stands in our code: each is remembered, so it must not be a peer's.
            text: what happened; lines of one kind may differ.
            args: put into ``text`` only if it is logged.

        Returns:
            Whether it was logged.
        """
        if not self._logger.isEnabledFor(level):
            return False
        now = self._clock()
        last, kept = self._kinds.get(kind, (None, 0))
        if last is not None and now - last < self._interval:
            self._kinds[kind] = (last, kept + 1)
            return False
        self._kinds[kind] = (now, 0)
        line = cut(text % args if args else text)
        if kept and last is not None:
            line += f" ({kept} more of this kind in the {now - last:.0f} s before)"
        self._logger.log(level, "%s", line)
        return True

    def warning(self, kind: str, text: str, *args: object) -> bool:
        """As ``log``, with the level of a warning."""
        return self.log(logging.WARNING, kind, text, *args)


log: logging.Logger = logging.getLogger("handleipc")
"""The logger of this package."""
throttle: Throttle = Throttle(log)
"""The one of this package."""
