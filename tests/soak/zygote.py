"""Children for a soak, forked from one warm interpreter: a fresh one takes longer than they live.

Started as ``python -m tests.soak.zygote CONTROL SHARED AT_ONCE``, the first two descriptors. For
each environment that comes on CONTROL, with the socket of a channel, a child is forked that serves
what comes through it; its process id goes back. It takes the next connection when fewer than
AT_ONCE are being served; 0 is no bound.

SHARED is memory of 32-bit numbers: a child whose application took connection n writes its process
id there at place n, so that it is known after it was killed.
"""

from __future__ import annotations

import array
import asyncio
import json
import mmap
import os
import signal
import socket
import sys

import handleipc
from handleipc import parent  # loads the whole of it once, and not in each child

GREETING, ANSWER = b"hello\n", b"ok\n"


class Taken:
    """Which process took each connection."""

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, 0)
        self._pids = memoryview(self._memory).cast("I")

    def by(self, number: int) -> int:
        """Return the process that took it; 0 if none has."""
        return self._pids[number]

    def take(self, number: int) -> None:
        """Say that this process has it."""
        self._pids[number] = os.getpid()

    def __len__(self) -> int:
        return len(self._pids)

    def close(self) -> None:
        self._pids.release()
        self._memory.close()


async def serve(connection: handleipc.Connection) -> None:
    """Answer one line."""
    try:
        reader, writer = await connection.open()
        if await reader.readline():
            writer.write(ANSWER)
            await writer.drain()
        writer.close()
        await writer.wait_closed()
    except OSError:
        pass  # the client has gone


async def work(taken: Taken, at_once: int) -> None:
    """Serve what the parent hands over, until it ends."""
    serving: set[asyncio.Task[None]] = set()
    async for number, connection in await parent():
        taken.take(number)
        task = asyncio.ensure_future(serve(connection))
        serving.add(task)
        task.add_done_callback(serving.discard)
        while at_once and len(serving) >= at_once:
            await asyncio.wait(serving, return_when=asyncio.FIRST_COMPLETED)


def main(control: socket.socket, taken: Taken, at_once: int) -> None:
    """Fork a child for each request."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the one who kills them knows of it
    while True:
        data, fds, _, _ = socket.recv_fds(control, 1 << 20, 1)
        if not data:
            return
        pid = os.fork()
        if not pid:
            control.close()
            os.set_inheritable(fds[0], True)
            os.environ.clear()
            os.environ.update(json.loads(data), NODE_CHANNEL_FD=str(fds[0]))
            code = 1
            try:
                asyncio.run(work(taken, at_once))
                code = 0
            finally:
                os._exit(code)
        os.close(fds[0])
        control.send(array.array("i", [pid]))


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        main(sock, Taken(int(sys.argv[2])), int(sys.argv[3]))
