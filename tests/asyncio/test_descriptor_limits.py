"""20,000 handles where descriptors are scarce, on either side, for a user the kernel limits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

COUNT = 20_000

PARENT = """
    import asyncio, errno, os, resource, socket, sys
    import handleipc

    COUNT, mine, theirs, early = (int(word) for word in sys.argv[1:5])
    if mine:
        resource.setrlimit(resource.RLIMIT_NOFILE, (mine, mine))

    async def main():
        child = await handleipc.fork("child.py", str(theirs), str(early))
        assert (await child.recv())[0] == "ready"
        near, far = socket.socketpair()
        undelivered = []
        child.on("undelivered", lambda *what: undelivered.append(what))
        for n in range(COUNT):
            while True:
                try:
                    handle = handleipc.FileDescriptor(os.dup(near.fileno()))
                    break
                except OSError as error:
                    assert error.errno == errno.EMFILE, error
                    await child.flush()  # each acknowledgement gives one back
            if not child.send_nowait(n, handle):
                await child.drain()
        await child.flush()
        assert (await child.recv())[0] == COUNT
        assert undelivered == []
        child.disconnect()
        assert await child.wait() == 0
        far.close()
        near.close()
        print("done")

    asyncio.run(main())
"""

CHILD = """
    import asyncio, os, resource, sys
    import handleipc

    limit, early = int(sys.argv[1]), int(sys.argv[2])

    def set_limit():
        if limit:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    async def main():
        if early:
            set_limit()
        parent = await handleipc.parent()
        set_limit()
        await parent.send("ready")
        expected = 0
        async for n, handle in parent:
            assert n == expected, (n, expected)
            os.fstat(handle.fileno())
            handle.close()
            expected += 1
            if expected == {COUNT}:
                await parent.send(expected)

    asyncio.run(main())
""".replace("{COUNT}", str(COUNT))


def unprivileged(command: list[str]) -> list[str]:
    """Return how to run a command for which the kernel counts descriptors in flight."""
    if os.getuid() != 0:
        return command
    setpriv = shutil.which("setpriv")
    less = [str(setpriv), "--bounding-set=-sys_resource,-sys_admin"]
    if setpriv is None or subprocess.run([*less, "true"], check=False).returncode:
        pytest.skip("the kernel does not limit root, and there is no setpriv to become less")
    return [*less, *command]


@pytest.mark.parametrize("early", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize("side", ["parent", "child", "both"])
@pytest.mark.parametrize("limit", [64, 256, 1024])
def test_scarce_descriptors(
    program: Callable[[str, str], Path], limit: int, side: str, early: bool
) -> None:
    """Nothing is lost and order is kept; it only takes longer.

    A limit known when the channel begins makes its window small. Lowered later, it makes the kernel
    drop descriptors of every set.
    """
    program("child.py", CHILD)
    mine = limit if side in ("parent", "both") else 0
    theirs = limit if side in ("child", "both") else 0
    path = program("parent.py", PARENT)
    words = [str(word) for word in (COUNT, mine, theirs, int(early))]
    done = subprocess.run(
        unprivileged([sys.executable, path.name, *words]),
        cwd=path.parent,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
