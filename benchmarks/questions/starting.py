"""What does it cost to start a child that answers?"""

from __future__ import annotations

import sys

from benchmarks.harness import CONTENDERS, Contender, Question, Target, Tools, cpu_each, ours

OURS, SPAWN = "handleipc, fork", "multiprocessing, spawn"
COUNT = 10


def ask(tools: Tools) -> Question:
    """CPU of both processes, until the child has answered and ended; started one by one."""
    script = str(CONTENDERS / "node.js")
    spawned = [sys.executable, str(CONTENDERS / "spawned.py")]
    return Question(
        name="starting",
        text=__doc__.splitlines()[0],
        unit="ms of CPU",
        factor=1e3,
        is_rate=False,
        contenders=[
            Contender(OURS, cpu_each(ours("start"), COUNT)),
            Contender(SPAWN, cpu_each(spawned, COUNT)),
            *(
                Contender(f"{name} fork", cpu_each([binary, script, "start", binary], COUNT))
                for name, binary in tools.nodes.items()
            ),
        ],
        targets=[
            Target(OURS, SPAWN, at_most=0.75),
            *(Target(OURS, f"{name} fork") for name in tools.nodes),
        ],
    )
