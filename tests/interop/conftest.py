"""The interop table, and the loop that a Python child under Node runs on."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from tests.conftest import LOOPS
from tests.interop.ends import DIRECTIONS, KINDS
from tests.nodes import NODE_VERSIONS

Cell = tuple[str, str, str]

_table: dict[Cell, bool] = {}


@pytest.fixture(params=list(LOOPS))
def child_loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The event loop that Python children of this test run on."""
    monkeypatch.setenv("TEST_LOOP", request.param)
    return str(request.param)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Say in the report which direction, kind and Node version a test is about."""
    report = yield
    params: dict[str, Any] = item.callspec.params if hasattr(item, "callspec") else {}
    if {"direction", "kind", "node"} <= params.keys():
        report.user_properties.append(
            ("interop", [params[n] for n in ("direction", "kind", "node")])
        )
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note the outcome, wherever the test ran: pytest-xdist reports here too."""
    for name, value in report.user_properties:
        if name == "interop":
            direction, kind, node = value
            cell = (direction, kind, node)
            # Its teardown counts descriptors, and it may run on each loop: all must be well.
            _table[cell] = _table.get(cell, True) and not report.failed


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print who could hand what to whom."""
    if not _table:
        return
    terminalreporter.section("interop")
    heads = "".join(f"{'Node ' + version:>15}" for version in NODE_VERSIONS)
    terminalreporter.write_line(f"{'':28}{'':22}{heads}")
    for direction in DIRECTIONS:
        for kind in KINDS:
            cells = ""
            for version in NODE_VERSIONS:
                outcome = _table.get((direction, kind, version))
                cells += f"{'-' if outcome is None else 'ok' if outcome else 'FAIL':>15}"
            terminalreporter.write_line(f"{direction:28}{kind:22}{cells}")
