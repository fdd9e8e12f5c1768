"""Accept, hand over, let a child answer, close: how many connections a second, 64 at once?"""

from __future__ import annotations

from benchmarks.harness import Contender, Question, Target, Tools, on_loop, ours, peer, served

ASYNCIO, UVLOOP = "handleipc, asyncio", "handleipc, uvloop"
WITHOUT = "2 asyncio processes, SO_REUSEPORT"
CONNECTIONS, AT_ONCE, CHILDREN = 12_000, 64, 2


def ask(tools: Tools) -> Question:
    """The clients are one C program, which costs the same whoever answers."""

    def server(*command: str, env: dict[str, str] | None = None):  # type: ignore[no-untyped-def]
        return served(tools.load, CONNECTIONS, AT_ONCE, command, env)

    script = node_script()
    return Question(
        name="handoff",
        text=__doc__.splitlines()[0],
        unit="connections/s",
        contenders=[
            Contender(ASYNCIO, server(*ours("hand_out", str(CHILDREN)))),
            Contender(UVLOOP, server(*ours("hand_out", str(CHILDREN)), env=on_loop("uvloop"))),
            Contender(WITHOUT, server(*peer("reuse_port"), str(CHILDREN))),
            *(
                contender
                for name, binary in tools.nodes.items()
                for contender in (
                    Contender(f"{name} fork", server(binary, script, "hand_out", str(CHILDREN))),
                    Contender(f"{name} cluster", server(binary, script, "cluster", str(CHILDREN))),
                )
            ),
        ],
        targets=[
            target
            for mine in (ASYNCIO, UVLOOP)
            for target in (
                *(Target(mine, f"{name} fork", at_least=3) for name in tools.nodes),
                *(Target(mine, f"{name} cluster", at_least=3) for name in tools.nodes),
                Target(mine, WITHOUT, at_least=1.0),
            )
        ],
    )


def node_script() -> str:
    """Return the path of the Node.js contenders."""
    from benchmarks.harness import CONTENDERS

    return str(CONTENDERS / "node.js")
