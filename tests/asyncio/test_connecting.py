"""``Channel.over``, ``connect`` and ``listen_channels``: channels without a start."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import handleipc
from handleipc.asyncio import connecting
from handleipc.asyncio.logs import throttle
from tests.asyncio.helpers import connection, turns, until, works


@contextlib.asynccontextmanager
async def met(path: Any, **options: Any) -> Any:
    """Both ends of a channel that met at a path."""
    async with handleipc.listen_channels(path) as listener:
        connecting_one = asyncio.create_task(handleipc.connect(path, **options))
        here = await anext(listener)
        there = await connecting_one
    try:
        yield here, there
    finally:
        for one in (here, there):
            one.disconnect()
        for one in (here, there):
            await one.wait_disconnected()


async def get(channel: handleipc.Channel) -> Any:
    async with asyncio.timeout(10):
        return await channel.recv()


@pytest.mark.parametrize("kind", ["path", "bytes", "abstract"])
async def test_meeting(kind: str, tmp_path: Path) -> None:
    """Messages and handles go both ways, in the native dialect, once both have spoken."""
    text = f"{tmp_path}/s"
    path: Any = {"path": Path(text), "bytes": text.encode(), "abstract": f"\0{tmp_path}"}[kind]
    async with met(path) as (here, there):
        for a, b in ((here, there), (there, here)):
            client, handle = connection()
            with client:
                sending = asyncio.create_task(a.send({"n": 1}, handle))
                message, received = await get(b)
                await sending
                assert message == {"n": 1}
                assert works(client, received)
                received.close()
        assert here.dialect == there.dialect == "native"
        assert here.peer == there.peer == (os.getpid(), os.geteuid(), os.getegid())
    assert not Path(text).exists()


async def test_everything_is_sent_before_anybody_reads(tmp_path: Path) -> None:
    """Neither end knows the other's grants at first, and nothing is lost by that."""
    async with met(tmp_path / "s") as (here, there):
        for n in range(1000):
            here.send_nowait(n)
            there.send_nowait(-n)
        for n in range(1000):
            assert await get(there) == (n, None)
            assert await get(here) == (-n, None)


async def test_a_pair_of_our_own() -> None:
    """``over`` takes the socket of any pair."""
    a, b = socket.socketpair()
    here = handleipc.Channel.over(a, role="parent")
    there = handleipc.Channel.over(b, role="child", accept_handles=False)
    assert a.fileno() == b.fileno() == -1
    here.send_nowait("down")
    assert await get(there) == ("down", None)
    client, handle = connection()
    with client:
        with pytest.raises(handleipc.HandleNotDelivered, match="policy|does not pass it on"):
            await here.send("refused", handle)
        handle.close()
    here.abort()
    await there.wait_disconnected()


@pytest.mark.parametrize("what", ["udp", "tcp", "datagrams", "lonely", "closed", "number", "role"])
async def test_what_is_no_channel(what: str) -> None:
    """It is said what is wrong, and the socket is the caller's still."""
    with contextlib.ExitStack() as stack:
        a, b = (stack.enter_context(one) for one in socket.socketpair())
        thing: Any = {
            "udp": lambda: socket.socket(type=socket.SOCK_DGRAM),
            "tcp": socket.socket,
            "datagrams": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
            "lonely": lambda: socket.socket(socket.AF_UNIX),
            "closed": lambda: socket.socket(socket.AF_UNIX),
            "number": lambda: 7,
            "role": lambda: a,
        }[what]()
        if what == "closed":
            thing.close()
        elif isinstance(thing, socket.socket):
            stack.enter_context(thing)
        role: Any = "boss" if what == "role" else "parent"
        with pytest.raises((TypeError, ValueError)) as caught:
            handleipc.Channel.over(thing, role=role)
        assert len(str(caught.value)) > 20
        if what not in ("closed", "number"):
            assert thing.fileno() >= 0
        with pytest.raises(TypeError, match="Limits"):
            handleipc.Channel.over(a, role="child", limits=7)  # type: ignore[arg-type]


PEER = """
import asyncio, os, sys, handleipc

async def main():
    handleipc.Channel  # loads what another user may not be allowed to read
    os.setuid(int(sys.argv[3]))
    name = sys.argv[1].replace("@", chr(0))
    channel = await handleipc.connect(name, users=eval(sys.argv[2]))
    while True:
        message, handle = await channel.recv()
        await channel.send(message, handle)

asyncio.run(main())
"""


@pytest.mark.parametrize("end", ["killed", "left"])
async def test_a_process_that_nobody_here_started(end: str, tmp_path: Path) -> None:
    """It gets handles, gives them back, and its death ends the channel."""
    path = str(tmp_path / "s")
    async with handleipc.listen_channels(path) as listener:
        process = subprocess.Popen([sys.executable, "-c", PEER, path, "()", str(os.getuid())])
        try:
            async with asyncio.timeout(30):
                channel = await anext(listener)
                assert channel.peer.pid == process.pid
                client, handle = connection()
                with client:
                    await channel.send("there and back", handle)
                    message, received = await channel.recv()
                    assert message == "there and back"
                    assert works(client, received)
                    received.close()
                if end == "killed":
                    process.kill()
                else:
                    channel.disconnect()
                await channel.wait_disconnected()
        finally:
            process.kill()
            process.wait()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("who", ["connects", "listens"])
async def test_another_user(
    who: str, trusted: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is turned away by either end, unless it is named."""
    name = f"\0{tmp_path}"
    nobody = 65534
    users = (nobody,) if trusted else ()
    caplog.set_level(logging.WARNING, "handleipc")
    throttle._kinds.clear()
    async with asyncio.timeout(30):
        if who == "connects":
            async with handleipc.listen_channels(name, users=users) as listener:
                words = [name.replace("\0", "@"), "(0,)", str(nobody)]
                process = subprocess.Popen(
                    [sys.executable, "-c", PEER, *words], stderr=subprocess.DEVNULL
                )
                waiting = asyncio.create_task(anext(listener))
                if trusted:
                    channel = await waiting
                    assert channel.peer[:2] == (process.pid, nobody)
                    channel.abort()
                else:
                    await until(lambda: caplog.records)
                    assert f"user {nobody}" in caplog.text
                    assert "users=" in caplog.text
                    waiting.cancel()
            await asyncio.to_thread(process.wait)
            return
        with socket.socket(socket.AF_UNIX) as theirs:
            theirs.bind(name)
            os.seteuid(nobody)
            try:
                theirs.listen()
            finally:
                os.seteuid(0)
            if trusted:
                (await handleipc.connect(name, users=users)).abort()
            else:
                with pytest.raises(PermissionError, match="users="):
                    await handleipc.connect(name)


async def test_users_may_be_anybody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the system does not say who is there, only ``users=None`` lets anybody in."""
    monkeypatch.setattr(connecting, "peer_of", lambda _: connecting.Peer(0, None, None))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/s")
        listener.listen()
        with pytest.raises(PermissionError):
            await handleipc.connect(f"{tmp_path}/s")
        (await handleipc.connect(f"{tmp_path}/s", users=None)).abort()


async def test_nobody_listens(tmp_path: Path) -> None:
    """The kernel's words, at once."""
    with pytest.raises(FileNotFoundError):
        await handleipc.connect(tmp_path / "s")
    with pytest.raises(ConnectionRefusedError):
        await handleipc.connect(f"\0{tmp_path}")
    with pytest.raises(TypeError, match="await"):
        aiter(handleipc.listen_channels(tmp_path / "s"))


async def test_a_full_backlog(tmp_path: Path) -> None:
    """It is waited for room there, which a Unix socket does not tell of; and not for ever."""
    path = tmp_path / "s"
    async with handleipc.listen_channels(path, backlog=0) as listener:
        first = await handleipc.connect(path)
        with pytest.raises(TimeoutError):
            await handleipc.connect(path, timeout=0.05)
        second = asyncio.create_task(handleipc.connect(path))
        await turns()
        assert not second.done()
        ends = [first, await anext(listener), await anext(listener), await second]
        for one in ends:
            one.abort()


async def test_iteration_ends_with_the_listener(tmp_path: Path) -> None:
    """``close`` ends it."""
    async with handleipc.listen_channels(tmp_path / "s") as listener:
        assert listener.sockname == str(tmp_path / "s")
        assert str(tmp_path) in repr(listener)
        waiting = asyncio.create_task(anext(listener, None))
        await turns()
        listener.close()
        assert await waiting is None
