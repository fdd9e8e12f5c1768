"""``python -m tests.soak.kill``: children that serve clients are killed, and every loss is explained.

Four children serve 32 clients; every 20 to 50 ms one of them gets SIGKILL and is replaced. A client
may only fail if its connection was acknowledged to a child that was killed: everything else is
*unexplained*, and there must be none. What was acknowledged to a killed child that its application
had not taken is what acknowledging ahead costs: two a kill at most, on average.

python -m tests.soak.kill                           100 s of each dialect in turn, three times
python -m tests.soak.kill --busy 4                  the same beside four busy processes
python -m tests.soak.kill --seconds 10 --runs 1 --dialect native

Ends with 1 if a bound is broken.
"""

from __future__ import annotations

import argparse
import array
import asyncio
import collections
import contextlib
import dataclasses
import gc
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Iterator

import handleipc
from handleipc import Limits
from handleipc.asyncio.child import Child
from handleipc.asyncio.driver import process_system
from handleipc.asyncio.reaping import Process
from handleipc.environment import child_environment, socket_cookie
from tests.soak.zygote import Taken

CHILDREN, CLIENTS = 4, 32
PAUSE = (0.02, 0.05)
# The bounds: connections lost untaken a kill, and clients lost in native for each lost in node.
MOST_UNTAKEN, MOST_BESIDE_NODE = 2.0, 1.2
# Places in the memory that says who took which connection.
MOST_CONNECTIONS = 1 << 22


class Grandchild(Process):
    """A process that is not this one's to reap: it ends of a signal of ours, or well."""

    _signal = 0

    def __init__(self, pid: int) -> None:
        nothing = types.SimpleNamespace(pid=pid, stdin=None, stdout=None, stderr=None)
        super().__init__(nothing)  # type: ignore[arg-type]

    def _status(self, pidfd: int) -> int | None:
        return -self._signal if select.select([pidfd], [], [], 0)[0] else None

    def send_signal(self, number: int, pidfd: int = -1) -> None:
        self._signal = self._signal or number
        super().send_signal(number, pidfd)


class Zygote:
    """The warm interpreter that forks the children, and the memory it shares with them.

    Args:
        at_once: how many connections each child serves at a time; 0 for all that come.
    """

    def __init__(self, at_once: int) -> None:
        memory = os.memfd_create("taken")
        os.truncate(memory, 4 * MOST_CONNECTIONS)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        fds = theirs.fileno(), memory
        words = map(str, (*fds, at_once))
        command = [sys.executable, "-m", "tests.soak.zygote", *words]
        with theirs:
            self._process = subprocess.Popen(command, pass_fds=fds)
        self.taken = Taken(memory)
        os.close(memory)

    async def start(self, limits: Limits, dialect: str) -> Child:
        """Return a new child."""
        ours, theirs = socket.socketpair()
        invite = socket_cookie(theirs) if dialect == "native" else None
        with theirs:
            env = child_environment(dict(os.environ), theirs.fileno(), limits, invite)
            socket.send_fds(self._control, [json.dumps(env).encode()], [theirs.fileno()])
        data = await asyncio.get_running_loop().sock_recv(self._control, 4)
        (pid,) = array.array("i", data)
        return Child(ours, limits, Grandchild(pid), invited=invite is not None, accept_handles=True)

    def close(self) -> None:
        """End the zygote; its children are ended by their channels."""
        self._control.close()
        self._process.wait()
        self.taken.close()


@dataclasses.dataclass
class Result:
    """What one run found."""

    dialect: str
    kills: int = 0
    served: int = 0
    failed: int = 0
    untaken: list[int] = dataclasses.field(default_factory=list)
    """For each kill, how many connections were acknowledged and not taken."""
    wrong: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """What nothing explains, by kind."""

    @property
    def untaken_mean(self) -> float:
        """The connections that a kill swallowed, on average."""
        return sum(self.untaken) / max(1, len(self.untaken))

    @property
    def failed_share(self) -> float:
        """The share of clients that failed."""
        return self.failed / max(1, self.failed + self.served)

    def __str__(self) -> str:
        return (
            f"{self.dialect:6} {self.kills} kills; clients ok {self.served}, failed {self.failed}"
            f" ({self.failed_share:.2%}), unexplained {self.wrong.total()}; acknowledged and not"
            f" taken {self.untaken_mean:.2f} a kill, at most {max(self.untaken, default=0)}"
        )


class Run:
    """One run: a parent, its children, and who sent what where.

    Args:
        zygote: starts the children.
        result: where findings go.
    """

    def __init__(self, zygote: Zygote, result: Result) -> None:
        self._zygote = zygote
        self._result = result
        self._limits = Limits()
        self._children: list[Child] = []
        self._killed: dict[int, float] = {}
        # By number of the connection: the port of its client, when it came, who acknowledged it.
        self._ports: list[int] = []
        self._came: list[float] = []
        self._owners: list[int] = []
        self._sending: set[asyncio.Task[None]] = set()

    async def go(self, seconds: float) -> None:
        """Kill children for so long, then judge what became of the clients."""
        for _ in range(CHILDREN):
            await self._start()
        async with await handleipc.listen("127.0.0.1", 0) as server:
            accepting = asyncio.create_task(self._accept(server))
            words = [str(server.sockname[1]), str(seconds), str(CLIENTS)]
            clients = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.soak.clients", *words),
                stdout=asyncio.subprocess.PIPE,
            )
            until = time.monotonic() + seconds
            killing = asyncio.create_task(self._kill(until))
            output, _ = await clients.communicate()
            await killing
            accepting.cancel()
            await asyncio.wait([accepting])
        for child in self._children:
            child.disconnect()
        for child in self._children:
            await child.wait_disconnected()
            await child.wait()
        for task in self._sending:
            task.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)
        self._judge(json.loads(output))

    async def _start(self) -> None:
        child = await self._zygote.start(self._limits, self._result.dialect)
        child.on("error", lambda error: self._result.wrong.update([f"error event: {error}"]))
        child.on("undelivered", self._came_back)
        self._children.append(child)

    def _came_back(self, number: int, connection: object, reason: str) -> None:
        # Every send is waited for, so nothing may come back in any other way.
        self._result.wrong.update([f"undelivered event: {reason}"])

    async def _kill(self, until: float) -> None:
        while time.monotonic() < until:
            await asyncio.sleep(random.uniform(*PAUSE))
            victim = self._children.pop(random.randrange(CHILDREN))
            self._killed[victim.pid] = time.monotonic()
            victim.kill(signal.SIGKILL)
            self._result.kills += 1
            await self._start()

    async def _accept(self, server: handleipc.Server) -> None:
        async for connection in server:
            number = len(self._ports)
            self._ports.append(connection.peername[1])
            self._came.append(time.monotonic())
            self._owners.append(0)
            task = asyncio.create_task(self._hand_over(number, connection))
            self._sending.add(task)
            task.add_done_callback(self._handed_over)

    async def _hand_over(self, number: int, connection: handleipc.Connection) -> None:
        while True:
            connected = [child for child in self._children if child.connected]
            if not connected:
                await asyncio.sleep(0.001)
                continue
            child = random.choice(connected)
            try:
                await child.send(number, connection)
            except (handleipc.HandleNotDelivered, handleipc.ChannelClosed):
                continue  # it is ours again, or still
            self._owners[number] = child.pid
            return

    def _handed_over(self, task: asyncio.Task[None]) -> None:
        self._sending.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._result.wrong.update([f"send: {task.exception()!r:.100}"])

    def _judge(self, clients: list[tuple[int | None, float, float, str | None]]) -> None:
        result, taken = self._result, self._zygote.taken
        by_port = collections.defaultdict(list)
        for number, port in enumerate(self._ports):
            by_port[port].append(number)
        for port, began, ended, why in clients:
            if why is None:
                result.served += 1
                continue
            result.failed += 1
            numbers = [n for n in by_port[port] if began <= self._came[n] <= ended]
            owner = self._owners[numbers[-1]] if numbers else 0
            if self._killed.get(owner, ended) >= ended:
                result.wrong.update([f"client: {why}"])
        lost = dict.fromkeys(self._killed, 0)
        for number, owner in enumerate(self._owners):
            by = taken.by(number)
            if by not in (0, owner):
                result.wrong.update(["taken by a process that did not acknowledge it"])
            elif owner in lost and not by:
                lost[owner] += 1
        result.untaken += lost.values()


def run(dialect: str, seconds: float, at_once: int) -> Result:
    """Run once and return what was found."""
    result = Result(dialect)
    with contextlib.closing(Zygote(at_once)) as zygote:
        gc.collect()
        before = len(os.listdir("/proc/self/fd"))
        asyncio.run(Run(zygote, result).go(seconds))
        gc.collect()
        if (after := len(os.listdir("/proc/self/fd"))) != before:
            result.wrong.update([f"descriptors: {before} before, {after} after"])
    if process_system.in_flight.total:
        result.wrong.update([f"{process_system.in_flight.total} descriptors counted in flight"])
    return result


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep so many processors busy."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def broken(results: list[Result]) -> list[str]:
    """Return which bounds these runs have broken."""
    found = []
    shares = collections.defaultdict(list)
    for result in results:
        found += [f"{result.dialect}: {count} x {what}" for what, count in result.wrong.items()]
        if result.untaken_mean > MOST_UNTAKEN:
            found.append(f"{result.dialect}: {result.untaken_mean:.2f} untaken a kill")
        shares[result.dialect].append(result.failed_share)
    if len(shares) == 2:
        native, node = (sum(shares[dialect]) for dialect in ("native", "node"))
        if native > MOST_BESIDE_NODE * node:
            found.append(f"native loses {native / node:.2f} times the clients that node loses")
    return found


def main() -> int:
    """Run as the arguments say; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak.kill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--dialect", choices=["native", "node", "both"], default="both")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--busy", type=int, default=0, metavar="PROCESSES")
    parser.add_argument(
        "--at-once", type=int, default=0, help="connections a child serves at a time; 0 is no bound"
    )
    arguments = parser.parse_args()
    dialects = ["native", "node"] if arguments.dialect == "both" else [arguments.dialect]
    results = []
    with busy(arguments.busy):
        for _ in range(arguments.runs):
            for dialect in dialects:
                results.append(run(dialect, arguments.seconds, arguments.at_once))
                print(results[-1], flush=True)
    for what in (found := broken(results)):
        print("BROKEN", what)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
