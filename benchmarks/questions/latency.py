"""One handle at a time: how long from send to acknowledged?"""

from __future__ import annotations

from benchmarks.harness import Contender, Question, Target, Tools, lap, on_loop, ours

ASYNCIO, UVLOOP, LIMIT = "handleipc, asyncio", "handleipc, uvloop", "C ping-pong"
APART = "C ping-pong, a CPU each"


def ask(tools: Tools) -> Question:
    """Unpinned, as users run it. Where the kernel puts two processes is part of the answer.

    C has two: both on one CPU, or each on its own, where every step wakes an idle CPU. Two event
    loops are always apart, so that the C program which is kept apart says what waking costs.
    """
    asyncio = ours("latency", "python")
    return Question(
        name="latency",
        text=__doc__.splitlines()[0],
        unit="µs",
        factor=1e6,
        is_rate=False,
        contenders=[
            Contender(ASYNCIO, lap(asyncio, 5_000, 0.5)),
            Contender(UVLOOP, lap(asyncio, 5_000, 0.5, on_loop("uvloop"))),
            Contender(LIMIT, lap([tools.fdpass, "pingpong"], 5_000, 0.5)),
            Contender(APART, lap([tools.fdpass, "apart"], 5_000, 0.5)),
            Contender(f"{ASYNCIO}, p99", lap(asyncio, 5_000, 0.99)),
            Contender(f"{UVLOOP}, p99", lap(asyncio, 5_000, 0.99, on_loop("uvloop"))),
            Contender(f"{LIMIT}, p99", lap([tools.fdpass, "pingpong"], 5_000, 0.99)),
        ],
        targets=[
            Target(ASYNCIO, LIMIT, at_most=3),
            Target(UVLOOP, LIMIT, at_most=2.2),
            Target(ASYNCIO, APART),
            Target(UVLOOP, APART),
            Target(f"{ASYNCIO}, p99", f"{LIMIT}, p99"),
            Target(f"{UVLOOP}, p99", f"{LIMIT}, p99"),
        ],
    )
