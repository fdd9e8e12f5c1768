"""Replace a running server by one that somebody else starts: no client is refused or reset.

Run it, ask with `curl --http0.9 127.0.0.1:8000`, and run it again beside itself: the second asks
the first for its listener, and the first ends when it has answered those it has.
"""

import asyncio
import os

import handleipc

# An abstract name; connect() and listen_channels() ask the kernel who is at the other end.
NAME = "\0handleipc-takeover-8000"


async def listener() -> handleipc.Server:
    """Take the listener over from who has it, or be the first."""
    try:
        old = await handleipc.connect(NAME)
    except ConnectionRefusedError:
        return await handleipc.listen("127.0.0.1", 8000)
    _, server = await old.recv()
    await old.wait_disconnected()
    return server


async def give_away(server: handleipc.Server) -> None:
    async with handleipc.listen_channels(NAME) as successors:
        new = await anext(successors)
        await new.send("yours", server)  # from here on both accept
    new.disconnect()
    server.stop()  # and now the new one alone


async def main() -> None:
    server = await listener()
    giving = asyncio.create_task(give_away(server))
    async for connection in server:
        await connection.end(b"process %d\n" % os.getpid())
    await giving
    await server.wait_closed()


if __name__ == "__main__":
    asyncio.run(main())
