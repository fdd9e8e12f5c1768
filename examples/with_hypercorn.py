"""hypercorn in two processes, unmodified; connections are dealt to them in turn.

Run it, then `curl 127.0.0.1:8000`. Needs `pip install hypercorn`.
"""

import asyncio
import os
from typing import Any

import hypercorn.asyncio
from deal import deal

import handleipc


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Say which process answers. Any ASGI application will do."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"process %d\n" % os.getpid()})


async def work(parent: handleipc.Channel) -> None:
    door = handleipc.accepting(parent)
    config = hypercorn.Config()
    config.loglevel = "WARNING"  # it would name the door's port, where nobody listens
    config.bind = [f"fd://{os.dup(door.socket.fileno())}"]  # hypercorn closes it
    async with door.patched():
        await hypercorn.asyncio.serve(app, config, shutdown_trigger=door.ended)


if __name__ == "__main__":
    asyncio.run(deal("with_hypercorn:work"))
