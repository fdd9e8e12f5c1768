"""Whatever system call fails, everybody is told and nothing is left: the fault sweep."""

from __future__ import annotations

import pytest

from tests.faults import shim, table
from tests.faults.errors import ERRORS
from tests.faults.sweep import Outcome, Sweep, describe, plan

pytestmark = [
    pytest.mark.skipif(shim.COMPILER is None, reason="no C compiler"),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """The compiled shim and child."""
    return Sweep(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def counted(sweep: Sweep) -> list[Outcome]:
    """Every scenario without a fault."""
    return sweep.count("asyncio")


def broken(outcomes: list[Outcome]) -> str:
    found = [describe(one) for one in outcomes if one.broken]
    return f"{len(found)} of {len(outcomes)} cells:\n" + "\n".join(found[:40]) if found else ""


def test_without_a_fault(counted: list[Outcome]) -> None:
    """Every scenario keeps the rules when nothing fails, and makes calls that can be failed."""
    assert not broken(counted)
    for one in counted:
        assert sum(one.counts.values()) > 4, one.cell
        for call, sites in one.sites.items():
            assert len(sites) == one.counts[call], (one.cell, call)


def test_on_uvloop(sweep: Sweep) -> None:
    """The same on uvloop, whose cells are the long form's."""
    pytest.importorskip("uvloop")
    assert not broken(sweep.count("uvloop"))


def test_the_rules_notice(sweep: Sweep, counted: list[Outcome]) -> None:
    """Faults do fire: the first use of every call in every scenario is made to fail.

    And somebody is told of some of them.
    """
    cells = [cell for cell in plan(counted, every=False) if cell.at == 1 and not cell.sticky]
    one_each = list({(cell.scenario, cell.dialect, cell.call): cell for cell in cells}.values())
    outcomes = sweep.run(one_each)
    for outcome in outcomes:
        assert outcome.fired, outcome.cell
    assert any(outcome.told for outcome in outcomes)


@pytest.mark.slow
def test_every_fault(sweep: Sweep, counted: list[Outcome]) -> None:
    """Each call × errno × call site × dialect keeps the rules; docs/faults.md names the rows."""
    outcomes = sweep.run(list(plan(counted, every=False)))
    assert not broken(outcomes)
    # One end may be a turn earlier than when the calls were counted; most are where they were.
    assert sum(bool(one.fired) for one in outcomes) > 0.9 * len(outcomes)


# Who lives is asked when a write fails, which on a busy machine may be before the EOF is seen.
SOMETIMES = {"poll"}


def test_the_page_is_current(counted: list[Outcome]) -> None:
    """docs/faults.md names the calls and errors that are tried."""
    tried = {
        row
        for row in table.rows([Outcome.of(cell) for cell in plan(counted, every=False)])
        if row[0] not in SOMETIMES
    }
    written = table.structure(table.PAGE.read_text()) if table.PAGE.exists() else set()
    assert written == tried, "run python -m tests.faults --write"


def test_errors_are_those_of_the_calls(counted: list[Outcome]) -> None:
    """Every call that is made has its errors in the table."""
    made = {call for one in counted for call, count in one.counts.items() if count}
    assert made <= set(ERRORS)
