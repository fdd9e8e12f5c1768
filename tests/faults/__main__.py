"""``python -m tests.faults``: the fault sweep by command.

python -m tests.faults                  the cells of the test, and what is broken
python -m tests.faults --all            every use of every call, asyncio and uvloop
python -m tests.faults --write          write docs/faults.md anew, if nothing is broken
python -m tests.faults --only TEXT      only cells whose description contains TEXT
python -m tests.faults --count          only what each scenario calls, and where
"""

from __future__ import annotations

import argparse
import collections
import re
import sys
import tempfile
import time
from pathlib import Path

from tests.faults import table
from tests.faults.sweep import AT_ONCE, Outcome, Sweep, describe, plan

parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
parser.add_argument("--all", action="store_true")
parser.add_argument("--write", action="store_true")
parser.add_argument("--count", action="store_true")
parser.add_argument("--only", default="")
parser.add_argument("--loop", default="asyncio", choices=["asyncio", "uvloop", "both"])
parser.add_argument("--quiet", action="store_true", help="one line for each kind of finding")
parser.add_argument("--at-once", type=int, default=AT_ONCE, help="cells that run at a time")
arguments = parser.parse_args()

began = time.monotonic()
loops = ["asyncio", "uvloop"] if arguments.all or arguments.loop == "both" else [arguments.loop]
done: list[Outcome] = []
with tempfile.TemporaryDirectory() as directory:
    sweep = Sweep(Path(directory), arguments.at_once)
    counted = [one for loop in loops for one in sweep.count(loop)]
    done += counted
    if arguments.count:
        for one in counted:
            print(one.cell)
            for call, sites in one.sites.items():
                for site, uses in collections.Counter(sites).items():
                    print(f"    {call:12} {uses:3} {site}")
    else:
        cells = [c for c in plan(counted, every=arguments.all) if arguments.only in str(c)]
        print(f"{len(cells)} cells", flush=True)

        def progress(outcome: Outcome) -> None:
            if outcome.broken and not arguments.quiet:
                print(describe(outcome), flush=True)

        done += sweep.run(cells, progress)

broken = [one for one in done if one.broken]
if broken and not arguments.count:
    kinds: dict[tuple[str, str], list[Outcome]] = collections.defaultdict(list)
    for one in broken:
        for rule in one.broken:
            kinds[one.cell.call or "none", re.sub(r"\d+", "N", rule)[:120]].append(one)
    print("\nKinds of findings:")
    for (call, rule), found in sorted(kinds.items()):
        print(f"{len(found):5} {call:12} {rule}  e.g. {found[0].cell} at {found[0].site}")
if arguments.write and broken:
    print(f"{table.PAGE.name} is not written: it would promise what is broken")
elif arguments.write:
    table.PAGE.write_text(table.page(done))
    print(f"{table.PAGE.name} written")
print(f"{len(done)} cells, {len(broken)} broken, {time.monotonic() - began:.0f} s")
sys.exit(bool(broken))
