"""Plans the cells from what a counting run saw, and runs them in preloaded workers."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults import shim
from tests.faults.errors import ERRORS, number_of
from tests.faults.scenarios import ONLY, SCENARIOS
from tests.faults.world import Cell

ROOT = Path(__file__).parent.parent.parent
DIALECTS = ("node", "native")
# What hangs only waits.
AT_ONCE = 4 * (os.cpu_count() or 1)

POPEN = "Popen has forked or opened pipes, and raises without naming them"
PIPES = "asyncio drops the transport it has begun to make"
TRANSPORT = "uvloop drops the transport it has begun to make"
# Loop ("" for each), call, and who calls: not ours to judge, or to mend.
NOT_OURS: dict[tuple[str, str, str], str] = {
    ("", "close", "by subprocess"): POPEN,
    ("", "fstat", "by subprocess"): POPEN,
    ("", "ioctl", "by base_events"): PIPES,
    ("", "fstat", "by base_events"): PIPES,
    ("uvloop", "ioctl", "Connection._start"): TRANSPORT,
    ("uvloop", "fcntl", "Connection._start"): TRANSPORT,
    ("uvloop", "epoll_ctl", ""): "libuv ends the process (uv__io_poll)",
}

# What fails for good rather than once, in the short form too.
STICKY = {
    "sendmsg": ("ENOBUFS", "ENOMEM", "ETOOMANYREFS", "EPIPE", "EAGAIN", "one byte"),
    "recvmsg": ("ENOMEM", "ECONNRESET", "EBADF", "one byte", "descriptors lost"),
    "epoll_ctl": ("ENOSPC",),
    "shutdown": ("ENOTCONN", "EBADF"),
    "close": ("EIO",),
    "accept4": ("EMFILE", "EBADF", "ECONNABORTED"),
    "getsockopt": ("ENOBUFS",),
    "ioctl": ("EBADF",),
    "fork": ("EAGAIN",),
    "pidfd_open": ("ENOSYS",),
    "send": ("one byte",),
}


@dataclasses.dataclass
class Outcome:
    """A cell and what became of it."""

    cell: Cell
    fired: int
    outcome: str
    broken: list[str]
    told: list[str]
    site: str
    sites: dict[str, list[str]]
    counts: dict[str, int]

    @classmethod
    def of(cls, cell: Cell) -> Outcome:
        """Return a cell that has not run."""
        return cls(cell, 0, "", [], [], "", {}, {})


class Sweep:
    """The compiled programs, and running cells with them."""

    def __init__(self, directory: Path, at_once: int = AT_ONCE) -> None:
        self._shim, self._peer = shim.build(directory)
        self._at_once = at_once

    def run(
        self, cells: list[Cell], progress: Callable[[Outcome], None] | None = None
    ) -> list[Outcome]:
        """Run cells; return what became of each, in their order."""
        environment = {
            **os.environ,
            "LD_PRELOAD": str(self._shim),
            "FAULTS_PEER": str(self._peer),
            "PYTHONPATH": os.pathsep.join(
                filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
            ),
        }
        with tempfile.TemporaryFile("w+") as given:
            for cell in cells:
                given.write(json.dumps(dataclasses.asdict(cell)) + "\n")
            given.seek(0)
            command = [sys.executable, "-m", "tests.faults.worker", str(self._at_once)]
            found: dict[int, Outcome] = {}
            with subprocess.Popen(
                command, stdin=given, stdout=subprocess.PIPE, env=environment, text=True
            ) as worker:
                assert worker.stdout is not None
                for line in worker.stdout:
                    fields = json.loads(line)
                    index = fields.pop("index")
                    found[index] = Outcome(cells[index], **fields)
                    if progress is not None:
                        progress(found[index])
            assert worker.returncode == 0, f"the worker ended with {worker.returncode}"
        return [found[i] for i in range(len(cells))]

    def count(self, loop: str, scenarios: list[str] | None = None) -> list[Outcome]:
        """Run each scenario without a fault: what it calls, and where."""
        return self.run(
            [
                Cell(name, dialect, loop=loop)
                for name in scenarios or SCENARIOS
                for dialect in ONLY.get(name, DIALECTS)
            ]
        )


def plan(counted: list[Outcome], *, every: bool) -> Iterator[Cell]:
    """Yield the cells: with ``every`` all call sites, else the first and last use of each line."""
    for one in counted:
        base = one.cell
        for call, count in one.counts.items():
            if not count:
                continue
            ats = _all(one, call, count) if every else _some(one, call, count)
            for error in ERRORS[call]:
                for at in ats:
                    yield dataclasses.replace(base, call=call, error=number_of(error), at=at)
            sticky_at = ats if every else _firsts(one, call, count)
            for error in STICKY.get(call, ()):
                for at in sticky_at if error not in ("one byte",) else [1]:
                    yield dataclasses.replace(
                        base, call=call, error=number_of(error), at=at, sticky=True
                    )


def _all(one: Outcome, call: str, count: int) -> list[int]:
    return sorted(at for ats in _by_site(one, call, count).values() for at in ats)


def _some(one: Outcome, call: str, count: int) -> list[int]:
    return sorted({at for ats in _by_site(one, call, count).values() for at in (ats[0], ats[-1])})


def _firsts(one: Outcome, call: str, count: int) -> list[int]:
    return sorted({ats[0] for ats in _by_site(one, call, count).values()})


def _by_site(one: Outcome, call: str, count: int) -> dict[str, list[int]]:
    sites = one.sites.get(call, ["?"] * count)  # execve: in the child, where nobody looks
    found: dict[str, list[int]] = collections.defaultdict(list)
    for at, site in enumerate(sites, 1):
        if not is_not_ours(one.cell.loop, call, site):
            found[site].append(at)
    return found


def is_not_ours(loop: str, call: str, site: str) -> bool:
    """Whether what comes of this is the doing of somebody else, with the library looking on."""
    return any(
        of_loop in ("", loop) and call == of_call and of_site in site
        for of_loop, of_call, of_site in NOT_OURS
    )


def describe(outcome: Outcome) -> str:
    """Say in one paragraph what was broken, with what is needed to run it again."""
    lines = [f"{outcome.cell} at {outcome.site or '?'}"]
    lines += [f"    broken: {one}" for one in outcome.broken]
    lines += [f"    told: {one[:300]}" for one in outcome.told[:8]]
    return "\n".join(lines)
