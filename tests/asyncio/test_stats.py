"""What is shown of a running channel: its levels, its connections, its lines of log."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import signal
import socket
import sys
from typing import Any

import pytest

import handleipc
from handleipc import Connection, Level, Limits
from handleipc.asyncio.child import Child
from tests.asyncio.helpers import ECHO, both_dialects, joined, settle, until


def handle() -> tuple[Connection, socket.socket]:
    ours, client = socket.socketpair()
    return Connection.from_socket(ours), client


@both_dialects
async def test_a_quiet_channel(dialect: str) -> None:
    """Everything is empty, and the limits are those it was made with."""
    limits = Limits(queued_bytes=1000, queued_handles=7, held_messages=5)
    async with joined(dialect, limits, limits) as (a, b):
        await settle(a, b)
        stats = a.stats()
        assert (stats.state, stats.dialect, stats.opened) == ("open", dialect, True)
        assert stats.pid == os.getpid()
        assert (stats.connections, stats.above_water) == (0, False)
        assert stats.queued_bytes == Level(0, 1000)
        assert stats.queued_handles == Level(0, 7)
        assert stats.held_messages == Level(0, 5)
        assert stats.held_bytes == Level(
            0, limits.bytes if dialect == "native" else limits.held_bytes
        )
        assert stats.ready == Level(0, limits.ready)
        assert stats.window == Level(0, limits.window)
        assert json.loads(json.dumps(dataclasses.asdict(stats)))["ready"]["used"] == 0


@both_dialects
async def test_levels_rise_and_fall(dialect: str) -> None:
    """Of what is queued at one end, held at the other, acknowledged there and not."""
    async with joined(dialect, Limits(high_water_handles=4, low_water_handles=1)) as (a, b):
        await settle(a, b)
        b._protocol.incoming.deliveries.pace = 2
        clients = []
        for number in range(6):
            connection, client = handle()
            clients.append(client)
            a.send_nowait(number, connection)
        a.send_nowait("x" * 1000)
        sent = a.stats()
        assert sent.queued_bytes.used > 1000
        assert sent.queued_handles.used == 6
        assert sent.above_water
        await until(lambda: b.stats().ready.used + b.stats().window.used >= 1)
        if dialect == "native":
            await until(lambda: b.stats().held_messages.used == 7)
            got = b.stats()
            assert got.ready.used == 2
            assert got.window.used == 4
            assert got.held_bytes.used > 1000
        for number in range(6):
            message, received = await b.recv()
            assert message == number
            received.close()
        assert (await b.recv())[0] == "x" * 1000
        await a.flush()
        done = a.stats()
        assert (done.queued_bytes.used, done.queued_handles.used) == (0, 0)
        assert not done.above_water
        rest = b.stats()
        assert (rest.held_messages.used, rest.held_bytes.used, rest.ready.used) == (0, 0, 0)
        for client in clients:
            client.close()


async def test_connections_of_a_child() -> None:
    """Those of our servers that the peer has; it tells of each close."""
    async with handleipc.listen("127.0.0.1", 0) as server, joined("native") as (a, b):
        await settle(a, b)
        clients = [socket.create_connection(server.sockname) for _ in range(3)]
        for _ in clients:
            a.send_nowait("c", await anext(server))
        taken = [(await b.recv())[1] for _ in clients]
        await a.flush()
        assert (a.connections, a.stats().connections, b.connections) == (3, 3, 0)
        for left in (2, 1, 0):
            taken[left].close()
            await until(lambda left=left: a.connections == left)
        for client in clients:
            client.close()


async def test_a_closed_channel() -> None:
    """It can be asked still."""
    async with joined("native") as (a, b):
        await settle(a, b)
        a.abort()
        await a.wait_disconnected()
        stats = a.stats()
        assert stats.state == "closed"
        assert "closed" in repr(a)


async def test_a_channel_names_its_peer() -> None:
    async with joined("node") as (a, _):
        assert f"peer={os.getpid()}" in repr(a)


async def lines_of(child: Child, caplog: pytest.LogCaptureFixture) -> list[str]:
    await child.wait()
    await child.wait_disconnected()
    return [
        f"{record.levelname} {record.getMessage()}".replace(str(child.pid), "PID")
        for record in caplog.records
        if record.name == "handleipc"
    ]


async def test_the_log_of_a_child(caplog: pytest.LogCaptureFixture, tmp_path: Any) -> None:
    """It starts, is ready, and ends: a line each, with its process."""
    caplog.set_level(logging.DEBUG, "handleipc")
    script = tmp_path / "echo.py"
    script.write_text(ECHO)
    async with handleipc.fork(str(script)) as child:
        await child.send("x")
        await child.recv()
    started, ready, *rest = await lines_of(child, caplog)
    assert started.startswith(f"INFO child PID started: {sys.executable}")
    assert started.endswith("echo.py")
    assert ready.startswith("INFO child PID is ready after 0.") or "ready after" in ready
    assert ready.endswith("(native)")
    assert "INFO the child process exited with code 0 (pid PID)" in rest
    assert any(line.startswith("DEBUG <Child pid=PID closed native> has ended") for line in rest)


async def test_the_log_of_a_death(caplog: pytest.LogCaptureFixture, tmp_path: Any) -> None:
    """A crash is a warning, and names the signal; what was asked for is none."""
    caplog.set_level(logging.INFO, "handleipc")
    script = tmp_path / "echo.py"
    script.write_text(ECHO)
    for number, level in ((signal.SIGSEGV, "WARNING"), (signal.SIGKILL, "INFO")):
        child = await handleipc.fork(str(script))
        await child.ready()
        if level == "WARNING":
            os.kill(child.pid, number)
        else:
            child.kill(number)
        found = await lines_of(child, caplog)
        caplog.clear()
        assert found[-1].startswith(f"{level} the child process was ended by signal {number:d}")


async def test_the_log_of_back_pressure(caplog: pytest.LogCaptureFixture) -> None:
    """One line when senders are to wait, and one when they are not."""
    caplog.set_level(logging.DEBUG, "handleipc")
    async with joined("native", Limits(high_water_bytes=1000, low_water_bytes=100)) as (a, b):
        await settle(a, b)
        for _ in range(3):
            assert not a.send_nowait("x" * 2000)
        for _ in range(3):
            await b.recv()
        await a.drain()
        assert a.send_nowait("y")
        await b.recv()
        found = [
            record.getMessage() for record in caplog.records if "back-pressure" in record.message
        ]
    assert len(found) == 2
    assert "back-pressure (2" in found[0]
    assert "no more back-pressure (" in found[1]


async def test_nothing_is_logged_by_default(caplog: pytest.LogCaptureFixture) -> None:
    """A program that has not asked for it sees warnings alone."""
    async with joined("native", Limits(high_water_bytes=1000, low_water_bytes=100)) as (a, b):
        await settle(a, b)
        a.send_nowait("x" * 2000)
        await b.recv()
        await asyncio.sleep(0)
    assert not caplog.records
