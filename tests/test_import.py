"""What ``import handleipc`` loads, and when the rest comes: not when descriptors are short."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.asyncio.helpers import ECHO

# The heavy ones, by what a measurement said; asyncio alone is more than all of ours.
HEAVY = {"asyncio", "msgspec", "orjson", "ssl", "subprocess"}


def run(program: str, *args: str) -> dict:
    """Run a program that prints one object."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *args],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_package_loads_little() -> None:
    """Its exceptions and limits are there; what costs comes with the first name that needs it."""
    loaded = run(
        """if True:
        import json, sys
        import handleipc
        handleipc.ChannelClosed, handleipc.Limits(), dir(handleipc)
        print(json.dumps({"loaded": sorted(sys.modules)}))"""
    )["loaded"]
    assert not HEAVY & set(loaded)
    assert "handleipc.environment" in loaded  # the variables are taken at once


def test_all_comes_with_the_first_name() -> None:
    """One name that is not there yet brings all modules, so no later one has to be found."""
    late = run(
        """if True:
        import json, sys
        import handleipc
        handleipc.Native
        before = set(sys.modules)
        for name in handleipc.__all__:
            getattr(handleipc, name)
        import handleipc.asyncio.streams
        print(json.dumps({"late": sorted(set(sys.modules) - before)}))"""
    )["late"]
    assert late == []


def test_a_name_that_does_not_exist() -> None:
    """It is an AttributeError, as of every module, and loads nothing."""
    said = run(
        """if True:
        import json, sys
        import handleipc
        try:
            handleipc.send
        except AttributeError as error:
            print(json.dumps({"said": str(error), "asyncio": "asyncio" in sys.modules}))"""
    )
    assert said == {"said": "module 'handleipc' has no attribute 'send'", "asyncio": False}


AT_WORK = """
import asyncio, json, os, resource, socket, sys
import handleipc

async def main():
    failed = []

    class NoImport:
        def find_spec(self, name, path=None, target=None):
            failed.append(name)

    child = await handleipc.fork(sys.argv[1])
    await child.ready()
    async with handleipc.listen("127.0.0.1", 0) as server:
        sys.meta_path.insert(0, NoImport())
        client = socket.create_connection(("127.0.0.1", server.sockets[0].getsockname()[1]))
        async for connection in server:
            await child.send({"first": 1}, connection)
            break
        message, back = await child.recv()
        reader, writer = await back.open()
        writer.write(b"x")
        await writer.drain()
        assert client.recv(1) == b"x"
        writer.close()
        await child.send("fd", handleipc.FileDescriptor(os.open(os.devnull, os.O_RDONLY)))
        (await child.recv())[1].close()
    try:
        child.send_nowait({1: object()})
    except handleipc.MessageNotSerializable:
        pass
    held = []
    try:
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        held.pop()
    await child.send("with one slot")
    await child.recv()
    child.send_nowait("unread")
    child.kill()
    await child.wait()
    try:
        await child.send(3)
    except handleipc.ChannelClosed:
        pass
    return failed

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
print(json.dumps({"failed": asyncio.run(main())}))
"""


def test_nothing_is_loaded_by_a_channel_at_work(tmp_path: Path) -> None:
    """An import would fail with a full table of descriptors: here every one fails."""
    child = tmp_path / "child.py"
    child.write_text(ECHO)
    assert run(AT_WORK, str(child))["failed"] == []


def test_a_missing_core_says_what_to_do() -> None:
    """A checkout that was not built, or a wheel of another system: one line, and the cause."""
    said = run(
        """if True:
        import json, sys
        sys.modules["handleipc._core"] = None
        import handleipc
        try:
            handleipc.fork
        except ImportError as error:
            print(json.dumps({"said": str(error), "cause": repr(error.__cause__)}))"""
    )
    assert "compiled core" in said["said"]
    assert "pip install" in said["said"]
    assert "_core" in said["cause"]
