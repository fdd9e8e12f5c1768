"""Connections that a server accepted, handed over for good and closed there: how many a second?"""

from __future__ import annotations

from benchmarks.harness import Contender, Question, Target, Tools, node, on_loop, ours, rate

READERS = {"batches": "batches()", "iteration": "async for", "listener": "a listener"}
C = "C, 1 per sendmsg"
COUNT = 20_000


def ask(tools: Tools) -> Question:
    """The same by each way to read. C moves distinct accepted connections and closes both ends."""
    names = {how: f"handleipc, {name}" for how, name in READERS.items()}
    batches, iteration = names["batches"], names["iteration"]
    return Question(
        name="accepted",
        text=__doc__.splitlines()[0],
        unit="connections/s",
        contenders=[
            *(Contender(name, rate(ours("accepted", how), COUNT)) for how, name in names.items()),
            Contender(
                f"{iteration}, uvloop",
                rate(ours("accepted", "iteration"), COUNT, env=on_loop("uvloop")),
            ),
            Contender(C, rate([tools.fdpass, "distinct"], COUNT)),
            *(
                Contender(name, rate(node(binary, "distinct", binary), 2_000))
                for name, binary in tools.nodes.items()
            ),
        ],
        targets=[
            Target(iteration, C, at_least=0.8),
            *(Target(iteration, name, at_least=10) for name in tools.nodes),
            Target(iteration, batches, at_least=0.85),
            Target(names["listener"], batches),
        ],
    )
