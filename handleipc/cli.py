"""The command line: ``demo``, ``doctor`` and ``inspect``.

Arguments, printing and exit codes; what it shows is done by the package.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path

import click

from handleipc import __version__, fork, listen, spawn
from handleipc.asyncio.channel import Channel
from handleipc.asyncio.process import Child
from handleipc.asyncio.server import Server
from handleipc.doctor import Machine, advise, facts
from handleipc.exceptions import HandleIPCError
from handleipc.inspecting import command_of, ends_of

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
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def doctor(*, as_json: bool) -> None:
    """Show what a bug report needs, and what this machine could do better.

    Platform, kernel, limits, C core, Node.js; then one line of advice for each thing that will
    hold back a busy program.
    """
    rows, advice = facts(), advise(Machine.here())
    if as_json:
        click.echo(json.dumps({**rows, "advice": advice}, indent=2))
        return
    _show(rows)
    for line in advice:
        click.echo(f"advice: {line}")


@main.command()
@click.argument("pid", type=click.IntRange(min=1))
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def inspect(pid: int, *, as_json: bool) -> None:
    """Show who is at the other end of the channels of process PID, and what is queued.

    Its connected Unix stream sockets, of which those to a parent or a child with a channel are
    told from others by the variables that the child was started with. Linux; of a process of your
    own, or as root.
    """
    try:
        ends = ends_of(pid)
    except ProcessLookupError:
        raise click.ClickException(f"there is no process {pid}") from None
    except PermissionError:
        raise click.ClickException(
            f"process {pid} is another user's: run this as that user, or as root"
        ) from None
    except OSError as error:
        raise click.ClickException(
            f"the kernel does not tell about Unix sockets: {error.strerror} (Linux with UNIX_DIAG"
            " can)"
        ) from None
    if as_json:
        shown = [dataclasses.asdict(end) for end in ends]
        click.echo(json.dumps({"pid": pid, "ends": shown}, indent=2))
        return
    what = "connected Unix stream socket" + ("s" if len(ends) != 1 else "")
    click.echo(f"process {pid} ({command_of(pid)}): {len(ends)} {what}")
    for end in ends:
        click.echo(f"  {end}")


def _show(rows: dict[str, str]) -> None:
    width = max(len(name) for name in rows)
    for name, value in rows.items():
        click.echo(f"{name:<{width}}  {value}")
