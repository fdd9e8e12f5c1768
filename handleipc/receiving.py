"""How a received handle becomes an object, as the protocol knows it: shapes, and the refusal.

The registry does it; the protocol has it done, and tells the peer what came of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from handleipc.exceptions import HandleError
from handleipc.typing import Options

__all__ = ["Check", "Convert", "Direct", "Invitation", "Refusal", "accept_any"]

# (tag, options, descriptors owned, their kinds) -> handle. Owns the descriptors whatever happens.
Convert = Callable[[str, Options | None, list[int], list[int]], object]
# (tag, kind) -> what makes a handle of one descriptor that came without options.
Direct = Mapping[tuple[str, int], Callable[[int, int], object]]
# (tag, number of descriptors) -> why such a handle can never be converted, or None.
Check = Callable[[str, int], "Refusal | None"]


class Refusal(HandleError):
    """A handle cannot become an object here.

    Attributes:
        code: ``kind`` or ``type``, as the wire spells it.
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(code, text)
        self.code = code

    def __str__(self) -> str:
        return str(self.args[1])


@dataclasses.dataclass(frozen=True, slots=True)
class Invitation:
    """What a parent tells its child about the native dialect before it starts."""

    descriptors: int
    bytes: int


def accept_any(tag: str, count: int) -> Refusal | None:
    """Say of every handle that perhaps it can be converted."""
    return None
