"""``python -m tests.fuzz CASES SEED``: the fuzzer by command.

python -m tests.fuzz 200000 1                       so many cases of a seed, on all processors
python -m tests.fuzz 1 1 --first 4711               one of them
python -m tests.fuzz 20000 1 --keep DIRECTORY       write what finds something, made small
python -m tests.fuzz --replay FILE ...              run written scripts
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import faulthandler
import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

from tests.fuzz.case import Fuzzer, Maker, Replay, Script

parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
parser.add_argument("cases", type=int, nargs="?", default=1000)
parser.add_argument("seed", type=int, nargs="?", default=1)
parser.add_argument("--first", type=int, default=0)
parser.add_argument("--jobs", type=int, default=os.cpu_count())
parser.add_argument("--loop", choices=["asyncio", "uvloop"], default="asyncio")
parser.add_argument("--keep", type=Path)
parser.add_argument("--replay", type=Path, nargs="*")
parser.add_argument("--step", type=int, default=1, help=argparse.SUPPRESS)
arguments = parser.parse_args()
# When 200 cases take so long, the one that stands still is shown where it stands.
STUCK = 300


def kind_of(found: str) -> str:
    """What was found, without what differs between cases."""
    return re.sub(r"\d+", "N", found)[:160]


async def many() -> int:
    kinds: dict[str, list[int]] = collections.defaultdict(list)
    began, cpu = time.monotonic(), time.process_time()
    early = 0
    with Fuzzer() as fuzzer:
        numbers = range(arguments.first, arguments.first + arguments.cases, arguments.step)
        for count, number in enumerate(numbers):
            if count % 200 == 0:
                faulthandler.dump_traceback_later(STUCK, exit=True)
            script = Maker(arguments.seed, number)
            for found in await fuzzer.run(script):
                kind = kind_of(found)
                kinds[kind].append(number)
                if len(kinds[kind]) <= 3:
                    print(f"case {number}: {found}", flush=True)
                if arguments.keep and len(kinds[kind]) == 1:
                    await keep(fuzzer, script, found)
            if count == 1000:
                early = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        faulthandler.cancel_dump_traceback_later()
        stats = dict(fuzzer.stats)
    took, cpu = time.monotonic() - began, time.process_time() - cpu
    late = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    done = len(numbers)
    print(
        f"seed {arguments.seed}: {stats}, {done / took:.0f} cases/s, {done / cpu:.0f} of CPU time"
    )
    print(f"most memory after 1000 cases {early} KiB, at the end {late} KiB")
    for kind, where in kinds.items():
        print(f"{len(where):6} x {kind}, first in case {where[0]}")
    return int(bool(kinds))


async def keep(fuzzer: Fuzzer, script: Script, found: str) -> None:
    """Write a script that finds this, made small."""
    deadline = time.monotonic() + 30

    async def finds(written: dict[str, object]) -> bool:
        again = await fuzzer.run(Replay(written))
        return any(kind_of(one) == kind_of(found) for one in again)

    written = script.dump()
    steps = written["steps"]
    size = len(steps) // 2
    while size and time.monotonic() < deadline:
        at = 0
        while at < len(steps) and time.monotonic() < deadline:
            shorter = steps[:at] + steps[at + size :]
            if await finds({**written, "steps": shorter}):
                steps = shorter
            else:
                at += size
        size //= 2
    written = {"found": found, **written, "steps": steps}
    name = hashlib.sha256(kind_of(found).encode()).hexdigest()[:8]
    arguments.keep.mkdir(parents=True, exist_ok=True)
    (arguments.keep / f"{name}.json").write_text(json.dumps(written, indent=1) + "\n")


async def replay() -> int:
    bad = 0
    with Fuzzer() as fuzzer:
        for path in arguments.replay:
            found = await fuzzer.run(Replay(json.loads(path.read_text())))
            print(path.name, found or "finds nothing")
            bad |= bool(found)
    return bad


def in_parallel() -> int:
    """Run every n-th case in each of n processes."""
    command = [sys.executable, "-m", "tests.fuzz", *sys.argv[1:], "--jobs", "1"]
    jobs = arguments.jobs
    running = [
        subprocess.Popen([*command, "--first", str(arguments.first + i), "--step", str(jobs)])
        for i in range(jobs)
    ]
    return max(job.wait() for job in running)


def main() -> int:
    if arguments.replay is None and arguments.jobs > 1 and arguments.cases >= 1000:
        return in_parallel()
    factory = None
    if arguments.loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(replay() if arguments.replay is not None else many())


if __name__ == "__main__":
    sys.exit(main())
