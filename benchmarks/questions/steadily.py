"""What does a server with 2 processes use for a connection, when 1,500 come each second?"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.harness import (
    CONTENDERS,
    Contender,
    Question,
    Steady,
    Target,
    Tools,
    on_loop,
    ours,
    peer,
    steady,
)

ASYNCIO, UVLOOP = "handleipc, asyncio", "handleipc, uvloop"
STREAMS, PROTOCOL = "SO_REUSEPORT, streams", "SO_REUSEPORT, Protocol"
CONNECTIONS, RATE, CHILDREN = 6_000, 1_500, "2"
P99 = ", p99"


def ask(tools: Tools) -> Question:
    """Steadier than a rate on few CPUs. The second row of each is the p99 of what one takes."""
    script = str(CONTENDERS / "node.js")
    hand_out = ours("hand_out", CHILDREN, "end")
    servers = {
        ASYNCIO: (hand_out, None),
        UVLOOP: (hand_out, on_loop("uvloop")),
        STREAMS: ([*peer("reuse_port"), CHILDREN], None),
        PROTOCOL: ([*peer("reuse_port_protocol"), CHILDREN], None),
        f"{PROTOCOL}, uvloop": ([*peer("reuse_port_protocol"), CHILDREN], on_loop("uvloop")),
        **{
            f"{name} cluster": ([binary, script, "cluster", CHILDREN], None)
            for name, binary in tools.nodes.items()
        },
    }
    contenders = []
    for name, (command, env) in servers.items():
        cpu, p99 = _both(steady(tools.load, CONNECTIONS, RATE, command, env))
        contenders += [Contender(name, cpu), Contender(f"{name}{P99}", p99, unit="µs")]
    return Question(
        name="steadily",
        text=__doc__.splitlines()[0],
        unit="µs of CPU",
        factor=1e6,
        is_rate=False,
        contenders=contenders,
        targets=[
            Target(ASYNCIO, STREAMS, at_most=1.0),
            Target(ASYNCIO, PROTOCOL, at_most=1.2),
            Target(UVLOOP, f"{PROTOCOL}, uvloop"),
            *(Target(ASYNCIO, f"{name} cluster", at_most=0.4) for name in tools.nodes),
            *(Target(f"{ASYNCIO}{P99}", f"{name} cluster{P99}") for name in tools.nodes),
        ],
    )


def _both(
    run: Callable[[float], Steady],
) -> tuple[Callable[[float], float], Callable[[float], float]]:
    """Return what asks for the CPU, and what returns the p99 of the same run, which follows it."""
    last: list[Steady] = []

    def cpu(scale: float) -> float:
        last[:] = [run(scale)]
        return last[0].cpu

    return cpu, lambda _: last[0].p99
