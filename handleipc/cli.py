"""The command line: ``demo`` shows a connection being handed over, ``doctor`` what a report needs.

Arguments, printing and exit codes; what it shows is done by the package.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from handleipc import __version__, fork, listen, spawn
from handleipc.asyncio.channel import Channel
from handleipc.asyncio.process import Child
from handleipc.asyncio.server import Server
from handleipc.environment import PREFIXES, found
from handleipc.exceptions import HandleIPCError
from handleipc.limits import Limits, descriptor_limit
from handleipc.wire.syscalls import KIND_SOCKET, descriptor_kind

__all__ = ["main"]

ANSWER = "Child handled it."

NODE_CHILD = """\
process.on('message', (message, socket) => {
  if (message === 'socket' && socket) {
    socket.on('error', () => {});
    socket.setTimeout(2000, () => socket.destroy());
    socket.resume();
    socket.end('%s');
    process.send({ served: process.pid });
  }
});
"""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="handleipc")
def main() -> None:
    """Hand live sockets between processes."""


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    help="Port to listen at; 0 lets the system choose.",
)
@click.option("--node", is_flag=True, help="Run the child in Node.js instead of Python.")
@click.option("--once", is_flag=True, help="Connect once, show the answer, and end.")
def demo(host: str, port: int, *, node: bool, once: bool) -> None:
    """Accept connections in a parent and answer each from a child.

    The README's two programs as one command. Ctrl-C ends it.
    """
    try:
        asyncio.run(_demo(host, port, node=node, once=once))
    except KeyboardInterrupt:
        click.echo()
    except (HandleIPCError, OSError) as error:
        raise click.ClickException(str(error)) from None


async def _demo(host: str, port: int, *, node: bool, once: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:
        child = await _start_child(directory, node=node)
        async with listen(host, port) as server:
            bound, number = server.sockname[:2]
            # Brackets mean something to the shell, and to curl.
            address = f"[{bound}]:{number}" if ":" in bound else f"{bound}:{number}"
            shown = f"--globoff '{address}'" if ":" in bound else address
            click.echo(f"parent {os.getpid()} listens, child {child.pid} ({_what(node)}) answers:")
            click.echo(f"  curl --http0.9 {shown}")
            serving = asyncio.create_task(_hand_over(server, child))
            told = asyncio.Event()
            telling = asyncio.create_task(_tell(child, told))
            try:
                if once:
                    await _connect_once(address, server)
                    await asyncio.wait_for(told.wait(), 10)
                else:
                    await asyncio.wait({serving, telling}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                serving.cancel()
                child.disconnect()
                await asyncio.wait({serving, telling}, timeout=5)
        code = await child.wait()
        if not once:
            raise click.ClickException(
                f"the child ended (exit status {'unknown' if code is None else code})"
            )


def _what(node: bool) -> str:
    return "Node.js" if node else "Python"


async def _start_child(directory: str, *, node: bool) -> Child:
    if not node:
        child = await fork("handleipc.cli:answer")
        await child.ready()  # a Ctrl-C while it imports would be Python's own traceback
        return child
    program = shutil.which("node")
    if program is None:
        raise click.ClickException("there is no program 'node' in PATH: install Node.js")
    script = Path(directory) / "child.js"
    script.write_text(NODE_CHILD % ANSWER)
    return await spawn(program, script)


async def answer(channel: Channel) -> None:
    """The child of ``demo``."""
    async for message, connection in channel:
        if message == "socket":
            await connection.end(ANSWER.encode())
            await channel.send({"served": os.getpid()})


async def _hand_over(server: Server, child: Child) -> None:
    async for connection in server:
        await child.send("socket", connection)


async def _tell(child: Child, told: asyncio.Event) -> None:
    count = 0
    async for message, _ in child:
        count += 1
        click.echo(f"connection {count}: answered by process {message['served']}")
        told.set()


async def _connect_once(address: str, server: Server) -> None:
    """Be the client: with curl where there is one, as the README has it."""
    if shutil.which("curl"):
        process = await asyncio.create_subprocess_exec(
            *("curl", "--silent", "--http0.9", "--globoff", "--max-time", "10", address),
            stdout=asyncio.subprocess.PIPE,
        )
        output, _ = await process.communicate()
    else:
        reader, writer = await asyncio.open_connection(*server.sockname[:2])
        output = await reader.read()
        writer.close()
    click.echo(f"answer: {output.decode()}")
    if output.decode() != ANSWER:
        raise click.ClickException("this was not the child's answer")


@main.command()
def doctor() -> None:
    """Show what a bug report needs: platform, kernel, limits, C core, Node.js."""
    limits = Limits()
    rows = [
        ("handleipc", __version__),
        ("python", f"{platform.python_implementation()} {platform.python_version()}"),
        ("executable", sys.executable),
        ("platform", platform.platform()),
        ("libraries", ", ".join(_version(n) for n in ("cffi", "msgspec", "orjson", "uvloop"))),
        ("C core", _core()),
        ("descriptors", f"RLIMIT_NOFILE {descriptor_limit()}, window {limits.window}"),
        ("user", "root: in-flight limit is not enforced" if os.geteuid() == 0 else "unprivileged"),
        *_kernel_features(),
        ("channel", _channel()),
        ("node", _node()),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}")


def _version(name: str) -> str:
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{name} not installed"


def _core() -> str:
    from handleipc import _core as core  # noqa: PLC0415  # only to say where it is

    built = Path(str(core.__file__)).name
    with socket.socket() as probe:
        works = descriptor_kind(probe.fileno()) & KIND_SOCKET
    return f"{built}, {core.lib.HIPC_MAX_FDS} descriptors per message, {'works' if works else '?'}"


def _kernel_features() -> list[tuple[str, str]]:
    """What this kernel has of what the channel can use."""
    features = {"SO_PASSRIGHTS": 83, "SO_COOKIE": 57}
    rows = []
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for name, number in features.items():
            try:
                ours.getsockopt(socket.SOL_SOCKET, number, 8)
                rows.append((name, "yes"))
            except OSError as error:
                rows.append((name, f"no ({error.strerror})"))
    try:
        os.close(os.pidfd_open(os.getpid()))
        rows.append(("pidfd", "yes"))
    except (AttributeError, OSError):
        rows.append(("pidfd", "no: a thread waits for each child"))
    return rows


def _channel() -> str:
    if found:
        return "found at import: " + ", ".join(f"{k}={v}" for k, v in found.items())
    named = {k: v for k, v in os.environ.items() if k.startswith(PREFIXES)}
    if named:
        return "none, but stale variables: " + ", ".join(f"{k}={v}" for k, v in named.items())
    return "none in the environment"


def _node() -> str:
    program = shutil.which("node")
    if program is None:
        return "not found in PATH"
    version = subprocess.run(
        [program, "--version"], capture_output=True, text=True, check=False, timeout=10
    )
    return f"{version.stdout.strip()} at {program}"
