"""What is shipped to be copied survives impolite clients: some that close, reset, or say nothing."""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.listening import dial_when_it_listens, free_port

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
README = (ROOT / "README.md").read_text()
ANSWER = b"Child handled it."
REQUEST = b"GET /%b HTTP/1.0\r\n\r\n"


def dial(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def read_all(client: socket.socket) -> bytes:
    answer = b""
    while chunk := client.recv(4096):
        answer += chunk
    return answer


def ask(port: int, request: bytes = b"") -> bytes:
    """Be a polite client."""
    with dial(port) as client:
        client.sendall(request)
        return read_all(client)


# -- impolite clients ----------------------------------------------------------------------------


def close(client: socket.socket) -> None:
    """Connect and close."""


def reset(client: socket.socket) -> None:
    """Reset the connection, as a load balancer's port check does."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def half_a_request(client: socket.socket) -> None:
    """Say half of something, and close."""
    client.sendall(b"GET /\xff\xfe HTT")


def a_request_and_reset(client: socket.socket) -> None:
    """Ask, and do not want to know."""
    client.sendall(REQUEST % b"\xff")
    reset(client)


def too_much(client: socket.socket) -> None:
    """Say more than anybody wants to hear, and never come to the end."""
    client.sendall(b"GET /a HTTP/1.0\r\n")
    client.setblocking(False)
    with ExitStack() as stack:
        stack.callback(client.settimeout, 30)
        try:
            for _ in range(4):
                client.send(b"x" * 65536)
        except OSError:
            pass  # the answer was a reset, or it has heard enough


IMPOLITE: list[Callable[[socket.socket], None]] = [
    close,
    reset,
    half_a_request,
    a_request_and_reset,
    too_much,
]


def be_impolite(port: int, rounds: int = 20) -> None:
    """Every kind in turn."""
    for _ in range(rounds):
        for behave in IMPOLITE:
            with dial(port) as client:
                try:
                    behave(client)
                except ConnectionError:
                    assert behave is not close  # it was answered and closed before it was asked


@contextmanager
def silent(port: int) -> Iterator[None]:
    """Some clients who say nothing, or nothing more, for as long as the block runs."""
    with ExitStack() as stack:
        for begun in (b"", b"G", REQUEST.partition(b" HTTP")[0] % b"a", REQUEST[:-2] % b"b"):
            stack.enter_context(dial(port)).sendall(begun)
        yield


# -- programs ------------------------------------------------------------------------------------


@contextmanager
def running(command: list[str], directory: Path, port: int, **env: str) -> Iterator[None]:
    """A program that listens at this port, and is alive in the end."""
    process = subprocess.Popen(
        command,
        cwd=directory,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        dial_when_it_listens(process, port, timeout=30).close()
        yield
        assert process.poll() is None, "it has ended"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate(timeout=30)
    assert b"Traceback" not in said, said.decode()
    assert b"Error" not in said, said.decode()


def readme(directory: Path, port: int, **replace: str) -> None:
    """Write the README's programs."""
    for text, name in re.findall(r"```python\n(# (\w+\.py)\n.*?)```", README, re.DOTALL):
        for old, new in replace.items():
            text = text.replace(old, new)
        (directory / name).write_text(text.replace("1337", str(port)))


def test_the_readme_s_pair(tmp_path: Path) -> None:
    """The first programs anybody sees answer the next client, whatever those before did."""
    port = free_port()
    readme(tmp_path, port)
    with running([sys.executable, "parent.py"], tmp_path, port):
        be_impolite(port)
        with silent(port):
            assert ask(port) == ANSWER
            assert ask(port, REQUEST % b"") == ANSWER


def test_node_parent(tmp_path: Path, node: str) -> None:
    """The same child under a Node parent."""
    port = free_port()
    readme(tmp_path, port)
    env = {"PYTHON": sys.executable, "PORT": str(port)}
    with running([node, str(EXAMPLES / "node_parent.js")], tmp_path, port, **env):
        be_impolite(port)
        with silent(port):
            assert ask(port) == ANSWER


READER = """
    import asyncio, handleipc

    async def main():
        parent = await handleipc.parent()
        async for _, connection in parent:
            reader, writer = await connection.open()
            writer.write(b"you said " + await reader.read(100))
            writer.close()

    asyncio.run(main())
"""


def test_node_parent_reads_nothing(program, tmp_path: Path, node: str) -> None:
    """What a client says at once is there for a child that reads it, each time."""
    port = free_port()
    program("child.py", READER)
    env = {"PYTHON": sys.executable, "PORT": str(port)}
    with running([node, str(EXAMPLES / "node_parent.js")], tmp_path, port, **env):
        for n in range(60):
            assert ask(port, b"%d\n" % n) == b"you said %d\n" % n


def test_node_child(tmp_path: Path, node: str) -> None:
    """The README's parent with a Node child."""
    port = free_port()
    script = str(EXAMPLES / "node_child.js")
    readme(tmp_path, port, **{'fork("child.py")': f"spawn({node!r}, {script!r})"})
    with running([sys.executable, "parent.py"], tmp_path, port):
        be_impolite(port)
        with silent(port):
            assert ask(port) == ANSWER


def test_route_by_content(tmp_path: Path) -> None:
    """Each path has its process, whoever else connects."""
    port = free_port()
    text = (EXAMPLES / "route_by_content.py").read_text()
    assert text.count("8000") == 3
    (tmp_path / "route_by_content.py").write_text(text.replace("8000", str(port)))
    with running([sys.executable, "route_by_content.py"], tmp_path, port):
        be_impolite(port)
        with silent(port):
            served = {ask(port, REQUEST % path).splitlines()[-1] for path in (b"a", b"b", b"a")}
    assert sorted(line.split()[0] for line in served) == [b"/a", b"/b"]
    assert len({line.split()[-1] for line in served}) == 2


def test_takeover(tmp_path: Path) -> None:
    """Each program that is started takes the listener over, and no client between is refused."""
    port = free_port()
    text = (EXAMPLES / "takeover.py").read_text()
    assert text.count("8000") == 3
    (tmp_path / "takeover.py").write_text(text.replace("8000", str(port)))
    served: list[bytes] = []
    programs: list[subprocess.Popen[bytes]] = []
    try:
        for count in range(3):
            programs.append(subprocess.Popen([sys.executable, "takeover.py"], cwd=tmp_path))
            deadline = time.monotonic() + 30
            new = b"process %d\n" % programs[-1].pid
            while True:
                try:
                    served.append(ask(port))
                except ConnectionRefusedError:
                    assert count == 0  # from then on somebody listens at any time
                    time.sleep(0.02)
                if served[-1:] == [new]:
                    break
                assert time.monotonic() < deadline
            if count:
                assert programs[count - 1].wait(timeout=30) == 0
                assert {ask(port) for _ in range(20)} == {new}
    finally:
        for program in programs:
            program.kill()
            program.wait()
    assert set(served) == {b"process %d\n" % program.pid for program in programs}
