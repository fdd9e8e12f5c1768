"""The architecture: imports point down, pure layers are pure, only two modules see the C core."""

from __future__ import annotations

import ast
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "handleipc"
if not PACKAGE.exists():  # the tests of an installed wheel
    import handleipc

    PACKAGE = Path(handleipc.__file__).parent

# From the bottom up; between two comments lies a wing, or what all wings share.
LAYERS = [
    {"exceptions", "typing", "limits", "stats", "texts"},
    {"system", "ownership"},
    # wire
    {"wire.framing"},
    {"wire.syscalls", "wire.codec"},
    {"wire.envelope"},
    # what a child finds
    {"environment"},
    {"commands"},
    # handles
    {"handles.addresses", "handles.fds", "handles.group", "handles.refusal"},
    {"handles.pending", "handles.sockets", "handles.tracking"},
    {"handles.connection"},
    {"handles.kinds"},
    {"handles.registry"},
    # protocol
    {"protocol.credit", "protocol.front", "protocol.pairing", "protocol.timers"},
    {"protocol.deliveries", "protocol.lost", "protocol.resends", "protocol.stages"},
    {"protocol.news", "protocol.node", "protocol.sendqueue", "protocol.window"},
    {"protocol.staging"},
    {"protocol.incoming", "protocol.outgoing"},
    {"protocol.dispatch", "protocol.waits", "protocol.writes"},
    {"protocol.channel"},
    # the socket, which only fronts touch
    {"wire.gaps", "wire.peer"},
    {"wire.link"},
    # asyncio
    {"asyncio.logs", "asyncio.nested", "asyncio.posting"},
    {"asyncio.runner"},
    {
        "asyncio.adoption",
        "asyncio.arrivals",
        "asyncio.emitter",
        "asyncio.events",
        "asyncio.hangups",
        "asyncio.lingering",
        "asyncio.pace",
        "asyncio.pipes",
        "asyncio.reasons",
        "asyncio.reaping",
        "asyncio.socketpath",
        "asyncio.starting",
        "asyncio.waiters",
    },
    {"asyncio.attachment", "asyncio.connection"},
    {"asyncio.registry", "asyncio.driver", "asyncio.listener", "asyncio.accepting"},
    {"asyncio.server", "asyncio.streams"},
    {"asyncio.tracking", "asyncio.listening"},
    {"asyncio.sender"},
    {"asyncio.channel"},
    {"asyncio.connecting"},
    {"asyncio.child"},
    {"asyncio.process"},
    {"asyncio.target"},
    {"blocking.taking"},
    {"blocking.server"},
    {"blocking.channel"},
    {"", "blocking"},
    {"doctor", "inspecting"},
    {"cli", "_pyinstaller", "_pyinstaller.hook-handleipc"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

PURE = {name for name, level in LEVEL.items() if level < LEVEL["wire.gaps"]}
PURE_FILES = [f"handleipc/{name.replace('.', '/')}.py" for name in sorted(PURE)]
FORBIDDEN_WHEN_PURE = {"asyncio", "select", "selectors", "threading", "subprocess"}
MAY_BUILD_SOCKETS = {
    "handles.addresses",
    "handles.connection",
    "handles.sockets",
    "handles.kinds",
    "environment",
}
KNOW_THE_PUBLIC_NAMES = {"cli", "_pyinstaller.hook-handleipc"}
MAY_KNOW_TIME = {"system"}
MAY_SEE_THE_CORE = {"wire.framing", "wire.syscalls", "doctor"}


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append((name, path))
    return found


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


WINGS = {"wire", "handles", "protocol", "asyncio"}
MODULES = [(name, path) for name, path in modules() if name not in WINGS]


@pytest.mark.parametrize(("name", "path"), MODULES, ids=[n or "handleipc" for n, _ in MODULES])
def test_imports_point_down(name: str, path: Path) -> None:
    """No module imports from its own layer or from one above."""
    assert name in LEVEL, f"say in which layer {name!r} lives"
    for other in imported(path):
        if other == "handleipc" or other.startswith("handleipc."):
            target = other.removeprefix("handleipc").removeprefix(".")
            if target in LEVEL and not (target == "" and name not in KNOW_THE_PUBLIC_NAMES):
                assert LEVEL[target] < LEVEL[name], f"{name} imports {target}"


@pytest.mark.parametrize(
    ("name", "path"), [m for m in MODULES if m[0] in PURE], ids=lambda value: str(value)
)
def test_pure_layers_are_pure(name: str, path: Path) -> None:
    """Below the front nobody waits, starts anything, or asks for the time."""
    roots = {other.partition(".")[0] for other in imported(path)}
    forbidden = set(FORBIDDEN_WHEN_PURE)
    if name not in MAY_BUILD_SOCKETS:
        forbidden |= {"socket", "ssl"}
    if name not in MAY_KNOW_TIME:
        forbidden.add("time")
    assert not roots & forbidden


@pytest.mark.parametrize(("name", "path"), MODULES, ids=[n or "handleipc" for n, _ in MODULES])
def test_two_modules_see_the_core(name: str, path: Path) -> None:
    """Only the typed skins name the C core, and the doctor to say where it is."""
    if "handleipc._core" in imported(path):
        assert name in MAY_SEE_THE_CORE


@pytest.mark.parametrize(("name", "path"), MODULES, ids=[n or "handleipc" for n, _ in MODULES])
def test_each_file_says_what_it_is(name: str, path: Path) -> None:
    """Each module begins with a sentence about itself, and stays readable in one sitting."""
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
    assert len(text.splitlines()) <= 500, f"{path} is too long"


# What a front may know of ``protocol.channel.ChannelProtocol``, and what of the rest of its wing.
VERBS = {
    *("received", "wrote", "next_stage", "want_read", "on_deadline"),
    *(
        "send",
        "check_room",
        "withdraw",
        "take",
        "take_all",
        "set_taker",
        "begin_turn",
        "watch_waits",
    ),
    *("disconnect", "end"),
}
VALUES = {
    *("state", "error", "ended_here", "give_up", "finished", "is_deaf", "dialect", "limits"),
    *("was_opened", "peer_is_native", "may_become_native", "idle", "lost_something"),
    *("is_above_water", "handles_out", "nobody_reads", "is_waited_for"),
    *("may_go_on", "levels", "deadline"),
}
EVENTS = {"ready", "urgent", "outcomes", "faults", "hooks"}
TYPES = {
    "protocol.channel": {"ChannelProtocol", "State"},
    "protocol.deliveries": {"Internal", "Received"},
    "protocol.node": {"PEER_SPEAKS_NODE"},
    "protocol.stages": {"LATE_SIZE", "Entry", "EntryState", "Late"},
}
FRONTS = [m for m in MODULES if m[0].startswith(("asyncio.", "blocking"))]


def uses_of_a_protocol(path: Path) -> Iterator[tuple[str, str, bool]]:
    """Yield each name that a module asks a protocol for, the next one behind it, and if it calls.

    The protocol is an attribute ``_protocol``, or a variable or argument ``protocol``.
    """
    tree = ast.parse(path.read_text())
    outer = {id(node.value): node for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        is_one = isinstance(node, ast.Attribute) and node.attr == "_protocol"
        is_one = is_one or (isinstance(node, ast.Name) and node.id == "protocol")
        if is_one and (use := outer.get(id(node))):
            behind = outer.get(id(use))
            yield use.attr, behind.attr if behind else "", id(use) in called


@pytest.mark.parametrize(("name", "path"), FRONTS, ids=[name for name, _ in FRONTS])
def test_fronts_keep_to_the_boundary(name: str, path: Path) -> None:
    """They call fifteen verbs of a protocol, look at values and events, and reach no further."""
    if name in {"asyncio.adoption", "asyncio.streams"}:
        return  # a protocol there is one of the event loop's
    for use, behind, is_called in uses_of_a_protocol(path):
        assert use in VERBS | VALUES | EVENTS, f"{name} asks a protocol for {use!r}"
        assert is_called == (use in VERBS), f"{name}: {use!r}"
        if use in VALUES - {"limits", "state"}:
            assert not behind, f"{name} reaches through {use!r} for {behind!r}"


def test_the_boundary_is_as_narrow_as_it_is_said_to_be() -> None:
    """Each of the names is used, and of the other modules fronts know data alone."""
    used = {use for _, path in FRONTS for use, _, _ in uses_of_a_protocol(path)}
    assert VERBS | VALUES | EVENTS <= used
    assert len(VERBS) == 15
    for name, path in FRONTS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith(
                "handleipc.protocol"
            ):
                module = str(node.module).removeprefix("handleipc.")
                assert {alias.name for alias in node.names} <= TYPES.get(module, set()), name


def test_the_map_names_what_is_there() -> None:
    """Each name in CONTRIBUTING's table is in one of the files beside it."""
    lines = (ROOT / "CONTRIBUTING.md").read_text().splitlines()
    start = lines.index("| question | file | name |")
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :]))
    assert len(rows) > 10
    for row in rows:
        files, names = (re.findall("`([^`]+)`", cell) for cell in row.split("|")[-3:-1])
        known = set()
        for file in files:
            for node in ast.parse((PACKAGE / f"{file}.py").read_text()).body:
                if isinstance(node, ast.ClassDef | ast.FunctionDef):
                    known |= {node.name} | {
                        f"{node.name}.{part.name}"
                        for part in node.body
                        if isinstance(part, ast.FunctionDef)
                    }
        assert names and set(names) <= known, row


def test_the_test_finds_a_slip(tmp_path: Path) -> None:
    """The net is tested too: an upward import would be seen."""
    slip = tmp_path / "framing.py"
    slip.write_text("from handleipc.protocol.channel import State\n")
    with pytest.raises(AssertionError):
        test_imports_point_down("wire.framing", slip)
    for reach in ("incoming.pump()", "state()", "dialect.name", "take"):
        slip.write_text(f"class A:\n    def a(self):\n        self._protocol.{reach}\n")
        with pytest.raises(AssertionError):
            test_fronts_keep_to_the_boundary("asyncio.driver", slip)


assert sys.version_info >= (3, 11)
