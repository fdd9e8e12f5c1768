"""Large messages: does the time grow with the size, and no faster?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.harness import Contender, Question, Target, Tools, execute, node, ours

KIB, MIB = 1024, 1024 * 1024
SIZES = (KIB, 64 * KIB, MIB, 8 * MIB, 64 * MIB)
# What a round moves: enough of the small ones, few of the large ones.
TRAFFIC = 64 * MIB
OBJECTS = "objects"


def ask(tools: Tools) -> Question:
    """One string, and many small objects, each sent when the one before was read."""
    name, binary = tools.node, tools.nodes[tools.node]
    contenders = []
    for what in ("string", OBJECTS):
        for size in SIZES:
            contenders += [
                Contender(f"handleipc, {what}", _bytes(ours("large", "python"), what, size), size),
                Contender(
                    f"{name}, {what}", _bytes(node(binary, "large", binary), what, size), size
                ),
            ]
    return Question(
        name="large",
        text=__doc__.splitlines()[0],
        unit="MB/s",
        factor=1e-6,
        axis="bytes of one message",
        contenders=contenders,
        targets=[
            Target("handleipc, string", f"{name}, string", at_least=3, at=8 * MIB),
            Target("handleipc, objects", f"{name}, objects", at_least=1.2, at=8 * MIB),
            # Linear: eight times the size at no less than the throughput.
            Target("handleipc, string", "handleipc, string", 0.8, at=64 * MIB, other_at=8 * MIB),
            Target("handleipc, objects", "handleipc, objects", 0.8, at=64 * MIB, other_at=8 * MIB),
        ],
    )


def _bytes(command: Sequence[str], what: str, size: int) -> Callable[[float], float]:
    """Bytes of such messages a second."""

    def run(scale: float) -> float:
        count = max(2, min(2_000, int(TRAFFIC * scale) // size))
        done = execute([*command, what, str(size), str(count)])
        return size * float(done["count"]) / float(done["seconds"])

    return run
