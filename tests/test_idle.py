"""What a channel costs that has nothing to do."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import asyncio, gc, re, socket
from handleipc import Limits
from handleipc.asyncio.channel import Channel

SWITCH = b'{"cmd":"NODE_HANDLEIPC","native":2,"descriptors":128,"bytes":1048576}\\n'

def own():
    gc.collect()
    return int(re.search(r"Private_Dirty: +([0-9]+) kB", open("/proc/self/smaps_rollup").read())[1])

async def channels(count):
    pairs = [socket.socketpair() for _ in range(count)]
    limits = Limits()
    made = [Channel(ours, limits, inviting=True) for ours, _ in pairs]
    for _, theirs in pairs:
        theirs.send(SWITCH)
    while not all(one.dialect == "native" for one in made):
        await asyncio.sleep(0)
    return made, pairs

async def main():
    first, _ = await channels(20)
    before = own()
    made, pairs = await channels(200)
    print((own() - before) / len(made))
    for one in first + made:
        one.abort()

asyncio.run(main())
"""


def test_an_idle_channel_is_small() -> None:
    """Of its buffers it touches what it has used: 26 KB with its Python objects when measured."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 40
