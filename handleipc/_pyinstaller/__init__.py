"""Where PyInstaller finds what it must know of this package (its entry point ``hook-dirs``)."""

from __future__ import annotations

from pathlib import Path

__all__ = ["hook_dirs"]


def hook_dirs() -> list[str]:
    """Return the directory of the hooks."""
    return [str(Path(__file__).parent)]
