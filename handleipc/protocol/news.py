"""What an end of the native dialect owes the other about its handles, until a control line says it.

Which handles are acknowledged, which are refused and why, what was lost, and what is granted. When
it is said is the protocol's business.
"""

from __future__ import annotations

from collections.abc import Callable

from handleipc.protocol.credit import Credit
from handleipc.protocol.lost import Lost
from handleipc.wire import envelope

__all__ = ["News"]


class News:
    """The control line of one receiving direction that is due.

    Args:
        credit: counts what is acknowledged and granted.
        lost: says what to ask for again.
        granted_from: returns the bytes that count as taken, when more is to be granted.
    """

    __slots__ = ("_credit", "_granted_from", "_lost", "_refusals", "is_owed")

    def __init__(self, credit: Credit, lost: Lost, granted_from: Callable[[], int]) -> None:
        self._credit = credit
        self._granted_from = granted_from
        self._lost = lost
        # Runs of handles refused for one reason: first handle, how many, code.
        self._refusals: list[tuple[int, int, str]] = []
        self.is_owed: bool = False
        """Whether something was acknowledged or refused that the peer was not told of."""

    def acknowledge(self, sequence: int, descriptors: int) -> None:
        """Count the handles up to this one as done; the last of them had so many descriptors."""
        self._credit.done(sequence, descriptors)
        self.is_owed = True

    def refuse(self, sequence: int, code: str) -> None:
        """Give a handle back to its sender."""
        first, count, before = self._refusals[-1] if self._refusals else (0, 0, "")
        if before == code and first + count == sequence:
            self._refusals[-1] = first, count + 1, code
        else:
            self._refusals.append((sequence, 1, code))
        self.is_owed = True

    @property
    def grants(self) -> bool:
        """Whether enough bytes became free to be worth a line."""
        # No more can count as taken than has come, and most turns end here.
        credit = self._credit
        return credit.bytes_in >= credit.due_at and self._granted_from() >= credit.due_at

    @property
    def is_due(self) -> bool:
        """Whether a control line is due."""
        return self.is_owed or self._lost.ask is not None or self.grants

    def take(self, fields: dict[str, object]) -> bytes:
        """Return the control line that is due, with ``fields``, and count it as said."""
        if self._refusals:
            fields["refuse"], self._refusals = self._refusals, []
        if self._lost.ask is not None:
            fields["again"], self._lost.ask = self._lost.ask, None
        self.is_owed = False
        return envelope.spell_control(self._credit.say(self._granted_from()), fields)
