"""Words of others inside our own: how errors and log lines quote what came from outside.

Knows nothing of where it came from. Whoever reads a log may be a terminal, a file without UTF-8, or
a program that splits lines: what is quoted is ASCII on one line, and short.
"""

from __future__ import annotations

__all__ = ["quoted", "readable"]

LIMIT = 200


def quoted(value: object, limit: int = LIMIT) -> str:
    """Return a JSON value, or bytes, of somebody else as it may stand in a text of ours.

    ASCII, since half a surrogate pair in an exception cannot be printed; cut at ``limit``
    characters; of an array or object only the size, which costs nothing to tell.
    """
    if isinstance(value, str | bytes | bytearray | memoryview):
        part = value[: limit + 1]
        return readable(ascii(part if isinstance(part, str) else bytes(part)), limit)
    if isinstance(value, list | tuple | dict):
        return f"<{type(value).__name__} of {len(value)}>"
    if isinstance(value, int) and value.bit_length() > limit:
        return f"<integer of {value.bit_length()} bits>"  # may have more digits than str() gives
    if value is None or isinstance(value, int | float):
        return readable(ascii(value), limit)
    return f"<{readable(type(value).__name__, limit)}>"


def readable(text: str, limit: int = LIMIT) -> str:
    """Return a text made by others, an error's for one, in ASCII and cut at ``limit``."""
    cut = text[:limit]
    if not (cut.isascii() and cut.isprintable()):
        cut = ascii(cut)[1:-1]
    return cut[:limit] + "..." if len(cut) > limit or len(text) > limit else cut
