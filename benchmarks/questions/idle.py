"""How much memory does an end of a channel take that says nothing?"""

from __future__ import annotations

from benchmarks.harness import Contender, Question, Tools, field, ours


def ask(tools: Tools) -> Question:
    """Both ends in one process, whose memory is measured; the bound of 20 KiB is in the tests."""
    return Question(
        name="idle",
        text=__doc__.splitlines()[0],
        unit="bytes",
        is_rate=False,
        contenders=[Contender("handleipc, an idle end", field(ours("idle"), 500, "value"))],
        targets=[],
    )
