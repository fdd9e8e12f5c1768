"""The advice that ``doctor`` gives, and its JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from handleipc import doctor
from handleipc.cli import main
from handleipc.doctor import Machine, advise

GOOD = Machine(
    soft=65_536, hard=65_536, somaxconn=4096, is_root=False, has_passrights=True, has_pidfd=True
)


def test_a_good_machine_needs_no_advice() -> None:
    assert advise(GOOD) == []
    assert advise(dataclasses.replace(GOOD, somaxconn=None)) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"soft": 1024}, ["ulimit -n 65536", "on their way"]),
        ({"soft": 1024, "hard": 1024}, ["LimitNOFILE=", "on their way"]),
        ({"soft": 1024, "is_root": True}, ["ulimit -n 65536"]),
        ({"somaxconn": 128}, ["sysctl net.core.somaxconn=511"]),
        ({"has_passrights": False}, ["accept_handles=False"]),
        ({"has_pidfd": False}, ["a thread waits"]),
    ],
)
def test_advice(change: dict[str, int], words: list[str]) -> None:
    """One line for each thing, which says what it is and what to do."""
    lines = advise(dataclasses.replace(GOOD, **change))
    assert len(lines) == len(words)
    for line, expected in zip(lines, words, strict=True):
        assert expected in line
        assert ":" in line


def test_this_machine_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Machine.here()
    assert 0 < here.soft <= here.hard
    monkeypatch.setattr(Path, "read_text", lambda _: "many")
    assert Machine.here().somaxconn is None


def test_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "here", lambda: dataclasses.replace(GOOD, somaxconn=128))
    shown = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).output)
    assert shown.keys() == {*doctor.facts(), "advice"}
    assert len(shown["advice"]) == 1
    text = CliRunner().invoke(main, ["doctor"]).output
    assert text.splitlines()[-1] == f"advice: {shown['advice'][0]}"
