"""Does a handoff cost more, the more connections a server tracks in other processes?"""

from __future__ import annotations

from benchmarks.harness import Contender, Question, Target, Tools, instructions, ours, rate

OPEN = (1, 100, 1_000, 9_000)
TIME, WORK = "handoffs/s", "instructions of the parent per handoff"


def ask(tools: Tools) -> Question:
    """Time by the clock, and instructions by callgrind where it is installed."""
    valgrind = tools.valgrind
    contenders = [
        Contender(TIME, rate(ours("tracked", str(open_ones)), 1_000), open_ones)
        for open_ones in OPEN
    ]
    if valgrind is not None:
        contenders += [
            Contender(
                WORK,
                lambda _, n=open_ones: instructions(  # type: ignore[misc]
                    valgrind, lambda count: ours("tracked", str(n), str(count)), 400
                ),
                open_ones,
                rounds=1,
                unit="",
            )
            for open_ones in OPEN
        ]
    return Question(
        name="tracked",
        text=__doc__.splitlines()[0],
        unit="handoffs/s, one at a time",
        is_log=False,
        axis="connections open elsewhere",
        contenders=contenders,
        targets=[
            *(
                Target(WORK, WORK, at_most=1.03, at=open_ones, other_at=OPEN[0])
                for open_ones in OPEN[1:]
            ),
            Target(TIME, TIME, at=OPEN[-1], other_at=OPEN[0]),
        ],
    )
