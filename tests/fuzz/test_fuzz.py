"""A peer may say anything and attach anything: the fuzzer's short form, and what it once found."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.asyncio.helpers import clean_registry
from tests.conftest import LOOPS
from tests.fuzz.case import Fuzzer, Maker, Replay, Script

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.json"))
CASES = 800
SEED = 20_260_101

on_both_loops = pytest.mark.parametrize("loop_name", list(LOOPS))


def run(loop_name: str, scripts: list[Script]) -> dict[int, list[str]]:
    """Run scripts on one loop; return what was found, by the number of the script."""

    async def all_of_them() -> dict[int, list[str]]:
        with Fuzzer() as fuzzer:
            found = {i: await fuzzer.run(script) for i, script in enumerate(scripts)}
            assert fuzzer.stats["writes"] >= len(scripts)
        return {i: what for i, what in found.items() if what}

    with asyncio.Runner(loop_factory=LOOPS[loop_name]) as runner:
        return runner.run(all_of_them())


@on_both_loops
@pytest.mark.timeout(600)
def test_many_cases(loop_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a peer says and attaches: no leak, no hang, no stray exception, one owner, order."""
    clean_registry(monkeypatch)
    found = run(loop_name, [Maker(SEED, number) for number in range(CASES)])
    assert not found, f"python -m tests.fuzz 1 {SEED} --first {min(found)}"


@on_both_loops
@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_corpus(path: Path, loop_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What once was found is not found again."""
    clean_registry(monkeypatch)
    written: dict[str, Any] = json.loads(path.read_text())
    assert not run(loop_name, [Replay(written)])


def test_a_script_is_the_same_when_it_is_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A case written down does what it did: the same messages and handles arrive."""
    clean_registry(monkeypatch)

    async def twice() -> list[tuple[int, int]]:
        with Fuzzer() as fuzzer:
            seen = []
            script: Script = Maker(SEED, 7)
            for _ in range(2):
                before = fuzzer.stats["messages"], fuzzer.stats["handles"]
                await fuzzer.run(script)
                after = fuzzer.stats["messages"], fuzzer.stats["handles"]
                seen.append((after[0] - before[0], after[1] - before[1]))
                script = Replay(json.loads(json.dumps(script.dump())))
            return seen

    first, second = asyncio.run(twice())
    assert first == second


def test_the_rules_notice_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """A descriptor that stays open is found: the rules are not blind."""
    clean_registry(monkeypatch)
    import os

    left: list[int] = []

    class Leaky(Maker):
        def steps(self, peer: Any) -> Any:
            yield from super().steps(peer)
            left.append(os.dup(peer.sock.fileno() if peer.sock.fileno() >= 0 else 0))

    try:
        assert any("leak" in one for one in run("asyncio", [Leaky(SEED, 1)])[0])
    finally:
        for fd in left:
            os.close(fd)
