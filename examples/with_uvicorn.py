"""uvicorn in two processes, unmodified; connections are dealt to them in turn.

Run it, then `curl 127.0.0.1:8000`. Needs `pip install uvicorn`.
"""

import asyncio
import os
from typing import Any

import uvicorn
from deal import deal

import handleipc


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Say which process answers. Any ASGI application will do: Starlette, FastAPI, Django."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"process %d\n" % os.getpid()})


async def work(parent: handleipc.Channel) -> None:
    door = handleipc.accepting(parent)
    server = uvicorn.Server(uvicorn.Config(app, lifespan="auto", log_level="warning"))

    async def stop() -> None:
        await door.ended()
        server.should_exit = True

    async with door.patched(), asyncio.TaskGroup() as tasks:
        stopping = tasks.create_task(stop())
        await server.serve(sockets=[door.socket])
        stopping.cancel()


if __name__ == "__main__":
    asyncio.run(deal("with_uvicorn:work"))
