"""What Bun and Deno can do with a channel and what not, and the page made of it.

``python -m tests.interop`` writes docs/peers.md; test_bun_deno.py tries every cell of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from tests.interop.ends import KINDS, MORE_KINDS
from tests.nodes import BUN_VERSION, DENO_VERSION, NODE_VERSIONS, bun_binary, deno_binary

PAGE = Path(__file__).parent.parent.parent / "docs" / "peers.md"

ENDS = ["disconnect", "exit"]
ROWS = [*KINDS, *MORE_KINDS, *ENDS]

GIVES, TAKES = "gives", "takes"
"""What the other runtime does in a cell."""

PARENT, CHILD = "parent", "child"
"""What it is there."""


@dataclasses.dataclass(frozen=True)
class Known:
    """Why a cell does not work.

    Args:
        why: the sentence of the page.
        symptom: a pattern that the error output, or the exception here, must have somewhere.
        hangs: nothing happens at all; a test does not wait long for nothing.
    """

    why: str
    symptom: str
    hangs: bool = False


@dataclasses.dataclass(frozen=True)
class Runtime:
    """One of them. ``known`` has a place for each (what it does, kind) that does not work."""

    name: str
    version: str
    command: Callable[[], list[str | Path]]
    known: dict[tuple[str, str], Known]
    notes: list[str]


CANNOT_SEND = "This handle type cannot be sent"

_bun_native = Known(
    "Bun takes no `net.Native`: it throws where the program cannot catch it, and ends",
    "failed to parse handle",
)
_bun_no_native = Known(
    "Bun sends no native handles: `send` throws ERR_INVALID_HANDLE_TYPE", CANNOT_SEND
)

BUN = Runtime(
    "Bun",
    BUN_VERSION,
    lambda: [bun_binary()],
    {
        (TAKES, "net.Native socket"): _bun_native,
        (TAKES, "net.Native server"): _bun_native,
        (TAKES, "FIFO net.Native"): _bun_native,
        (GIVES, "net.Native socket"): _bun_no_native,
        (GIVES, "net.Native server"): _bun_no_native,
        (GIVES, "dgram.Native"): _bun_no_native,
        (GIVES, "FIFO net.Native"): Known(
            "a FIFO has no handle in Bun that `send` would see: the message goes without it",
            "assert handle is not None",
        ),
    },
    ["Bun has no `net.BoundSocket`, and ends when it is sent one, as from `net.Native`."],
)

_deno_surrogate = "Deno reads and writes Unicode alone: reading `\\ud800` ends the program with an uncaught error, and one that it sends arrives as U+FFFD"

DENO = Runtime(
    "Deno",
    DENO_VERSION,
    lambda: [deno_binary(), "run", "--quiet", "--allow-all"],
    {
        (TAKES, "net.Native server"): Known(
            "Deno takes every `net.Native` without fields of its own for a connection, and accepts nothing from it",
            "",
            hangs=True,
        ),
        (TAKES, "dgram.Native"): Known(
            "Deno does not know `dgram.Native`: the message arrives without its handle",
            "no handle",
        ),
        (GIVES, "dgram.Native"): Known(
            "Deno sends no native UDP handle: `send` throws ERR_INVALID_HANDLE_TYPE", CANNOT_SEND
        ),
        (TAKES, "unix net.Server"): Known(
            "Deno takes every listener without fields of its own for TCP: connections to a Unix one are reset",
            "ConnectionResetError|BrokenPipeError",
        ),
        (TAKES, "FIFO net.Native"): Known(
            "Deno takes it for a TCP socket, and cannot read from it", "ENOTSOCK"
        ),
        (GIVES, "FIFO net.Native"): Known("Deno makes no `net.Socket` of a FIFO", ""),
        (TAKES, "lone surrogate"): Known(_deno_surrogate, "unexpected end of hex escape"),
        (GIVES, "lone surrogate"): Known(_deno_surrogate, "AssertionError"),
    },
    [
        "Deno gives the descriptor of a read to the first line of that read, so a handle behind an"
        " acknowledgement or a message that it has not read yet would be lost. handleipc recognizes"
        " Deno by the name of its program and lets a handle wait until Deno has read the rest.",
        "Deno has no `net.BoundSocket`: the message arrives without it, acknowledged all the same.",
        "Deno answers no NODE_HANDLE whose descriptor it lost, and resends nothing after a NACK: give"
        " `send` a `timeout` if it must not wait for ever.",
        "A socket that Deno has sent stays open there if the acknowledgement is quicker than Deno's"
        " own event loop: its client sees the end when the receiver shuts the connection down (as"
        " `Connection.end` does), not when it only closes it.",
        "A channel that is closed while words of Deno's own are unread (a reply about counting, say)"
        " ends without a 'disconnect' there: let a Deno child end when it is told to, not when the"
        " channel does.",
        "`net.Server` is closed by a Deno that sends it, unless with `{ keepOpen: true }`.",
        "Connections in a Deno child are counted under another name (`socketListKey`), so neither"
        " side's `get_connections` sees those of the other.",
    ],
)

RUNTIMES = [BUN, DENO]


def cells(runtime: Runtime) -> list[tuple[str, str]]:
    """Return the columns of a runtime's table: what it is, and what it does."""
    return [(role, does) for role in (CHILD, PARENT) for does in (TAKES, GIVES)]


def applies(role: str, does: str, kind: str) -> bool:
    """Say whether a cell makes sense: only a child exits."""
    return kind != "exit" or (role, does) in ((CHILD, GIVES), (PARENT, TAKES))


def heading(runtime: Runtime, role: str, does: str) -> str:
    """Return who gives what to whom."""
    other = f"{runtime.name} {role}"
    python = f"Python {PARENT if role == CHILD else CHILD}"
    return f"{other} > {python}" if does == GIVES else f"{python} > {other}"


# -- the page ------------------------------------------------------------------------------------

INTRO = """\
# Peers

What the other end of a channel may be, and what it can do. `python -m tests.interop` writes this page
from `tests/interop/runtimes.py`, and `tests/interop/test_bun_deno.py` tries every cell: one that
should work must, and one that should not must fail as it is said here, so that the page is noticed
when it becomes wrong.

## Node.js

Node NODES: every kind of handle, in both roles and both directions (`tests/interop/test_handles.py`
prints the table at its end). `net.BoundSocket` is new in Node 26; an older Node that is sent one ends.
"""

ROW_WORDS = {
    "messages": "messages, in order",
    "lone surrogate": "a string with a lone surrogate",
    "socket behind a message": "a handle right behind a message",
    "socket there and back": "a handle sent back at once",
    "disconnect": "`disconnect()` is noticed",
    "exit": "exit code, after the last message",
}


def page() -> str:
    """Return the page."""
    majors = [version.partition(".")[0] for version in NODE_VERSIONS]
    parts = [INTRO.replace("NODES", ", ".join(majors[:-1]) + f" and {majors[-1]}")]
    for runtime in RUNTIMES:
        parts.append(_section(runtime))
    return "\n".join(parts)


def _section(runtime: Runtime) -> str:
    reasons: list[str] = []
    columns = cells(runtime)
    lines = [f"## {runtime.name} {runtime.version}", ""]
    lines.append("| | " + " | ".join(heading(runtime, *column) for column in columns) + " |")
    lines.append("| --- " * (len(columns) + 1) + "|")
    for kind in ROWS:
        row = [ROW_WORDS.get(kind, kind)]
        for role, does in columns:
            known = runtime.known.get((does, kind))
            if not applies(role, does, kind):
                row.append("")
            elif known is None:
                row.append("yes")
            else:
                if known.why not in reasons:
                    reasons.append(known.why)
                row.append(f"no ({reasons.index(known.why) + 1})")
        lines.append("| " + " | ".join(row) + " |")
    lines.append("")
    lines += [f"{number}. {why[0].upper()}{why[1:]}." for number, why in enumerate(reasons, 1)]
    if runtime.notes:
        lines += ["", "Beside the table:", ""]
        lines += [f"- {note}" for note in runtime.notes]
    return "\n".join([*lines, ""])
