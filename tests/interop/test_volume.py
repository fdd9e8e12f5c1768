"""Many handles, and large messages with a handle, between Python and Node."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.interop.children import spawned
from tests.interop.volume import ROLES

HERE = Path(__file__).parent

pytestmark = pytest.mark.slow

HANDLES = 1000
LARGE = 800_000

both_ways = pytest.mark.parametrize("does", ["give", "take"])


def under_node(node: str, node_does: str, python_does: str, number: int) -> None:
    """Run a Node parent with a Python child."""
    python = [sys.executable, "-W", "error", str(HERE / "volume.py"), python_does, str(number)]
    run = subprocess.run(
        [node, HERE / "volume.js", node_does, str(number), *python],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


async def over_node(node: str, node_does: str, python_does: str, number: int) -> None:
    """Play the Python parent of a Node child."""
    async with spawned(node, HERE / "volume.js", node_does, str(number)) as child:
        await ROLES[python_does](child, number)
        child.disconnect()
        assert await child.wait() == 0


OTHER = {"give": "take", "take": "give"}


@both_ways
def test_thousand_handles_under_node(node: str, child_loop: str, does: str) -> None:
    """A Python child of Node gives and takes 1,000 connections, each with its own message."""
    under_node(node, OTHER[does], does, HANDLES)


@both_ways
async def test_thousand_handles_over_node(node: str, does: str) -> None:
    """A Python parent of Node gives and takes 1,000 connections, each with its own message."""
    await over_node(node, OTHER[does], does, HANDLES)


@both_ways
def test_large_message_under_node(node: str, child_loop: str, does: str) -> None:
    """800 KB with a handle goes from a Python child to Node and back, and the other way."""
    under_node(node, f"{OTHER[does]}Large", f"{does}Large", LARGE)


@both_ways
async def test_large_message_over_node(node: str, does: str) -> None:
    """800 KB with a handle goes from a Python parent to Node and back, and the other way."""
    await over_node(node, f"{OTHER[does]}Large", f"{does}Large", LARGE)
