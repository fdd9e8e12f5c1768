"""What does a handoff cost the parent: CPU time, and instructions?"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.harness import Contender, Question, Tools, execute, instructions, ours, scaled


def ask(tools: Tools) -> Question:
    """Only stated; where it goes is in benchmarks/README.md."""
    contenders = [
        Contender("handleipc, one socket kept open", _cpu("handles", 150_000)),
        Contender("handleipc, sockets moved", _cpu("moved", 15_000)),
    ]
    valgrind = tools.valgrind
    if valgrind is not None:
        contenders += [
            Contender(
                f"instructions of the parent, {what}",
                lambda _, role=role: instructions(  # type: ignore[misc]
                    valgrind, lambda count: ours(role, "python", str(count)), 3_000
                ),
                rounds=1,
                unit="",
            )
            for role, what in (("handles", "kept open"), ("moved", "moved"))
        ]
    return Question(
        name="cost",
        text=__doc__.splitlines()[0],
        unit="µs of CPU in the parent",
        is_rate=False,
        contenders=contenders,
        targets=[],
    )


def _cpu(role: str, count: int) -> Callable[[float], float]:
    def run(scale: float) -> float:
        done = execute(ours(role, "python", str(scaled(count, scale))))
        return 1e6 * float(done["cpu"]) / float(done["count"])

    return run
