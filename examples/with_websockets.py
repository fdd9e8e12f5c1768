"""websockets in two processes, unmodified; connections are dealt to them in turn.

Run it, then `python -m websockets ws://127.0.0.1:8000`. Needs `pip install websockets`.
"""

import asyncio
import os

from deal import deal
from websockets.asyncio.server import ServerConnection, serve

import handleipc


async def echo(websocket: ServerConnection) -> None:
    async for message in websocket:
        await websocket.send(f"process {os.getpid()}: {message}")


async def work(parent: handleipc.Channel) -> None:
    door = handleipc.accepting(parent)
    async with door.patched(), serve(echo, sock=door.socket):
        await door.ended()


if __name__ == "__main__":
    asyncio.run(deal("with_websockets:work"))
