"""A user's program, as a type checker sees it: never run, checked by ``mypy --strict``.

A line that says what it ignores is wrong on purpose: without the error the comment is one.
"""

from __future__ import annotations

import asyncio
from typing import Any

import handleipc
from handleipc import Channel, Child, Connection, Level, Server


async def serve() -> None:
    """Start a child, hand connections to it, and listen to what happens."""
    child: Child = await handleipc.fork("worker.py", "--verbose", accept_handles=False)
    async with handleipc.fork("worker:main") as other:
        other.terminate()

    def on_message(message: Any, handle: Any) -> None:
        print(message, handle)

    same = child.on("message", on_message)
    same({"n": 1}, None)

    @child.on("exit")
    def on_exit(code: int | None, signal: int | None) -> None:
        print(code, signal)

    @child.once("undelivered")
    async def on_undelivered(message: Any, handle: Any, reason: str) -> None:
        print(reason.upper())

    child.on("disconnect", lambda: None)
    child.on("error", lambda error: print(error.args))
    child.on("exit", lambda code: print(code))  # type: ignore[call-overload]
    child.on("no such event", print)  # type: ignore[call-overload]

    async with handleipc.listen("127.0.0.1", 0) as server:
        takes_server(server)
        server.on("drop", lambda address: None)
        async for connection in server:
            takes_connection(connection)
            is_below: bool = child.send_nowait({"n": 1}, connection)
            if not is_below:
                await child.drain()
    taken: int = child.send_many([({"n": 1}, None)])
    print(taken)
    stats = child.stats()
    level: Level = stats.queued_bytes
    print(level.used / level.limit, stats.pid, child.connections)
    await child.send("x", None, timeout=1.0, keep_open=True)
    await child.send("x", timeout="soon")  # type: ignore[arg-type]
    code: int | None = await child.wait()
    print(code)


def takes_server(server: Server) -> None:
    """Take what ``listen`` makes."""


def takes_connection(connection: Connection) -> None:
    """Take what a server accepts."""


async def work() -> None:
    """Be a child."""
    parent: Channel = await handleipc.parent()
    parent.on("exit", lambda code, signal: None)  # type: ignore[call-overload]
    async for message, handle in parent:
        if isinstance(handle, Connection):
            reader, writer = await handle.open()
            writer.write(await reader.readline())
            await handle.end(b"done")
        print(message)
    async for batch in parent.batches():
        for message, _ in batch:
            print(message)


if __name__ == "__main__":
    asyncio.run(serve())
