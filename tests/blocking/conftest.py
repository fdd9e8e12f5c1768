"""Each test has an event loop of its own, which a program keeps for its life."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest

from handleipc.asyncio import runner


@pytest.fixture(autouse=True)
def own_runner(nothing_leaks: None) -> Iterator[None]:
    """Close the runner as the end of a program does, before descriptors are counted."""
    yield
    runner._close()


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], Path]:
    """Write a program, and return its path."""
    count = 0

    def write(text: str) -> Path:
        nonlocal count
        count += 1
        path = tmp_path / f"program{count}.py"
        path.write_text("import os, signal, socket, sys, time\nimport handleipc.blocking\n" + text)
        return path

    return write
