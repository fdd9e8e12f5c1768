"""With a Node.js at the other end: how many handles a second, steadily and queued?"""

from __future__ import annotations

import sys

from benchmarks.harness import Contender, Question, Target, Tools, node, ours, rate

# Two descriptors each in the Node.js that makes them, of the 20,000 that a process may have here.
DISTINCT = 9_000
QUEUED = 20_000


def ask(tools: Tools) -> Question:
    """The newest Node.js; the same one to itself is the measure."""
    name, binary = tools.node, tools.nodes[tools.node]
    return Question(
        name="node_dialect",
        text=__doc__.splitlines()[0],
        unit="handles/s",
        contenders=[
            Contender(f"steady, handleipc to {name}", rate(ours("handles", binary), 8_000)),
            Contender(
                f"steady, {name} to handleipc",
                rate(node(binary, "handles", sys.executable), 8_000),
            ),
            Contender(f"steady, {name} to {name}", rate(node(binary, "handles", binary), 8_000)),
            Contender(
                f"distinct queued, handleipc to {name}", rate(ours("moved", binary), DISTINCT)
            ),
            Contender(
                f"distinct queued, {name} to {name}",
                rate(node(binary, "distinct", binary), DISTINCT),
            ),
            Contender(f"one queued, handleipc to {name}", rate(ours("queued", binary), QUEUED)),
            Contender(
                f"one queued, {name} to {name}", rate(node(binary, "queued", binary), QUEUED)
            ),
        ],
        targets=[
            Target(f"steady, handleipc to {name}", f"steady, {name} to {name}", at_least=1.3),
            Target(f"steady, {name} to handleipc", f"steady, {name} to {name}", at_least=1.3),
            Target(
                f"distinct queued, handleipc to {name}",
                f"distinct queued, {name} to {name}",
                at_least=3,
            ),
            Target(f"one queued, handleipc to {name}", f"one queued, {name} to {name}", at_least=5),
        ],
    )
