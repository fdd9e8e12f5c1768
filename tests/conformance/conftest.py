"""The kinds of child that a Python parent is tested with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conformance import peers
from tests.nodes import NODE_VERSIONS, node_binary


@pytest.fixture(params=["python", *NODE_VERSIONS])
def peer(request: pytest.FixtureRequest, tmp_path: Path) -> peers.Peer:
    """Starts children: Python, and Node."""
    node = None if request.param == "python" else str(node_binary(request.param))
    return peers.Peer(node, tmp_path)


@pytest.fixture
def python_peer(tmp_path: Path) -> peers.Peer:
    """Starts Python children."""
    return peers.Peer(None, tmp_path)


@pytest.fixture
def under_node(node: str, tmp_path: Path) -> Callable[..., list[Any]]:
    """Run a Node parent with a Python child: ``under_node(javascript, python)``."""
    return partial(peers.under_node, node, tmp_path)
