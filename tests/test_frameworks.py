"""Servers of others, unmodified, on connections dealt by a parent: the examples with their clients."""

from __future__ import annotations

import http.client
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.listening import dial_when_it_listens, free_port

EXAMPLES = Path(__file__).parent.parent / "examples"

# Runs an example on a port of ours and an event loop, here and in its workers.
RUN = """
import asyncio, importlib, sys
sys.path.insert(0, {examples!r})
if {loop!r} == "uvloop":
    import uvloop
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
deal = importlib.import_module("deal").deal
work = importlib.import_module({example!r}).work
if __name__ == "__main__":
    asyncio.run(deal("run:work", port={port}))
"""


def over_http(port: int) -> str:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        for _ in range(2):  # the second on the same connection
            client.request("GET", "/", headers={"User-Agent": "x" * 5000})
            response = client.getresponse()
            assert response.status == 200
            text = response.read().decode()
    finally:
        client.close()
    return text


def over_websocket(port: int) -> str:
    from websockets.sync.client import connect

    with connect(f"ws://127.0.0.1:{port}") as websocket:
        websocket.send("hello " + "x" * 100_000)
        text = websocket.recv()
        assert isinstance(text, str)
        return text


def over_tcp(port: int) -> str:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(b"hello\n")
        return client.makefile().read()


CLIENTS: dict[str, Callable[[int], str]] = {
    "uvicorn": over_http,
    "hypercorn": over_http,
    "aiohttp": over_http,
    "websockets": over_websocket,
    "streams": over_tcp,
}


@contextmanager
def running(folder: Path, name: str, loop: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The example, as a process that listens."""
    port = free_port()
    example = f"with_{name}"
    text = RUN.format(examples=str(EXAMPLES), loop=loop, example=example, port=port)
    (folder / "run.py").write_text(text)
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "run.py"], cwd=folder, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            dial_when_it_listens(process, port, timeout=60).close()  # and is impolite
            yield process, port
        finally:
            process.kill()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("name", CLIENTS)
def test_server_on_handed_connections(name: str, loop: str, tmp_path: Path) -> None:
    """Both workers serve real clients; SIGTERM ends all without an error and without a word."""
    if name != "streams":
        pytest.importorskip(name)
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    with running(tmp_path, name, loop) as (process, port):
        answers = [CLIENTS[name](port) for _ in range(6)]
        workers = {re.search(r"process (\d+)", answer).group(1) for answer in answers}  # type: ignore[union-attr]
        assert len(workers) == 2
        assert str(process.pid) not in workers
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)
        assert (process.returncode, *said) == (0, "", "")


@pytest.mark.parametrize("name", CLIENTS)
def test_examples_are_short(name: str) -> None:
    """Each fits on a screen."""
    assert len((EXAMPLES / f"with_{name}.py").read_text().splitlines()) < 60
