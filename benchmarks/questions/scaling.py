"""Accept, hand over, let a child answer: how many connections a second with more children?"""

from __future__ import annotations

from benchmarks.harness import CONTENDERS, Contender, Question, Tools, ours, peer, served

CHILDREN = (1, 2, 4, 8)
CONNECTIONS, AT_ONCE = 6_000, 64


def ask(tools: Tools) -> Question:
    """Only stated: how many are worth having is a question of the machine's CPUs."""
    script, binary = str(CONTENDERS / "node.js"), tools.nodes[tools.node]
    return Question(
        name="scaling",
        text=__doc__.splitlines()[0],
        unit="connections/s",
        axis="children",
        is_log=False,
        contenders=[
            Contender(name, served(tools.load, CONNECTIONS, AT_ONCE, command), at=children)
            for children in CHILDREN
            for name, command in (
                ("handleipc, asyncio", ours("hand_out", str(children), "end")),
                ("SO_REUSEPORT, streams", [*peer("reuse_port"), str(children)]),
                (f"{tools.node} cluster", [binary, script, "cluster", str(children)]),
            )
        ],
        targets=[],
    )
