"""handleipc: ``python ours.py ROLE ARGUMENT...``. ``BENCHMARK_LOOP=uvloop`` runs it on uvloop.

Roles of a parent take the program of the child, ``python`` or the path of a Node.js.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import handleipc
from benchmarks.contenders.common import (
    ANSWER,
    Answer,
    connection,
    cpu_seconds,
    large,
    message,
    report,
    run,
)
from handleipc.wire.syscalls import descriptor_kind

# Connections that are open at once.
CHUNK = 2000
NODE = str(Path(__file__).with_name("node.js"))


async def start(program: str, reader: str = "batches") -> handleipc.Child:
    """Start the child that takes everything, and wait until it runs."""
    if program == "python":
        child = await handleipc.fork(__file__, "child", reader)
    else:
        child = await handleipc.spawn(program, NODE, "child")
    await child.send("warm")
    assert (await child.recv())[0] == "warm"
    return child


async def end(child: handleipc.Child) -> None:
    """Let the child go."""
    child.disconnect()
    await child.wait()


def live() -> handleipc.Connection:
    """Return a connection to hand over."""
    sock = connection()
    made = handleipc.Connection(sock.fileno(), descriptor_kind(sock.fileno()))
    sock.detach()
    return made


# -- parents ---------------------------------------------------------------------------------------


async def handles(program: str, n: int, *, moved: bool = False) -> None:
    """Hand one connection over n times, keeping it; or n connections of their own."""
    child = await start(program)
    kept = live()
    kind = descriptor_kind(kept.fileno())
    own = [handleipc.Connection(os.dup(kept.fileno()), kind) for _ in range(n if moved else 0)]
    used = cpu_seconds()
    begin = time.perf_counter()
    for i in range(n):
        handle = own[i] if moved else kept
        if not child.send_nowait(message(i, n), handle, keep_open=not moved):
            await child.drain()
    assert (await child.recv())[0] == "done"
    seconds = time.perf_counter() - begin
    used = cpu_seconds() - used
    await end(child)
    report(n, seconds, cpu=used, child_cpu=cpu_seconds(resource.RUSAGE_CHILDREN))
    kept.close()


async def accepted(reader: str, n: int) -> None:
    """Hand over n connections that a server accepted, for good; the child takes them as it does.

    They are made in chunks, while the clock stands still.
    """
    child = await start("python", reader)
    seconds = 0.0
    async with handleipc.listen("127.0.0.1", 0, backlog=CHUNK) as server:
        for done in range(0, n, CHUNK):
            count = min(CHUNK, n - done)
            clients = [connection_to(server.sockname) for _ in range(count)]
            ours = [await anext(server) for _ in range(count)]
            begin = time.perf_counter()
            for i, one in enumerate(ours):
                if not child.send_nowait(message(i, count), one):
                    await child.drain()
            assert (await child.recv())[0] == "done"
            seconds += time.perf_counter() - begin
            for client in clients:
                client.close()
    await end(child)
    report(n, seconds)


async def queued(program: str, n: int) -> None:
    """Queue n handles at once, never waiting."""
    limits = handleipc.Limits(queued_handles=max(n, 1))
    if program == "python":
        child = await handleipc.fork(__file__, "child", "batches", limits=limits)
    else:
        child = await handleipc.spawn(program, NODE, "child", limits=limits)
    await child.send("warm")
    await child.recv()
    kept = live()
    begin = time.perf_counter()
    for i in range(n):
        child.send_nowait(message(i, n), kept, keep_open=True)
    assert (await child.recv())[0] == "done"
    report(n, time.perf_counter() - begin)
    await end(child)
    kept.close()


async def queue_memory(n: int) -> None:
    """Queue n handles for a child that is stopped; report the bytes of each."""
    child = await start("python")
    kept = live()
    child.kill(signal.SIGSTOP)
    before = resident()
    for i in range(n):
        child.send_nowait(message(i, n), kept, keep_open=True)
    grown = resident() - before
    child.kill(signal.SIGKILL)
    child.on("undelivered", lambda *_: None)
    child.abort()
    await child.wait()
    report(n, 1.0, value=grown / n)
    kept.close()


def resident() -> int:
    """Return the memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def messages(program: str, n: int) -> None:
    """Send n plain messages."""
    child = await start(program)
    begin = time.perf_counter()
    for i in range(n):
        if not child.send_nowait(message(i, n)):
            await child.drain()
    assert (await child.recv())[0] == "done"
    report(n, time.perf_counter() - begin)
    await end(child)


async def latency(program: str, n: int) -> None:
    """Send n handles, each when the one before is acknowledged."""
    child = await start(program)
    kept = live()
    laps = []
    for i in range(n):
        lap = time.perf_counter()
        await child.send(message(i, n), kept, keep_open=True)
        laps.append(time.perf_counter() - lap)
    assert (await child.recv())[0] == "done"
    report(n, sum(laps), laps=laps)
    await end(child)
    kept.close()


async def send_large(program: str, what: str, size: int, n: int) -> None:
    """Send a large message n times, each when the one before was read."""
    child = await start(program)
    sent = large(what, size)
    begin = time.perf_counter()
    for _ in range(n):
        child.send_nowait(sent)
        await child.recv()
    report(n, time.perf_counter() - begin)
    await end(child)


async def tracked(open_ones: int, n: int) -> None:
    """Hand n connections of a server over and have them closed, while so many others are open."""
    server = await handleipc.listen("127.0.0.1", 0, backlog=1024)
    child = await handleipc.fork(__file__, "closer")
    clients = []

    async def hand_over(count: int, word: str) -> None:
        for _ in range(count):
            client = connection_to(server.sockname)
            clients.append(client)
            child.send_nowait(word, await anext(server))
        await child.flush()

    await hand_over(open_ones, "keep")
    for client in clients:
        client.close()
    clients.clear()
    ready = [connection_to(server.sockname) for _ in range(n)]
    accepted = [await anext(server) for _ in range(n)]
    begin = time.perf_counter()
    for one in accepted:
        await child.send("close", one)
    seconds = time.perf_counter() - begin
    for client in ready:
        client.close()
    report(n, seconds)
    server.close()
    child.kill()
    await child.wait()


def connection_to(address: Any) -> Any:
    """Connect, without a word to the event loop: the kernel accepts into the backlog."""
    return socket.create_connection(address)


async def hand_out(children: int, how: str) -> None:
    """Serve: accept, hand to the children in turn, and let them answer. Until SIGTERM."""
    workers = [await handleipc.fork(__file__, "answerer", how) for _ in range(children)]
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with handleipc.listen("127.0.0.1", 0, backlog=1024) as server:
        print(server.sockname[1], flush=True)

        async def serve() -> None:
            turn = 0
            async for accepted in server:
                workers[turn].send_nowait("socket", accepted)
                turn = (turn + 1) % children

        task = asyncio.create_task(serve())
        await stop.wait()
        task.cancel()
    for worker in workers:
        await end(worker)


# -- children --------------------------------------------------------------------------------------


async def child(reader: str) -> None:
    """Take everything, close what comes, and say when all is there."""
    parent = await handleipc.parent()
    count = 0

    def take(received: Any, handle: Any) -> None:
        nonlocal count
        if handle is not None:
            handle.close()
        if type(received) is dict:
            count += 1
            if count == received["of"]:
                parent.send_nowait("done")
                count = 0
        else:
            parent.send_nowait("warm")

    match reader:
        case "batches":
            async for batch in parent.batches():
                for received, handle in batch:
                    take(received, handle)
        case "iteration":
            async for received, handle in parent:
                take(received, handle)
        case _:
            parent.on("message", take)
            await parent.wait_disconnected()


async def closer() -> None:
    """Keep some connections open, close others."""
    kept = []
    async for word, handle in await handleipc.parent():
        if word == "keep":
            kept.append(handle)
        else:
            handle.close()


async def answerer(how: str) -> None:
    """Answer each connection and close it."""

    async def talk(taken: handleipc.Connection) -> None:
        _, writer = await taken.open()
        writer.write(ANSWER)
        writer.close()
        await writer.wait_closed()

    talks: set[asyncio.Task[None]] = set()
    async for _, taken in await handleipc.parent():
        match how:
            case "end":
                await taken.end(ANSWER)
            case "start":
                await taken.start(Answer)
            case _:
                talks.add(task := asyncio.create_task(talk(taken)))
                task.add_done_callback(talks.discard)


async def fork_once(n: int) -> None:
    """Start n children, one after the other; each is up when it has answered."""
    laps = []
    for _ in range(n):
        lap = time.perf_counter()
        started = await start("python")
        laps.append(time.perf_counter() - lap)
        await end(started)
    report(n, sum(laps), laps=laps)


async def idle(n: int) -> None:
    """Make n channels that say nothing; report the bytes of each end."""
    made = []
    for count in (16, n):
        before = resident()
        for _ in range(count):
            one, two = socket.socketpair()
            made += [
                handleipc.Channel.over(one, role="parent"),
                handleipc.Channel.over(two, role="child"),
            ]
        await asyncio.sleep(0)
        grown = resident() - before
    report(n, 1.0, value=grown / n / 2)
    for channel in made:
        channel.abort()


# -- the command line ------------------------------------------------------------------------------


def main(role: str, *args: str) -> None:
    """Run one role."""
    match role:
        case "handles":
            run(handles(args[0], int(args[1])))
        case "moved":
            run(handles(args[0], int(args[1]), moved=True))
        case "queued":
            run(queued(args[0], int(args[1])))
        case "queue_memory":
            run(queue_memory(int(args[0])))
        case "messages":
            run(messages(args[0], int(args[1])))
        case "latency":
            run(latency(args[0], int(args[1])))
        case "large":
            run(send_large(args[0], args[1], int(args[2]), int(args[3])))
        case "tracked":
            run(tracked(int(args[0]), int(args[1])))
        case "hand_out":
            run(hand_out(int(args[0]), args[1]))
        case "accepted":
            run(accepted(args[0], int(args[1])))
        case "start":
            run(fork_once(int(args[0])))
        case "idle":
            run(idle(int(args[0])))
        case "child":
            run(child(*args))
        case "closer":
            run(closer())
        case "answerer":
            run(answerer(*args))
        case _:
            raise SystemExit(f"no role {role!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
