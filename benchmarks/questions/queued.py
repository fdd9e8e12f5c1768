"""100,000 handles queued at once: how fast do they drain, and what does each take of memory?"""

from __future__ import annotations

from benchmarks.harness import Contender, Question, Target, Tools, field, ours, rate

QUEUED, STEADY, MEMORY = "100,000 at once", "a steady stream", "bytes per queued handle"


def ask(tools: Tools) -> Question:
    """One socket, kept open. For the memory the child is stopped, so that all of them wait."""
    del tools
    return Question(
        name="queued",
        text=__doc__.splitlines()[0],
        unit="handles/s",
        contenders=[
            Contender(QUEUED, rate(ours("queued", "python"), 100_000)),
            Contender(STEADY, rate(ours("handles", "python"), 100_000)),
            Contender(MEMORY, field(ours("queue_memory"), 100_000, "value"), unit="bytes"),
        ],
        targets=[Target(QUEUED, STEADY, at_least=0.9)],
    )
