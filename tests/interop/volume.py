"""The Python end of test_volume.py: connections are given with their client's port, and served by it.

As a program: ``volume.py give|take|giveLarge|takeLarge COUNT|SIZE``.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable

import handleipc

WAVE = 250


async def client(address: tuple[str, int]) -> None:
    """Connect, and expect to be greeted with our own port."""
    reader, writer = await asyncio.open_connection(*address)
    port = writer.get_extra_info("sockname")[1]
    assert await reader.read() == f"served {port}".encode()
    writer.close()
    await writer.wait_closed()


def port_of(connection: handleipc.Connection) -> int:
    """Return the port of the client."""
    port = connection.peername[1]
    assert isinstance(port, int)
    return port


async def give(channel: handleipc.Channel, count: int) -> None:
    """Give every connection, in waves, with all handles of a wave queued at once."""
    async with handleipc.listen("127.0.0.1", 0) as server:
        for _ in range(0, count, WAVE):
            async with asyncio.TaskGroup() as group:
                for _ in range(WAVE):
                    group.create_task(client(server.sockname))
                for _ in range(WAVE):
                    connection = await anext(server)
                    message = {"port": port_of(connection)}
                    group.create_task(channel.send(message, connection))
    await channel.send("done")
    assert await channel.recv() == (count, None)


async def take(channel: handleipc.Channel, count: int) -> None:
    """Serve every connection that comes with the right message."""
    taken = 0
    async with asyncio.TaskGroup() as group:
        while (received := await channel.recv())[0] != "done":
            message, connection = received
            taken += 1
            assert port_of(connection) == message["port"]
            group.create_task(connection.end(f"served {message['port']}".encode()))
    await channel.send(taken)


async def give_large(channel: handleipc.Channel, size: int) -> None:
    """Give a connection with a large message, and serve what comes back."""
    pad = "x" * size
    async with handleipc.listen("127.0.0.1", 0) as server, asyncio.TaskGroup() as group:
        group.create_task(client(server.sockname))
        connection = await anext(server)
        await channel.send({"port": port_of(connection), "pad": pad}, connection)
        message, returned = await channel.recv()
        assert message["pad"] == pad
        assert port_of(returned) == message["port"]
        await returned.end(f"served {message['port']}".encode())
    await channel.send("done")


async def take_large(channel: handleipc.Channel, size: int) -> None:
    """Send the large message and its connection back."""
    message, connection = await channel.recv()
    assert len(message["pad"]) == size
    await channel.send(message, connection)
    assert await channel.recv() == ("done", None)


ROLES: dict[str, Callable[[handleipc.Channel, int], Awaitable[None]]] = {
    "give": give,
    "take": take,
    "giveLarge": give_large,
    "takeLarge": take_large,
}

if __name__ == "__main__":
    from child import run  # type: ignore[import-not-found]  # a program finds it beside it

    async def main(parent: handleipc.Channel) -> None:
        """Play one role, then wait for the parent to disconnect."""
        await ROLES[sys.argv[1]](parent, int(sys.argv[2]))
        async for message, handle in parent:
            raise AssertionError(f"unexpected: {message!r}, {handle!r}")

    run(main)
