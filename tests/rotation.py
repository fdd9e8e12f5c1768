"""Which loop, dialect and version of Node.js each case runs with.

A case is a test function with those of its parameters that are not rotated. It runs once, with one
combination of the rotated ones: the first from the function's name, its cases in turn from there, so
that a whole run has all of them. ``pytest --rotation 1`` runs each case with its next combination,
``pytest --every`` with all, and a test that is named with its parameters runs as named.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from typing import Any

import pytest

ROTATED = frozenset({"event_loop_name", "child_loop", "loop", "dialect", "node", "peer"})


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the command line ask for other combinations, or for all of them."""
    parser.addoption(
        "--rotation",
        type=int,
        default=0,
        metavar="N",
        help="run each case with the Nth combination of loop, dialect and Node.js after its own",
    )
    parser.addoption(
        "--every",
        action="store_true",
        help="run each case with every combination of loop, dialect and version of Node.js",
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep one item of each case, of those that ``-k`` and ``-m`` have left."""
    if config.getoption("every"):
        return
    functions: dict[str, dict[Any, list[pytest.Item]]] = defaultdict(lambda: defaultdict(list))
    for item in items:
        functions[item.nodeid.partition("[")[0]][own_parameters(item)].append(item)
    kept = set()
    for name, cases in functions.items():
        first = zlib.crc32(name.encode()) + config.getoption("rotation")
        kept |= {of[turn % len(of)] for turn, of in enumerate(cases.values(), first)}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def own_parameters(item: pytest.Item) -> frozenset[tuple[str, int]]:
    """Return what tells the cases of one function apart: which objects they were given."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return frozenset((name, id(params[name])) for name in params.keys() - ROTATED)
