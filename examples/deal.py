"""Deal connections to worker processes in turn. What the examples beside it share.

Ctrl-C or SIGTERM: no new clients, those who wait are dealt, and each worker ends when it has
answered those it has.
"""

import asyncio
import contextlib
import signal

import handleipc


async def deal(target: str, *, port: int = 8000, workers: int = 2) -> None:
    """Start workers, and give each connection to the next of them that takes it."""
    async with contextlib.AsyncExitStack() as stack:
        children = []
        for _ in range(workers):
            # In a process group of its own: the terminal's Ctrl-C is for this process to handle.
            child = handleipc.fork(target, exit_with_parent=True, process_group=0)
            children.append(await stack.enter_async_context(child))
        server = await stack.enter_async_context(handleipc.listen("127.0.0.1", port))
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, server.stop)
        async for connection in server:
            with connection:  # closed here, unless a worker has it
                for child in list(children):
                    children.append(children.pop(0))
                    try:
                        await child.send("connection", connection)
                        break
                    except (handleipc.HandleNotDelivered, handleipc.ChannelClosed) as error:
                        print(f"worker {child.pid}: {error}")  # noqa: T201
        # Leaving the block disconnects each worker, and waits for it.
