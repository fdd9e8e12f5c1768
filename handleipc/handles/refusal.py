"""How a received handle becomes an object, as the protocol knows it: shapes, and the refusal.

The registry does it; the protocol has it done, and tells the peer what came of it.
"""

from __future__ import annotations

from collections.abc import Callable

from handleipc.exceptions import HandleError
from handleipc.texts import readable
from handleipc.typing import Options

__all__ = ["Check", "Convert", "Maker", "Refusal", "accept_any", "make_none", "refusal_in_words"]

# (tag, options, descriptors owned) -> handle. Owns the descriptors whatever happens.
Convert = Callable[[str, Options | None, list[int]], object]
# (tag, options) -> what makes handles of one descriptor each, at once and without raising; None if
# each is to be converted.
Maker = Callable[[str, Options | None], Callable[[int], object] | None]
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


def make_none(tag: str, options: Options | None) -> None:
    """Say of every kind of handle that each is to be converted."""


def accept_any(tag: str, count: int) -> Refusal | None:
    """Say of every handle that perhaps it can be converted."""
    return None


# What the codes of a refusal mean to whoever sent the handle (docs/wire.md, section 4).
_WORDS = {
    "descriptors": "its process has no free descriptor slot (RLIMIT_NOFILE): have it close some",
    "denied": "its system denies it the descriptor (a security module)",
    "type": "nobody registered this type in its process: register() it there, too",
    "kind": "the descriptor is not of the kind that its type says, or could not be used there",
    "closing": "it is disconnecting",
    "policy": "it accepts no handles",
}


def refusal_in_words(code: str) -> str:
    """Return the code of a peer's refusal, cut, and what is to be done about it."""
    words = _WORDS.get(code)
    return readable(code, 40) if words is None else f"{code}: {words}"
