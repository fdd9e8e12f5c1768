"""Runs cells: each in a forked copy of this process, which has everything loaded and preloaded.

Reads cells from standard input, one JSON line each, and writes what became of them. Several run at
a time, since what hangs only waits.
"""

from __future__ import annotations

import asyncio
import dataclasses
import faulthandler
import gc
import json
import math
import os
import resource
import selectors
import signal
import sys
import time
import traceback
from typing import Any

from handleipc.asyncio import pace
from tests.faults import world as worlds
from tests.faults.scenarios import AFTER_THE_LOOP, SCENARIOS
from tests.faults.shim import Shim
from tests.faults.world import Cell, World

# After this a copy is killed: it does not even wait, it is stuck.
STUCK = 2 * worlds.PATIENCE + 5
# Processor time; a cell takes some hundredths of a second.
SPINS = 5


def run_cell(cell: Cell, shim: Shim) -> dict[str, Any]:
    """Run one cell in this process, and return what became of it."""
    world = World(cell, shim)
    before = worlds.open_descriptors()
    factory = None
    if cell.loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop

    async def main() -> None:
        watch(asyncio.get_running_loop())
        inside = worlds.open_descriptors()
        await SCENARIOS[cell.scenario](world)
        if cell.scenario not in AFTER_THE_LOOP:
            await world.settle()
            await _until_gone(cell, inside)
            worlds.judge_process(world, inside, when="at the end")

    sites: dict[str, list[str]] = {}
    with worlds.overheard(world) as watch:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(main())
        if cell.scenario in AFTER_THE_LOOP:
            AFTER_THE_LOOP[cell.scenario](world)
        shim.disarm()
        sites = {k: v for k, v in shim.sites.items() if v}
        if cell.loop == "asyncio":
            worlds.judge_process(world, before, when="after the loop")
    outcome = world.judge_effect()
    site = ""
    if cell.call is not None and cell.at and len(shim.sites[cell.call]) >= cell.at:
        site = shim.sites[cell.call][cell.at - 1]
    return {
        "fired": shim.fired,
        "outcome": outcome,
        "broken": world.broken,
        "told": world.told,
        "site": site,
        "sites": sites if cell.call is None else {},
        "counts": shim.counts() if cell.call is None else {},
    }


async def _until_gone(cell: Cell, inside: dict[int, str]) -> None:
    """Give what ends by itself the time: lingering answers, threads that reap."""
    deadline = time.monotonic() + 1
    while any(worlds.differences(cell, inside)) and time.monotonic() < deadline:
        gc.collect()
        await asyncio.sleep(0.002)


def _in_a_copy(cell: Cell, shim: Shim) -> tuple[int, int]:
    """Fork; return the copy's pid and the pipe on which it answers."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    os.close(reading)
    os.setpgid(0, 0)
    resource.setrlimit(resource.RLIMIT_CPU, (SPINS, SPINS + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if os.environ.get("FAULTS_SHOW"):
        faulthandler.dump_traceback_later(STUCK - 2, exit=False, file=sys.stderr)
    try:
        result = run_cell(cell, shim)
    except BaseException as error:
        shim.disarm()
        where = traceback.format_exc()[-1500:]
        result = _nothing_but(f"the scenario raised {error!r}: {where}")
    data = json.dumps(result).encode()
    while data:
        data = data[os.write(writing, data) :]
    os._exit(0)


def _nothing_but(broken: str) -> dict[str, Any]:
    empty = {"outcome": "", "told": [], "site": "", "sites": {}, "counts": {}}
    return {"fired": 1, "broken": [broken], **empty}


@dataclasses.dataclass
class _Copy:
    index: int
    pid: int
    deadline: float
    data: bytes = b""


def main() -> None:
    """Serve cells until standard input ends."""
    os.environ.pop("LD_PRELOAD", None)
    at_once = int(sys.argv[1])
    worlds.shorten_lingering()
    # How much a turn reads depends on the processor otherwise, and with it which calls are made.
    pace.LONG = pace.SHORT = math.inf
    shim = Shim()
    cells = [json.loads(line) for line in sys.stdin]
    _warm_up(cells)
    gc.collect()
    gc.freeze()
    selector = selectors.DefaultSelector()
    waiting = list(enumerate(cells))[::-1]
    while waiting or selector.get_map():
        while waiting and len(selector.get_map()) < at_once:
            index, fields = waiting.pop()
            pid, pipe = _in_a_copy(Cell(**fields), shim)
            selector.register(
                pipe, selectors.EVENT_READ, _Copy(index, pid, time.monotonic() + STUCK)
            )
        for key, _ in selector.select(0.5):
            more = os.read(key.fd, 1 << 20)
            key.data.data += more
            if not more:
                _finish(selector, key.fd, key.data)
        for key in list(selector.get_map().values()):
            if time.monotonic() > key.data.deadline:
                os.kill(key.data.pid, signal.SIGKILL)
                key.data.deadline = float("inf")


def _finish(selector: selectors.BaseSelector, pipe: int, copy: _Copy) -> None:
    selector.unregister(pipe)
    os.close(pipe)
    _, status = os.waitpid(copy.pid, 0)
    try:  # whatever it has started and not ended
        os.killpg(copy.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    code = os.waitstatus_to_exitcode(status)
    if code == 0 and copy.data:
        result = json.loads(copy.data)
    else:
        what = f"crash: the process ended with {code}"
        if copy.deadline == float("inf"):
            what = "hang: the process is stuck"
        elif code == -signal.SIGXCPU:
            what = f"spins: {SPINS} s of processor time"
        result = _nothing_but(what)
    print(json.dumps({"index": copy.index, **result}), flush=True)


def _warm_up(cells: list[dict[str, Any]]) -> None:
    # What is imported late or opened once for all is there before the first copy.
    asyncio.run(asyncio.sleep(0))
    import concurrent.futures.thread
    import multiprocessing

    del concurrent, multiprocessing
    if any(cell["loop"] == "uvloop" for cell in cells):
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(asyncio.sleep(0))


if __name__ == "__main__":
    main()
