"""The kill test for ten seconds; ``python -m tests.soak.kill`` is the long one."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["native", "node"])
def test_every_lost_client_is_explained(dialect: str) -> None:
    """A client fails only with the child that had acknowledged it, and few fail untaken."""
    words = ["--seconds", "10", "--runs", "1", "--dialect", dialect]
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak.kill", *words],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
