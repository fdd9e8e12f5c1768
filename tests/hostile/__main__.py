"""``python -m tests.hostile``: what each flood costs, as a table.

python -m tests.hostile                         every flood, however it is taken
python -m tests.hostile "node lines" --how nobody --seconds 10

A process holds channels to a peer that floods and to a neighbour that answers. For each flood: the
most descriptors and MiB of memory that it cost, and the milliseconds that an exchange with the
neighbour takes in silence and beside the flood: half of them less than p50, and all but a hundredth
less than p99; and the processor time of the process itself in such an exchange (own p50), which on
a busy machine says more. ``x`` is how many times as long it takes beside the flood.

Ends with 1 if that is more than three times in both for a flood that is taken.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from tests.hostile.measure import HOW
from tests.hostile.peer import KINDS

TARGET = 3.0
COLUMNS = (
    f"{'flood':22} {'taken by':10} {'messages/s':>10} {'fds':>4} {'MiB':>5}"
    f" {'p50 ms':>13} {'x':>5} {'p99 ms':>14} {'own p50 ms':>11} {'x':>4}  ended by"
)


def measure(kind: str, how: str, seconds: float) -> dict[str, Any]:
    """Measure one flood in a process of its own."""
    words = [kind, how, str(seconds)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile.measure", *words],
        stdout=subprocess.PIPE,
        check=True,
        timeout=60 + 20 * seconds,
    )
    return json.loads(done.stdout)


def row(found: dict[str, Any]) -> str:
    """Return what was found as a line of the table."""
    quiet, loud = found["quiet"], found["loud"]
    return (
        f"{found['kind']:22} {found['how']:10} {found['messages']:10.0f}"
        f" {found['descriptors']:4} {found['memory']:5}"
        f" {quiet['p50']:5.2f} {loud['p50']:7.2f} {loud['p50'] / quiet['p50']:5.1f}"
        f" {quiet['p99']:6.2f} {loud['p99']:7.1f}"
        f" {quiet['cpu']:5.2f} {loud['cpu']:5.2f} {loud['cpu'] / quiet['cpu']:4.1f}"
        f"  {found['error'][:60]}"
    ).rstrip()


def main() -> int:
    """Measure what the arguments say; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.hostile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--how", choices=HOW, action="append")
    parser.add_argument("--seconds", type=float, default=3.0)
    arguments = parser.parse_args()
    if unknown := set(arguments.kinds) - set(KINDS):
        parser.error(f"no such flood: {', '.join(unknown)}")
    slow = []
    print(COLUMNS)
    for kind in arguments.kinds or KINDS:
        for how in arguments.how or HOW:
            found = measure(kind, how, arguments.seconds)
            print(row(found), flush=True)
            quiet, loud = found["quiet"], found["loud"]
            times = [loud[which] / quiet[which] for which in ("p50", "cpu")]
            if how in ("listener", "iteration") and min(times) > TARGET:
                slow.append(f"{kind}, {how}")
    for what in slow:
        print(f"TOO SLOW beside {what}")
    return int(bool(slow))


if __name__ == "__main__":
    sys.exit(main())
