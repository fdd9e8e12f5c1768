"""What each test says about Node, and the page made of it."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tests.nodes import NODE_VERSIONS

Test = TypeVar("Test", bound=Callable[..., Any])

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "conformance.md"

SAME, BETTER, NOT_APPLICABLE = "same", "better", "not applicable"
VERDICTS = (SAME, BETTER, NOT_APPLICABLE)


@dataclasses.dataclass
class Record:
    """One of Node's tests, or one of its bugs."""

    name: str
    node: str
    ours: str
    verdict: str
    why: str
    tests: list[str] = dataclasses.field(default_factory=list)


NODE_TESTS: dict[str, Record] = {}
NODE_BUGS: dict[str, Record] = {}
_further: list[tuple[str, str]] = []


def node_test(
    name: str, *, expects: str, ours: str, verdict: str = SAME, why: str
) -> Callable[[Test], Test]:
    """This test does what one of Node's own does: what Node expects, what ours does, and why."""
    return _recorder(NODE_TESTS, Record(name, expects, ours, verdict, why))


def node_bug(reference: str, *, problem: str, ours: str, why: str) -> Callable[[Test], Test]:
    """This test shows ours right where Node is wrong; ``why`` it matters or how it is done."""
    return _recorder(NODE_BUGS, Record(reference, problem, ours, BETTER, why))


def also(name: str) -> Callable[[Test], Test]:
    """One more test of what another one records: mostly the same with the roles exchanged."""

    def note(test: Test) -> Test:
        _further.append((name, _path(test)))
        return test

    return note


def _recorder(records: dict[str, Record], record: Record) -> Callable[[Test], Test]:
    assert record.verdict in VERDICTS, record
    assert record.name not in records, f"{record.name} is recorded twice"
    records[record.name] = record

    def note(test: Test) -> Test:
        record.tests.append(_path(test))
        return test

    return note


def _path(test: Callable[..., Any]) -> str:
    return f"{test.__module__.rpartition('.')[2]}.py::{test.__name__}"


def collect() -> None:
    """Import every test module, and give each record all of its tests."""
    for path in sorted(HERE.glob("test_*.py")):
        importlib.import_module(f"tests.conformance.{path.stem}")
    while _further:
        name, test = _further.pop(0)
        (NODE_TESTS.get(name) or NODE_BUGS[name]).tests.append(test)


# -- the page ------------------------------------------------------------------------------------

INTRO = """\
# Conformance with Node.js

What Node.js expects of `child_process` with an IPC channel, and what handleipc does. Each line is
proved by the tests it names, in `tests/conformance/`; `python -m tests.conformance` writes this page
from them, and a test fails when it is out of date.

Wherever it makes sense a test runs in every role: Python parent with Node child, Node parent with
Python child, Python with Python. Node is NODES; Python parents run on asyncio and uvloop.

*same*: what Node's test asserts holds here. *better*: Node loses or hides something there, or crashes,
and handleipc does not; the line says what. *not applicable*: the line says why.
"""

TESTS = """\
## Node's own tests

Those of Node's `test/` that are about the channel, handles and counting connections. Where Python
has no equal (a missing argument, an `EventEmitter`), the closest meaning is tested, and named.
"""

BUGS = """\
## Where Node is wrong

Bugs and limits of Node's channel, with the issue (or "own" where none is known to us) and what
happens here instead. Not listed: `cluster`, `serialization: 'advanced'`, Windows and macOS.
"""


def page() -> str:
    """Return the page that the tests' records make."""
    collect()
    everything = [*NODE_TESTS.values(), *NODE_BUGS.values()]
    counts = {v: sum(one.verdict == v for one in everything) for v in VERDICTS}
    count = ", ".join(f"{counts[v]} {v}" for v in VERDICTS)
    majors = [version.partition(".")[0] for version in NODE_VERSIONS]
    tests = sorted(NODE_TESTS.values(), key=lambda one: one.name.rpartition("/")[2])
    return "\n".join(
        [
            INTRO.replace("NODES", ", ".join(majors[:-1]) + f" and {majors[-1]}"),
            f"{len(everything)} lines: {count}.\n",
            TESTS,
            *_table("Node's test", "Node expects", tests),
            "",
            BUGS,
            *_table("reference", "Node", list(NODE_BUGS.values())),
            "",
        ]
    )


def _table(first: str, second: str, records: list[Record]) -> list[str]:
    rows = [[first, second, "ours", "verdict", "why", "test function"], ["---"] * 6]
    for one in records:
        functions = "<br>".join(f"`{test}`" for test in one.tests)
        rows.append([one.name, one.node, one.ours, one.verdict, one.why, functions])
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
