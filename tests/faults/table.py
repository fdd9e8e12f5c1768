"""docs/faults.md, written from a sweep."""

from __future__ import annotations

import collections
from pathlib import Path

from tests.faults.errors import ERRORS, name_of
from tests.faults.scenarios import SCENARIOS
from tests.faults.sweep import DIALECTS, NOT_OURS, Outcome

PAGE = Path(__file__).parent.parent.parent / "docs" / "faults.md"

INTRO = """\
# What happens when a system call fails

Each system call the library makes is made to fail in turn, with each error its man page names, at
each line of the library that makes it, once and for good, in a channel's whole life: messages and
handles both ways, the end by either side, with descriptors lost, a child started, a server. A
preloaded shim does it (`tests/faults/shim.c`); `python -m tests.faults --write` writes this page, and
a test fails when it is out of date.

Whatever failed, in every row: whoever waits is told, within a bounded time and with a documented
exception; each handle has one owner at the end, and its sender knows which; messages arrive in order
and once; no descriptor, process or copy of a handle stays; nothing reaches the event loop's
exception handler. `tests/faults/world.py` has these rules.

*as without it*: nobody notices. *told, nothing lost*: a call raises or an event tells, and every
message and handle arrives. *told, something lost*: the channel, the start or the server ends with an
error that names the fault, and what did not arrive is told to its sender. "one byte" and "descriptors
lost" are no errors: the call moves a single byte, or finds no free slot for a descriptor. With EAGAIN
and ETOOMANYREFS for good the kernel takes nothing, as of a peer that is stopped: `send` waits as long
as its caller likes, and every end ends all the same.
"""


def rows(
    outcomes: list[Outcome],
) -> dict[tuple[str, str, str], dict[str, collections.Counter[str]]]:
    """Return what came of each call, error and way of failing, by dialect."""
    found: dict[tuple[str, str, str], dict[str, collections.Counter[str]]] = {}
    for one in outcomes:
        cell = one.cell
        if cell.call is None:
            continue
        way = "for good" if cell.sticky else "once"
        row = found.setdefault(
            (cell.call, name_of(cell.error), way),
            {dialect: collections.Counter() for dialect in DIALECTS},
        )
        if one.fired and one.outcome:
            row[cell.dialect][one.outcome] += 1
    return found


def page(outcomes: list[Outcome]) -> str:
    """Return the whole page."""
    found = rows(outcomes)
    order = list(ERRORS)
    lines = [
        INTRO,
        f"Scenarios: {', '.join(SCENARIOS)}.\n",
        _numbers(outcomes) + "\n",
        "Left out, since the library only looks on: "
        + "; ".join(
            f"`{call}` {by or 'on ' + loop}: {why}" for (loop, call, by), why in NOT_OURS.items()
        )
        + ".\n",
        "| call | error | fails | sites | node | native |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (call, error, way), by_dialect in sorted(
        found.items(), key=lambda item: (order.index(item[0][0]), item[0][2] != "once", item[0][1])
    ):
        sites = max(sum(counter.values()) for counter in by_dialect.values())
        cells = [_cell(by_dialect[dialect]) for dialect in DIALECTS]
        lines.append(f"| {call} | {error} | {way} | {sites} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _numbers(outcomes: list[Outcome]) -> str:
    tried = [one for one in outcomes if one.cell.call is not None]
    calls = {one.cell.call for one in tried}
    errors = {(one.cell.call, one.cell.error) for one in tried}
    sites = {
        (call, site.split(" ")[0])
        for one in outcomes
        for call, found in one.sites.items()
        for site in found
    }
    return (
        f"{len(calls)} system calls, {len(errors)} pairs of a call and an error, {len(sites)} lines"
        f" of the library that make them: {len(tried)} cells, the first and the last use at each"
        " line in each scenario. `python -m tests.faults --all` tries every use, on both loops."
    )


def _cell(counter: collections.Counter[str]) -> str:
    return "; ".join(f"{kind} ({count})" for kind, count in sorted(counter.items())) or "-"


def structure(text: str) -> set[tuple[str, str, str]]:
    """Return the rows of a page without what depends on the code's lines and the machine."""
    found = set()
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and len(cells) == 6 and cells[0] in ERRORS:
            found.add((cells[0], cells[1], cells[2]))
    return found
