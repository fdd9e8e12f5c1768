"""Look at the first bytes of each connection, unread, and pick the child by them.

Run it, then `curl 127.0.0.1:8000/a` and `curl 127.0.0.1:8000/b`: each path has its own process.
"""

import asyncio
import contextlib
import os

import handleipc


async def serve(parent: handleipc.Channel) -> None:
    async with asyncio.TaskGroup() as tasks:
        async for path, connection in parent:
            tasks.create_task(answer(path, connection))


async def answer(path: str, connection: handleipc.Connection) -> None:
    # A client that resets, closes early, or says too little or too much costs nobody else anything.
    with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        reader, writer = await connection.open()
        try:
            async with asyncio.timeout(10):
                await reader.readuntil(b"\r\n\r\n")
                body = f"{path} is served by process {os.getpid()}\n".encode()
                writer.write(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
                await writer.drain()
        finally:
            writer.close()


async def hand_over(connection: handleipc.Connection, children: list[handleipc.Child]) -> None:
    with connection:  # closed here, unless a child has it
        try:
            words = (await connection.peek_until(b"\r\n", limit=1024, timeout=1)).split()
            if len(words) > 1:
                path = words[1].decode(errors="replace")
                await children[sum(path.encode()) % len(children)].send(path, connection)
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # the client has reset it, left early, is silent (TimeoutError), or says too much
        except (handleipc.HandleNotDelivered, handleipc.ChannelClosed) as error:
            print(f"not handed over: {error}")  # noqa: T201


async def main() -> None:
    children = [await handleipc.fork("route_by_content:serve") for _ in range(2)]
    async with handleipc.listen("127.0.0.1", 8000) as server, asyncio.TaskGroup() as tasks:
        async for connection in server:
            tasks.create_task(hand_over(connection, children))


if __name__ == "__main__":
    asyncio.run(main())
