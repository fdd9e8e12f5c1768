"""How many handles a second, each with a message, delivered to the application and closed by it?"""

from __future__ import annotations

from benchmarks.harness import Contender, Question, Target, Tools, node, on_loop, ours, peer, rate

ASYNCIO, UVLOOP, MOVED = "handleipc, asyncio", "handleipc, uvloop", "handleipc, sockets moved"
ONE, SETS = "C, 1 per sendmsg", "C, 64 per sendmsg"
SKETCH = "Python at its least"


def ask(tools: Tools) -> Question:
    """The C programs are the limit; the sketch is Python without an event loop or a promise."""
    return Question(
        name="handles",
        text=__doc__.splitlines()[0],
        unit="handles/s",
        contenders=[
            Contender(ASYNCIO, rate(ours("handles", "python"), 150_000)),
            Contender(UVLOOP, rate(ours("handles", "python"), 150_000, env=on_loop("uvloop"))),
            Contender(MOVED, rate(ours("moved", "python"), 15_000)),
            Contender(ONE, rate([tools.fdpass, "stream"], 300_000, "1")),
            Contender(SETS, rate([tools.fdpass, "stream"], 1_000_000, "64")),
            Contender(SKETCH, rate(peer("sketch"), 150_000)),
            Contender("send_fds + json", rate(peer("send_fds"), 60_000)),
            Contender("multiprocessing send_handle", rate(peer("send_handle"), 60_000)),
            Contender("multiprocessing Connection.send", rate(peer("pickled"), 4_000)),
            Contender("anyio send_fds", rate(peer("anyio"), 20_000)),
            *(
                Contender(name, rate(node(binary, "handles", binary), 8_000))
                for name, binary in tools.nodes.items()
            ),
        ],
        targets=[
            target
            for mine in (ASYNCIO, UVLOOP)
            for target in (
                Target(mine, ONE, at_least=1.5),
                Target(mine, SETS, at_least=0.25),
                *(Target(mine, name, at_least=60) for name in tools.nodes),
                Target(mine, "send_fds + json", at_least=10),
                Target(mine, "multiprocessing send_handle"),
                Target(mine, "multiprocessing Connection.send"),
                Target(mine, "anyio send_fds"),
                Target(mine, SKETCH),
            )
        ],
    )
