"""Bun and Deno: every cell of docs/peers.md, tried."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest

import handleipc
from tests.interop import runtimes
from tests.interop.children import PATIENCE, spawned
from tests.interop.ends import give, take
from tests.interop.runtimes import CHILD, ENDS, GIVES, RUNTIMES, TAKES, Runtime

HERE = Path(__file__).parent

# For what is known to hang; where it begins to work it takes a fraction of this.
SHORT = 3.0

CELLS = [
    pytest.param(runtime, role, does, kind, id=f"{runtimes.heading(runtime, role, does)}-{kind}")
    for runtime in RUNTIMES
    for role, does in runtimes.cells(runtime)
    for kind in runtimes.ROWS
    if runtimes.applies(role, does, kind)
]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the other runtimes' colours, caches and questions about updates away."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("DENO_NO_UPDATE_CHECK", "1")
    monkeypatch.setenv("DENO_DIR", str(tmp_path_factory.getbasetemp() / "deno"))


@pytest.mark.parametrize(("runtime", "role", "does", "kind"), CELLS)
def test_cell(runtime: Runtime, role: str, does: str, kind: str) -> None:
    """What the page says works, works; what it says does not, fails as it says."""
    known = runtime.known.get((does, kind))
    problem = try_cell(runtime, role, does, kind, SHORT if known and known.hangs else PATIENCE)
    if known is None:
        assert problem is None, problem
    elif problem is None:
        pytest.fail(
            f"{runtime.name} {does} {kind} works now: take it out of runtimes.py, and run"
            " python -m tests.interop"
        )
    else:
        assert re.search(known.symptom, problem), problem


def test_page_is_up_to_date() -> None:
    """docs/peers.md is what ``python -m tests.interop`` writes."""
    assert runtimes.PAGE.read_text() == runtimes.page(), "run: python -m tests.interop"


def try_cell(runtime: Runtime, role: str, does: str, kind: str, patience: float) -> str | None:
    """Return what went wrong in a cell, or None."""
    if kind in ENDS:
        play = end_of_child if role == CHILD else end_of_parent
    else:
        play = with_child if role == CHILD else with_parent
    try:
        return play(runtime, does, kind, patience)
    except (AssertionError, OSError, TimeoutError, handleipc.HandleIPCError):
        return traceback.format_exc()


def with_parent(runtime: Runtime, does: str, kind: str, patience: float) -> str | None:
    """Run the other runtime with a Python child."""
    javascript, python = ("give", "take") if does == GIVES else ("take", "give")
    return run_parent(
        runtime, ["handles.js", javascript, kind], ["ends.py", python, kind], patience
    )


def run_parent(
    runtime: Runtime, javascript: list[str], python: list[str], patience: float, output: str = ""
) -> str | None:
    child = [sys.executable, "-W", "error", str(HERE / python[0]), *python[1:]]
    process = subprocess.Popen(
        [*runtime.command(), HERE / javascript[0], *javascript[1:], *child],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Its child has the pipes too, and is killed with it.
        start_new_session=True,
    )
    try:
        got, errors = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        got, errors = process.communicate()
        return f"{patience} s have passed\n{errors}"
    return None if (process.returncode, got) == (0, output) else f"{got}\n{errors}"


def with_child(runtime: Runtime, does: str, kind: str, patience: float) -> str | None:
    """Play the Python parent of the other runtime."""
    return asyncio.run(asyncio.wait_for(play_parent(runtime, does, kind), patience))


async def play_parent(runtime: Runtime, does: str, kind: str) -> str | None:
    argv = [*runtime.command(), HERE / "handles.js", "give" if does == GIVES else "take", kind]
    async with spawned(*argv, stderr=subprocess.PIPE) as child:
        try:
            await (take if does == GIVES else give)(child, kind)
            child.disconnect()
            assert await child.wait() == 0
        except (AssertionError, OSError, handleipc.HandleIPCError):
            problem = traceback.format_exc()
            if not child.connected:  # it ends, and says why
                assert child.stderr is not None
                problem += (await child.stderr.read()).decode()
            return problem
    return None


def end_of_child(runtime: Runtime, does: str, kind: str, patience: float) -> str | None:
    """Play the Python parent in a story that ends."""
    return asyncio.run(asyncio.wait_for(play_the_end(runtime, does, kind), patience))


async def play_the_end(runtime: Runtime, does: str, kind: str) -> None:
    what = "waits" if does == TAKES else {"disconnect": "disconnects", "exit": "exits"}[kind]
    async with spawned(*runtime.command(), HERE / "lives.js", what) as child:
        events: list[Any] = []
        child.on("disconnect", lambda: events.append("disconnect"))
        child.on("exit", lambda code, signal: events.append(("exit", code, signal)))
        assert await child.recv() == ("last", None)
        if does == TAKES:
            child.disconnect()
        # A child that exits by itself, and not with 0, has crashed; iteration says so.
        crashed = pytest.raises(handleipc.ChannelBroken, match="exited with code 3")
        with crashed if what == "exits" else contextlib.nullcontext():
            assert [received async for received in child] == []
        code = {"disconnects": 0, "exits": 3, "waits": 4}[what]
        assert await child.wait() == code
        await child.wait_disconnected()
        await asyncio.sleep(0)
        assert events == ["disconnect", ("exit", code, None)]


def end_of_parent(runtime: Runtime, does: str, kind: str, patience: float) -> str | None:
    """Run the other runtime as a parent in a story that ends."""
    mine = "disconnects" if does == GIVES else "waits"
    theirs = "waits" if does == GIVES else {"disconnect": "disconnects", "exit": "exits"}[kind]
    code = 3 if theirs == "exits" else 0
    output = json.dumps([["last"], [False], [code, None]], separators=(",", ":")) + "\n"
    return run_parent(runtime, ["lives.js", mine], ["lives.py", theirs], patience, output)
