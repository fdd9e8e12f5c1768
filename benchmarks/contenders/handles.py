"""Python programs: ``python -m benchmarks.contenders.handles WHAT CONTENDER N``."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.reduction
import os
import socket
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any

import handleipc


def message(i: int, n: int) -> dict[str, Any]:
    """The message of about 40 bytes that all contenders send."""
    return {"op": "route", "n": i, "of": n, "ok": True}


def report(seconds: float, count: int, laps: list[float] | None = None) -> None:
    """Print the result."""
    print(json.dumps({"seconds": seconds, "count": count, "laps": laps or []}))


def connection() -> socket.socket:
    """Return a live TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
    accepted.setblocking(False)
    client.detach()  # kept open by this process until it ends
    return accepted


# -- handleipc ------------------------------------------------------------------------------------


async def sink(parent: handleipc.Channel) -> None:
    """The child: take everything, close what comes, say when all is there."""
    count = 0
    async for batch in parent.batches():
        for received, handle in batch:
            if handle is not None:
                handle.close()
            if received == "warm":
                await parent.send("warm")
                continue
            count += 1
            if count == received["of"]:
                await parent.send("done")


async def send_all(what: str, n: int) -> None:
    """The parent."""
    child = await handleipc.fork(__file__, "child")
    sock = connection()
    made = handleipc.Connection(sock.fileno(), _kind(sock))
    sock.detach()
    handle = made if what in ("handles", "latency") else None
    await child.send("warm", handle, keep_open=True)
    await child.recv()
    laps = []
    start = time.perf_counter()
    if what == "latency":
        for i in range(n):
            lap = time.perf_counter()
            await child.send(message(i, n), handle, keep_open=True)
            laps.append(time.perf_counter() - lap)
    else:
        for i in range(n):
            if not child.send_nowait(message(i, n), handle, keep_open=handle is not None):
                await child.drain()
    assert (await child.recv())[0] == "done"
    report(time.perf_counter() - start, n, laps)
    child.disconnect()
    await child.wait()
    made.close()


def _kind(sock: socket.socket) -> int:
    from handleipc.ancillary import descriptor_kind

    return descriptor_kind(sock.fileno())


async def child_main() -> None:
    """Run in the child."""
    await sink(await handleipc.parent())


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run on the loop this benchmark is about."""
    if os.environ.get("HANDLEIPC_BENCHMARK_LOOP") == "uvloop":
        import uvloop

        uvloop.run(main)
    else:
        asyncio.run(main)


# -- the standard library -------------------------------------------------------------------------


def in_two_processes(
    child: Callable[[Any, int], None], parent: Callable[[Any, int], None], ends: Any, n: int
) -> None:
    """Fork, let the child warm up, and time the parent until the child says that it is done."""
    ready, done = os.pipe(), os.pipe()
    if os.fork() == 0:
        os.write(ready[1], b"x")
        child(ends[1], n)
        os.write(done[1], b"x")
        os._exit(0)
    os.read(ready[0], 1)
    start = time.perf_counter()
    parent(ends[0], n)
    os.read(done[0], 1)
    report(time.perf_counter() - start, n)
    os.wait()


def stdlib_send(sock: socket.socket, n: int) -> None:
    fd = connection().detach()
    for i in range(n):
        socket.send_fds(sock, [json.dumps(message(i, n)).encode() + b"\n"], [fd])


def stdlib_receive(sock: socket.socket, n: int) -> None:
    count, rest = 0, b""
    while count < n:
        data, fds, _, _ = socket.recv_fds(sock, 65536, 16)
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            json.loads(line)
        for fd in fds:
            socket.socket(fileno=fd).close()
            count += 1


def reduction_send(pipe: Any, n: int) -> None:
    fd = connection().detach()
    for _ in range(n):
        multiprocessing.reduction.send_handle(pipe, fd, os.getppid())


def reduction_receive(pipe: Any, n: int) -> None:
    for _ in range(n):
        os.close(multiprocessing.reduction.recv_handle(pipe))


def pipe_send(pipe: Any, n: int) -> None:
    for i in range(n):
        pipe.send(message(i, n))


def pipe_receive(pipe: Any, n: int) -> None:
    for _ in range(n):
        pipe.recv()


def bytes_send(pipe: Any, n: int) -> None:
    for i in range(n):
        pipe.send_bytes(json.dumps(message(i, n)).encode())


def bytes_receive(pipe: Any, n: int) -> None:
    for _ in range(n):
        json.loads(pipe.recv_bytes())


def main(what: str, contender: str, n: int) -> None:
    """Run one contender."""
    if contender == "handleipc":
        run(send_all(what, n))
    elif contender == "send_fds":
        in_two_processes(stdlib_receive, stdlib_send, socket.socketpair(), n)
    elif contender == "send_handle":
        in_two_processes(reduction_receive, reduction_send, multiprocessing.Pipe(), n)
    elif contender == "Connection.send":
        in_two_processes(pipe_receive, pipe_send, multiprocessing.Pipe(), n)
    elif contender == "send_bytes":
        in_two_processes(bytes_receive, bytes_send, multiprocessing.Pipe(), n)
    else:
        raise SystemExit(f"no contender {contender!r}")


if __name__ == "__main__":
    if sys.argv[1] == "child":
        run(child_main())
    else:
        main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
