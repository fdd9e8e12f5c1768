"""A server of asyncio's own streams in two processes; connections are dealt to them in turn.

Run it, then `curl --http0.9 127.0.0.1:8000`.
"""

import asyncio
import os

from deal import deal

import handleipc


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        async with asyncio.timeout(10):
            line = await reader.readline()
            writer.write(b"process %d: %b" % (os.getpid(), line))
            await writer.drain()
    except (OSError, ValueError):
        pass  # the client is gone, is silent (TimeoutError), or says too much in a line
    finally:
        writer.close()


async def work(parent: handleipc.Channel) -> None:
    door = handleipc.accepting(parent)
    async with door.patched():
        server = await asyncio.start_server(answer, sock=door.socket)
        await server.serve_forever()
        await server.wait_closed()


if __name__ == "__main__":
    asyncio.run(deal("with_streams:work"))
