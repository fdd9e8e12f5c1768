"""What is asked, of whom, and what is hoped for."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent


@dataclasses.dataclass
class Contender:
    """One program: how to run it with a count, and how much it does in a round."""

    name: str
    command: Callable[[int], list[str]]
    count: int
    env: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Question:
    """One question; targets say how many times the rate of another ours should be."""

    name: str
    text: str
    ours: list[Contender]
    others: list[Contender]
    targets: dict[str, float]
    is_latency: bool = False


def build_c(directory: Path) -> Path:
    """Compile the C contender."""
    program = directory / "fdpass"
    source = HERE / "contenders" / "fdpass.c"
    subprocess.run(["cc", "-O2", "-o", str(program), str(source)], check=True)
    return program


def python(what: str, contender: str) -> Callable[[int], list[str]]:
    """Return the command of a Python contender."""
    module = str(HERE / "contenders" / "handles.py")
    return lambda n: [sys.executable, module, what, contender, str(n)]


def ours(what: str, count: int) -> list[Contender]:
    """Return handleipc on both loops."""
    return [
        Contender("handleipc, asyncio", python(what, "handleipc"), count),
        Contender(
            "handleipc, uvloop",
            python(what, "handleipc"),
            count,
            {"HANDLEIPC_BENCHMARK_LOOP": "uvloop"},
        ),
    ]


def questions(c_program: Path, nodes: dict[str, str]) -> list[Question]:
    """Return all questions, given the compiled C program and the Node binaries by name."""
    fdpass = str(c_program)

    def node(what: str, count: int) -> list[Contender]:
        script = str(HERE / "contenders" / "node.js")
        return [
            Contender(name, lambda n, path=path: [path, script, what, str(n)], count)
            for name, path in nodes.items()
        ]

    def targets(rate: float) -> dict[str, float]:
        return dict.fromkeys(nodes, rate)

    return [
        Question(
            "handles",
            "How many handles a second, with a message each, delivered and closed?",
            ours("handles", 100_000),
            [
                Contender("C, 1 per sendmsg", lambda n: [fdpass, "stream", str(n), "1"], 200_000),
                Contender("C, 64 per sendmsg", lambda n: [fdpass, "stream", str(n), "64"], 640_000),
                Contender("send_fds + json", python("handles", "send_fds"), 40_000),
                Contender("multiprocessing send_handle", python("handles", "send_handle"), 40_000),
                *node("handles", 10_000),
            ],
            {
                "C, 1 per sendmsg": 1.5,
                "C, 64 per sendmsg": 0.25,
                "send_fds + json": 10,
                **targets(60),
            },
        ),
        Question(
            "messages",
            "How many plain messages a second?",
            ours("messages", 300_000),
            [
                Contender("Connection.send", python("messages", "Connection.send"), 100_000),
                Contender("send_bytes + json", python("messages", "send_bytes"), 100_000),
                *node("messages", 100_000),
            ],
            {"Connection.send": 14, **targets(7)},
        ),
        Question(
            "latency",
            "How long from send to acknowledged, one handle at a time?",
            ours("latency", 5_000),
            [Contender("C ping-pong", lambda n: [fdpass, "pingpong", str(n)], 5_000)],
            {"C ping-pong": 3},
            is_latency=True,
        ),
    ]


def run(contender: Contender, scale: float) -> str:
    """Run one contender once; returns its line of JSON."""
    count = max(1000, int(contender.count * scale))
    done = subprocess.run(
        contender.command(count),
        env={**os.environ, **contender.env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{contender.name} failed:\n{done.stderr}")
    return done.stdout.strip().splitlines()[-1]
