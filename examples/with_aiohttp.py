"""aiohttp in two processes, unmodified; connections are dealt to them in turn.

Run it, then `curl 127.0.0.1:8000`. Needs `pip install aiohttp`.
"""

import asyncio
import os

from aiohttp import web
from deal import deal

import handleipc


async def answer(request: web.Request) -> web.Response:
    return web.Response(text=f"process {os.getpid()}\n")


async def work(parent: handleipc.Channel) -> None:
    door = handleipc.accepting(parent)
    app = web.Application()
    app.router.add_get("/", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    async with door.patched():
        await web.SockSite(runner, door.socket).start()
        await door.ended()
        await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(deal("with_aiohttp:work"))
