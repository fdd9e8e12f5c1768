"""The interop table, and the loop that a Python child under Node runs on."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from tests.conftest import LOOPS
from tests.interop.ends import DIRECTIONS, KINDS
from tests.nodes import NODE_VERSIONS

Cell = tuple[str, str, str]

TABLE = pytest.StashKey[dict[Cell, bool]]()


@pytest.fixture(params=list(LOOPS))
def child_loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The event loop that Python children of this test run on."""
    monkeypatch.setenv("TEST_LOOP", request.param)
    return str(request.param)


def pytest_configure(config: pytest.Config) -> None:
    """Begin an empty table."""
    config.stash[TABLE] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note the outcome of each test of one direction, kind and Node version."""
    report = yield
    params: dict[str, Any] = item.callspec.params if hasattr(item, "callspec") else {}
    if {"direction", "kind", "node"} <= params.keys():
        cell = (params["direction"], params["kind"], params["node"])
        table = item.config.stash[TABLE]
        # A test is run on each loop, and its teardown counts descriptors: all must be well.
        table[cell] = table.get(cell, True) and not report.failed
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print who could hand what to whom."""
    table = terminalreporter.config.stash[TABLE]
    if not table:
        return
    terminalreporter.section("interop")
    heads = "".join(f"{'Node ' + version:>15}" for version in NODE_VERSIONS)
    terminalreporter.write_line(f"{'':28}{'':22}{heads}")
    for direction in DIRECTIONS:
        for kind in KINDS:
            cells = ""
            for version in NODE_VERSIONS:
                outcome = table.get((direction, kind, version))
                cells += f"{'-' if outcome is None else 'ok' if outcome else 'FAIL':>15}"
            terminalreporter.write_line(f"{direction:28}{kind:22}{cells}")
