"""Names for shapes that several modules speak of."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

__all__ = ["JSON", "HasFileno", "Options"]

JSON: TypeAlias = Any
"""A JSON value: None, bool, int, float, str, and lists and dicts of them."""

Options: TypeAlias = dict[str, Any]
"""What travels beside the message of a handle: ``key``, ``dgramType``, ``details``, ..."""


class HasFileno(Protocol):
    """An object with a descriptor that it owns."""

    def fileno(self) -> int:
        """Return the descriptor, negative once closed."""
        ...
