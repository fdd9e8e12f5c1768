"""Accept, hand over, let a child answer, close: how many connections a second, 64 at once?"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.harness import (
    CONTENDERS,
    Contender,
    Question,
    Target,
    Tools,
    on_loop,
    ours,
    peer,
    served,
)

ASYNCIO, UVLOOP = "handleipc, asyncio", "handleipc, uvloop"
WITHOUT = "2 asyncio processes, SO_REUSEPORT"
PROTOCOL = f"{WITHOUT}, Protocol"
CONNECTIONS, AT_ONCE, CHILDREN = 12_000, 64, 2


def ask(tools: Tools) -> Question:
    """The clients are one C program, which costs the same whoever answers."""

    def server(*command: str, env: dict[str, str] | None = None) -> Callable[[float], float]:
        return served(tools.load, CONNECTIONS, AT_ONCE, command, env)

    script = str(CONTENDERS / "node.js")
    hand_out = ours("hand_out", str(CHILDREN))
    return Question(
        name="handoff",
        text=__doc__.splitlines()[0],
        unit="connections/s",
        contenders=[
            Contender(ASYNCIO, server(*hand_out, "end")),
            Contender(f"{ASYNCIO}, start()", server(*hand_out, "start")),
            Contender(f"{ASYNCIO}, open()", server(*hand_out, "open")),
            Contender(UVLOOP, server(*hand_out, "end", env=on_loop("uvloop"))),
            Contender(WITHOUT, server(*peer("reuse_port"), str(CHILDREN))),
            Contender(PROTOCOL, server(*peer("reuse_port_protocol"), str(CHILDREN))),
            Contender(
                f"{PROTOCOL}, uvloop",
                server(*peer("reuse_port_protocol"), str(CHILDREN), env=on_loop("uvloop")),
            ),
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
                Target(mine, PROTOCOL if mine == ASYNCIO else f"{PROTOCOL}, uvloop"),
            )
        ],
    )
