"""What one hostile peer costs the process at the other end, and another peer of that process.

python -m tests.hostile.measure KIND HOW SECONDS

HOW says what the process does with what comes: ``listener`` and ``iteration`` take it; ``nobody``
takes nothing; with ``waits`` nobody does, and a ``send`` that the peer does not answer waits, for
which reading goes on. Prints one JSON object. To be run in a process of its own, since the most
memory that a process ever had is what is asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import handleipc
from handleipc import Channel, Limits

HOW = ["listener", "iteration", "nobody", "waits"]
# How often the flood is stopped, to compare it with silence at nearly the same time.
ROUNDS = 8
Times = list[tuple[float, float]]


def prefer(pid: int) -> None:
    """Have the kernel run a process as soon as it can, if it may be asked for that.

    What is measured is how long the event loop keeps a neighbour waiting. With fewer processors
    than processes, its own wait for one would be most of it: a slice of the scheduler is 3 ms.
    """
    with contextlib.suppress(PermissionError, AttributeError):
        os.sched_setscheduler(pid, os.SCHED_RR, os.sched_param(1))


@contextlib.contextmanager
def peer(kind: str) -> Iterator[tuple[Channel, subprocess.Popen[bytes]]]:
    """A channel to such a process, and the process."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.peer", str(theirs.fileno()), kind],
            pass_fds=[theirs.fileno()],
        )
    if kind == "echo":
        prefer(process.pid)
    try:
        yield Channel(ours, Limits(), inviting=kind.startswith("native")), process
    finally:
        process.kill()
        process.wait()


def memory(what: str) -> int:
    """Return how many MiB of memory this process has (``VmRSS``), or had at most (``VmHWM``)."""
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith(what))
    return int(line.split()[1]) >> 10


async def exchange(channel: Channel, seconds: float) -> Times:
    """Ask and be answered, again and again; the seconds that took, and of them our own CPU."""
    times = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        start, cpu = time.perf_counter(), time.process_time()
        await channel.send(1)
        await channel.recv()
        times.append((time.perf_counter() - start, time.process_time() - cpu))
        await asyncio.sleep(0.002)
    return times


async def sample(most: dict[str, int]) -> None:
    """Watch memory and descriptors."""
    while True:
        most["descriptors"] = max(most["descriptors"], len(os.listdir("/proc/self/fd")))
        await asyncio.sleep(0.01)


async def take(channel: Channel, counts: list[int]) -> None:
    """Take messages by iteration."""
    with contextlib.suppress(handleipc.HandleIPCError):
        async for _, handle in channel:
            counts[0] += 1
            if handle is not None:
                handle.close()


async def measure(kind: str, how: str, seconds: float) -> dict[str, Any]:
    """Measure beside the flood and in silence, in turns: the peer is stopped and goes on."""
    counts = [0]

    def listener(message: object, handle: Any) -> None:
        counts[0] += 1
        if handle is not None:
            handle.close()

    with contextlib.ExitStack() as stack:
        neighbour, _ = stack.enter_context(peer("echo"))
        await neighbour.send(1)
        await neighbour.recv()
        gc.collect()
        most = {"descriptors": 0}
        before = memory("VmRSS"), len(os.listdir("/proc/self/fd"))
        channel, process = stack.enter_context(peer(kind))
        channel.on("error", lambda error: None)
        channel.on("undelivered", lambda message, handle, reason: handle.close())
        tasks = [asyncio.create_task(sample(most))]
        if how == "listener":
            channel.on("message", listener)
        elif how == "iteration":
            tasks.append(asyncio.create_task(take(channel, counts)))
        elif how == "waits":
            handle, _other = socket.socketpair()
            stack.callback(_other.close)
            tasks.append(asyncio.create_task(channel.send("never answered", handle)))
        # Until it has begun, and has what it can get.
        await exchange(neighbour, 1 + seconds / 2)
        quiet: Times = []
        loud: Times = []
        rates: list[float] = []
        for _ in range(ROUNDS):
            before_it = counts[0], time.monotonic()
            loud += await exchange(neighbour, seconds / ROUNDS)
            rates.append((counts[0] - before_it[0]) / (time.monotonic() - before_it[1]))
            process.send_signal(signal.SIGSTOP)
            taken = -1
            while taken != counts[0]:  # what it has written before
                taken = counts[0]
                await exchange(neighbour, 0.05)
            quiet += await exchange(neighbour, seconds / ROUNDS / 2)
            process.send_signal(signal.SIGCONT)
            await exchange(neighbour, 0.05)
        result = {
            "kind": kind,
            "how": how,
            "quiet": percentiles(quiet),
            "loud": percentiles(loud),
            "messages": sum(rates) / len(rates),
            "descriptors": most["descriptors"] - before[1],
            "memory": memory("VmHWM") - before[0],
            "error": str(channel._protocol.error or ""),
        }
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if how == "listener":
            channel.off("message", listener)
        for one in (channel, neighbour):
            one.abort()
            await one.wait_disconnected()
        while channel._protocol.incoming.ready:
            _, handle = await channel.recv()
            if handle is not None:
                handle.close()
    return result


def percentiles(times: Times) -> dict[str, float]:
    """Return milliseconds: the median, of a hundred the slowest, and the median of our own CPU."""
    wall = sorted(one for one, _ in times)
    cpu = sorted(one for _, one in times)
    return {
        "p50": 1e3 * wall[len(wall) // 2],
        "p99": 1e3 * wall[int(len(wall) * 0.99)],
        "cpu": 1e3 * cpu[len(cpu) // 2],
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure(sys.argv[1], sys.argv[2], float(sys.argv[3])))))
