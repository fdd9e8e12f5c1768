"""Handles for a peer that loses descriptors which it reads together with earlier bytes."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from handleipc.wire import gaps
from handleipc.wire.link import Link
from tests.asyncio.helpers import RawPeer, clients, raw_peer

ACK = {"cmd": "NODE_HANDLE_ACK"}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What is said of the peer, the last one for ever; what was asked is taken out."""
    answers = [True]

    def loses_descriptors(pid: int) -> bool:
        return answers.pop(0) if len(answers) > 1 else answers[0]

    monkeypatch.setattr(gaps, "loses_descriptors", loses_descriptors)
    return answers


async def turns() -> None:
    """Let the channel do all that it can do now."""
    for _ in range(20):
        await asyncio.sleep(0)


async def read_together(peer: RawPeer) -> tuple[bytes, int]:
    """Return the bytes of one read, which may wait for the first of them, and its descriptors."""
    while not peer.unread():
        await asyncio.sleep(0.001)
    found, fds = peer._buffer, len(peer.fds)
    peer._buffer = b""
    while peer.fds:
        os.close(peer.fds.pop())
    return found, fds


async def test_handle_waits_for_unread_bytes(asked: list[bool]) -> None:
    """A handle leaves when the peer has read the message before it, and alone."""
    async with raw_peer() as (a, peer):
        with clients(1) as (_, [connection]):
            a.send_nowait("plain")
            sent = asyncio.create_task(a.send("handle", connection))
            await turns()
            assert await read_together(peer) == (b'"plain"\n', 0)
            line, fds = await read_together(peer)
            assert (b"NODE_HANDLE" in line, fds) == (True, 1)
            peer.write(ACK)
            await sent


async def test_acknowledgement_is_read_before_a_handle(asked: list[bool]) -> None:
    """What is sent back at once does not come together with the acknowledgement."""
    async with raw_peer() as (a, peer):
        with clients(2) as (_, [given, returned]):
            envelope = b'{"cmd":"NODE_HANDLE","type":"net.Socket","msg":"go"}\n'
            peer.write(envelope, fds=(given.fileno(),))
            _, handle = await a.recv()
            handle.close()
            sent = asyncio.create_task(a.send("back", returned))
            await turns()
            assert await read_together(peer) == (b'{"cmd":"NODE_HANDLE_ACK"}\n', 0)
            line, fds = await read_together(peer)
            assert (b'"back"' in line, fds) == (True, 1)
            peer.write(ACK)
            await sent


async def test_other_peers_wait_for_nothing(asked: list[bool]) -> None:
    """To others a handle leaves at once; when the peer has spoken, nobody asks again who it is."""
    asked[:] = [False, False, True]
    async with raw_peer() as (a, peer):
        with clients(3) as (_, connections):
            for connection in connections:
                a.send_nowait("plain")
                sent = asyncio.create_task(a.send("handle", connection))
                await turns()
                line, fds = await read_together(peer)
                assert (line.startswith(b'"plain"\n{"cmd":"NODE_HANDLE"'), fds) == (True, 1)
                peer.write(ACK)
                await sent
    assert asked == [True]


async def test_peer_is_known_when_it_has_spoken(asked: list[bool]) -> None:
    """A program that starts another in its place is asked for again."""
    asked[:] = [False, True]
    async with raw_peer() as (a, peer):
        with clients(2) as (_, [first, second]):
            sent = asyncio.create_task(a.send("first", first))
            assert (await read_together(peer))[1] == 1
            peer.write(ACK)
            await sent
            a.send_nowait("plain")
            sent = asyncio.create_task(a.send("second", second))
            await turns()
            assert await read_together(peer) == (b'"plain"\n', 0)
            assert (await read_together(peer))[1] == 1
            peer.write(ACK)
            await sent


def test_program_is_recognized(tmp_path: Path) -> None:
    """A process is known by the name of its program, wherever that is."""
    program = shutil.copy(shutil.which("sleep") or "sleep", tmp_path / "deno")
    with subprocess.Popen([program, "60"]) as process:
        try:
            assert gaps.loses_descriptors(process.pid)
        finally:
            process.kill()
    assert not gaps.loses_descriptors(process.pid)
    assert not gaps.loses_descriptors(os.getpid())


def test_creator_and_unread(pair: tuple[socket.socket, socket.socket]) -> None:
    """The kernel says who made a pair, and whether what was written there was read."""
    a, b = pair
    link = Link(a, 1024)
    assert link.peer.pid == os.getpid()
    assert link.peer_has_read()
    a.send(b"x")
    assert not link.peer_has_read()
    assert b.recv(10) == b"x"
    assert link.peer_has_read()


def test_unread_of_what_cannot_say(pair: tuple[socket.socket, socket.socket]) -> None:
    """Once it is closed, nobody can say: then it has not."""
    link = Link(pair[0], 1024)
    link.close()
    assert not link.peer_has_read()
