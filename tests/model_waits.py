"""Two programs that each wait for the other before they read: somebody goes on, always.

As ``model_kernel``, with applications that run a script: ``h``/``m`` queue, ``H``/``M`` queue and
wait (for the acknowledgement; for the line to be written), ``F`` flushes, ``D`` drains. An
application reads when its script is done. At rest, time passes; a wait that nobody ends then, not
even with ``ChannelBusy``, is a deadlock.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

from handleipc.protocol.stages import EntryState
from tests.model_kernel import ENDLESS, End, Scenario, Violation, World, narrow_limits

# Kinds of wait that end when the peer has taken something; the empty one is none.
FOR_PEER = ["H", "F", "D"]


class Waiting(World):
    """A world whose applications wait, and read afterwards."""

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(scenario)
        self.waits: dict[str, str] = {"A": "", "B": ""}
        self.busy = self.told = 0
        for end in self.ends.values():
            end.reads = False
        for name, script in scenario.scripts.items():
            for kind, number in script:
                for fd in self.fds_of(number) if kind == "H" else ():
                    self.counts[fd] = Counter({name: 1})

    def steps(self) -> list[tuple[str, str]]:
        found = []
        for step in super().steps():
            what, name = step
            if what in ("await", "want", "leave", "withdraw", "tick"):
                continue
            if what in ("send", "begin", "take") and self.waits[name]:
                continue
            if what == "begin" and self.ends[name].position < len(self.scenario.scripts[name]):
                continue
            found.append(step)
        return [*found, ("turn", "A"), ("turn", "B")]

    def _do_send(self, end: End, size: int) -> None:
        kind, number = self.scenario.scripts[end.name][end.position]
        if kind in "FD":
            end.position += 1
        else:
            script = self.scenario.scripts[end.name]
            script[end.position] = ({"M": "w"}.get(kind, kind.lower()), number)
            super()._do_send(end, size)
        self.waits[end.name] = kind if kind in "HMFD" else ""

    def _still_waits(self, end: End) -> bool:
        out, kind = end.protocol.outgoing, self.waits[end.name]
        if kind in ("H", "M"):
            return end.entries[-1].state is not EntryState.ENDED
        return (kind == "F" and not out.idle) or (kind == "D" and out.is_above_water)

    def _do_turn(self, end: End, size: int) -> None:
        """As the asyncio layer's: say what waits, pump, find out who need not wait any more."""
        protocol = end.protocol
        if not self._still_waits(end):
            self.waits[end.name] = ""
        kind = self.waits[end.name]
        protocol.begin_turn(reader_waits=end.reads)
        end.has_earned |= bool(kind) or end.reads
        protocol.watch_waits(for_peer=kind in FOR_PEER, for_kernel=kind == "M")
        protocol.incoming.pump()
        if kind and protocol.nobody_reads:
            self.waits[end.name], self.busy, self.told = "", self.busy + 1, self.told + 1

    def rest(self, rng: random.Random) -> None:
        """Let everything happen, and time pass, until nobody waits."""
        for _ in range(60):
            self.run_fair(rng)
            done = [
                not self.waits[n] and e.position >= len(self.scenario.scripts[n])
                for n, e in self.ends.items()
            ]
            if all(done):
                return
            before = self.waits.copy(), self.key(), self.now
            for end in self.ends.values():
                deadline = end.protocol.deadline
                if deadline is not None and deadline < ENDLESS / 2:
                    self.do(("tick", end.name))
            for name in "AB":
                self.do(("turn", name))
            if before == (self.waits, self.key(), self.now) and not self.busy:
                raise Violation(f"deadlock: {self.waits}")
            self.busy = 0
        raise Violation(f"deadlock: {self.waits}")


def run_waiting(seed: int) -> Waiting:
    """One run of two programs without faults."""
    rng = random.Random(seed)
    number, scripts = 0, {}
    mix = rng.choice(["hH", "hhhF", "hhhD", "hhM", "mhHMFD"])
    for name in "AB":
        scripts[name] = []
        for _ in range(rng.randint(1, 10)):
            number += 1
            scripts[name].append((rng.choice(mix), number))
        last = mix[-1]
        scripts[name].append((last, number := number + 1))
    roles = rng.choice(["fork", "both"])
    limits = dataclasses.replace(
        narrow_limits(rng), ready=rng.choice([1, 2, 4]), high_water_handles=3, low_water_handles=1
    )
    world = Waiting(
        Scenario(
            scripts=scripts,
            roles=roles,
            limits=limits,
            fds_each=rng.choice([1, 3]) if roles == "fork" else 1,
        )
    )
    for _ in range(rng.randint(0, 200)):
        world.do(rng.choice(world.steps()), rng.choice([7, 1 << 20]))
        world.check_bounds()
        world.check_order()
    world.rest(rng)
    world.check_order()
    return world
