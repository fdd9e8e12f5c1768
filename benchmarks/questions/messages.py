"""How many plain messages a second, between two of us, and between us and a Node.js?"""

from __future__ import annotations

import sys

from benchmarks.harness import Contender, Question, Target, Tools, node, on_loop, ours, peer, rate

ASYNCIO, UVLOOP = "handleipc, asyncio", "handleipc, uvloop"
SKETCH = "Python at its least"


def ask(tools: Tools) -> Question:
    """The sketch is the same JSON libraries on blocking sockets, without a channel."""
    newest = tools.nodes[tools.node]
    to_node, from_node = f"handleipc to {tools.node}", f"{tools.node} to handleipc"
    return Question(
        name="messages",
        text=__doc__.splitlines()[0],
        unit="messages/s",
        contenders=[
            Contender(ASYNCIO, rate(ours("messages", "python"), 400_000)),
            Contender(UVLOOP, rate(ours("messages", "python"), 400_000, env=on_loop("uvloop"))),
            Contender(to_node, rate(ours("messages", newest), 300_000)),
            Contender(from_node, rate(node(newest, "messages", sys.executable), 300_000)),
            Contender(SKETCH, rate(peer("plain_sketch"), 400_000)),
            Contender("multiprocessing Connection.send", rate(peer("pipe"), 150_000)),
            Contender("Connection.send_bytes + json", rate(peer("bytes"), 150_000)),
            *(
                Contender(name, rate(node(binary, "messages", binary), 300_000))
                for name, binary in tools.nodes.items()
            ),
            Contender(
                f"{tools.node}, serialization: advanced",
                rate(node(newest, "advanced", newest), 100_000),
            ),
        ],
        targets=[
            *(
                target
                for mine in (ASYNCIO, UVLOOP)
                for target in (
                    *(Target(mine, name, at_least=7) for name in tools.nodes),
                    Target(mine, "multiprocessing Connection.send", at_least=14),
                    Target(mine, "Connection.send_bytes + json"),
                    Target(mine, SKETCH),
                )
            ),
            Target(to_node, tools.node, at_least=1.0),
            Target(from_node, tools.node, at_least=1.0),
        ],
    )
