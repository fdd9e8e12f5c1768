"""How children start: arguments, standard streams, the channel's place, and the environment."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest

import handleipc
from tests.conformance.peers import goodbye, spawned
from tests.conformance.record import NOT_APPLICABLE, also, node_test

ECHO = "process.on('message', (message) => process.send(message));"
PYTHON_ECHO = """
    async def main(parent):
        async for message, handle in parent:
            await parent.send(message)
"""


@node_test(
    "test-child-process-fork",
    expects="a message goes there and back; the array of arguments is not touched; a missing,"
    " undefined or symbol message throws with its code",
    ours="the same round trip and arguments; a missing message is `TypeError`, one that is not JSON"
    " `MessageNotSerializable`, also a `TypeError`",
    why="Python has no undefined and no symbol: `object()` and `...` stand for them",
)
async def test_fork(peer) -> None:
    """A child gets its arguments and answers; what is no message is refused at once."""
    args = ["foo", "bar"]
    javascript = """
        process.send(process.argv.slice(2));
        process.on('message', (m) => process.send({ got: m }));
    """
    python = """
        async def main(parent):
            await parent.send(sys.argv[1:])
            async for message, handle in parent:
                await parent.send({"got": message})
    """
    async with peer(javascript, python, *args) as child:
        assert await child.recv() == (["foo", "bar"], None)
        assert args == ["foo", "bar"]
        for nothing in ((), (object(),), (...,), ({"deep": [object()]},), (b"bytes",)):
            with pytest.raises(TypeError):
                await child.send(*nothing)
            with pytest.raises(TypeError):
                child.send_nowait(*nothing)
        await child.send({"hello": "world"})
        assert await child.recv() == ({"got": {"hello": "world"}}, None)
        await goodbye(child)


@also("test-child-process-fork")
def test_fork_under_node(under_node) -> None:
    """The same with the roles exchanged."""
    javascript = """
        const args = ['foo', 'bar'];
        const child = fork(undefined, ...args);
        child.once('message', (m) => {
          show(m);
          child.send({ hello: 'world' });
          child.once('message', (m) => { show(m); child.disconnect(); });
        });
    """
    python = """
        async def main(parent):
            await parent.send(sys.argv[1:])
            for nothing in ((), (object(),)):
                try:
                    await parent.send(*nothing)
                except TypeError:
                    continue
                raise AssertionError
            async for message, handle in parent:
                await parent.send({"got": message})
    """
    assert under_node(javascript, python) == [["foo", "bar"], {"got": {"hello": "world"}}]


@node_test(
    "test-child-process-fork3",
    expects="forking an empty script does not hang the parent",
    ours="the same: it exits 0, and the channel ends by itself",
    why="the exit ends the channel, opened or not",
)
async def test_empty_script(peer, tmp_path) -> None:
    """A child that does nothing ends, and its channel with it."""
    (tmp_path / "empty.py").write_text("")
    argv = [sys.executable, str(tmp_path / "empty.py")]
    async with spawned(*(argv if peer.node is None else peer.argv("", ""))) as child:
        assert [message async for message in child] == []
        await child.wait_disconnected()
        assert await child.wait() == 0


@node_test(
    "test-child-process-fork-and-spawn",
    expects="a grandchild does not inherit the variables of the channel; all exit 0",
    ours="the same: `parent()` removes them",
    why="a stale number would name something else in the grandchild",
)
async def test_fork_and_spawn(peer, tmp_path) -> None:
    """What a child starts has no channel, and finds none."""
    grandchild = """
        import asyncio, handleipc

        async def main():
            try:
                await handleipc.parent()
            except handleipc.NoChannel:
                print("none")

        asyncio.run(main())
    """
    (path := tmp_path / "grandchild.py").write_text(
        "\n".join(line[8:] for line in grandchild.splitlines())
    )
    javascript = """
        const { stdout } = require('child_process').spawnSync(...[process.argv[2], [process.argv[3]]]);
        const left = Object.keys(process.env).filter((name) => name.startsWith('NODE_CHANNEL'));
        process.send([String(stdout), left]);
    """
    python = """
        async def main(parent):
            out = subprocess.run(sys.argv[1:], capture_output=True, text=True).stdout
            left = [name for name in os.environ if name.startswith(("NODE_CHANNEL", "HANDLEIPC_"))]
            await parent.send([out, left])
    """
    async with peer(javascript, python, sys.executable, str(path)) as child:
        assert await child.recv() == (["none\n", []], None)
        assert await child.wait() == 0


@also("test-child-process-fork-and-spawn")
def test_fork_and_spawn_under_node(under_node, node) -> None:
    """A Node grandchild behind a Python child has no ``process.send``."""
    python = """
        async def main(parent):
            (node, ) = sys.argv[1:]
            out = subprocess.run([node, "-p", "typeof process.send"], capture_output=True, text=True)
            await parent.send([out.stdout, out.returncode])
    """
    javascript = """
        const child = fork(undefined, process.execPath);
        child.on('message', show);
        child.on('exit', show);
    """
    assert under_node(javascript, python) == [["undefined\n", 0], 0]


@node_test(
    "test-child-process-fork-stdio",
    expects="custom `stdio` with 'ipc' at 3 and an extra pipe at 4; an array without 'ipc' throws",
    ours="piped standard streams with the channel at 3 (`channel_fd=3`), and as a child under such a"
    " Node parent; `spawn` has no extra descriptors of its own: they are sent over the channel",
    why="there is no way to start a child without a channel, so nothing to throw for",
)
async def test_fork_stdio(peer, tmp_path) -> None:
    """Pipes and the channel side by side."""
    pipe = asyncio.subprocess.PIPE
    javascript = """
        process.send(process.channel.fd);
        process.stdin.pipe(process.stdout);
    """
    python = """
        async def main(parent):
            await parent.send(3 if os.readlink("/proc/self/fd/3").startswith("socket") else None)
            print(sys.stdin.read(), end="")
    """
    async with peer(javascript, python, channel_fd=3, stdin=pipe, stdout=pipe) as child:
        assert await child.recv() == (3, None)
        child.stdin.write(b"through the pipes")
        child.stdin.close()
        assert await child.stdout.read() == b"through the pipes"
        await goodbye(child)


@also("test-child-process-fork-stdio")
def test_fork_stdio_under_node(under_node) -> None:
    """A Python child with the channel at 3 and a pipe at 4."""
    javascript = """
        const child = fork(['pipe', 'pipe', 'pipe', 'ipc', 'pipe']);
        child.stdio[4].write('over the pipe');
        child.stdio[4].on('data', (data) => show(String(data)));
        child.on('message', (m) => { show(m); child.disconnect(); });
        child.on('exit', show);
    """
    python = """
        async def main(parent):
            data = os.read(4, 100)
            os.write(4, data[::-1])
            await parent.send(data.decode())
            async for message in parent:
                pass
    """
    lines = under_node(javascript, python)
    assert sorted(lines[:2]) == ["epip eht revo", "over the pipe"]
    assert lines[2:] == [0]


@node_test(
    "test-child-process-fork-stdio-string-variant",
    expects="'pipe', 'inherit' and 'ignore' for `stdio` each get a channel too; another word throws",
    ours="`PIPE`, None and `DEVNULL` each get one; anything else raises, and nothing is left behind",
    why="the error is that of `subprocess`, whose options these are",
)
@pytest.mark.parametrize("stdio", [asyncio.subprocess.PIPE, None, asyncio.subprocess.DEVNULL])
async def test_fork_stdio_variants(python_peer, stdio) -> None:
    """There is a channel, whatever the standard streams are."""
    options = {"stdin": stdio, "stdout": stdio, "stderr": stdio}
    async with python_peer("", PYTHON_ECHO, **options) as child:
        await child.send("hello")
        assert await child.recv() == ("hello", None)
        await goodbye(child)
        if child.stdin is not None:
            child.stdin.close()
    with pytest.raises((TypeError, ValueError)):
        await handleipc.spawn("true", stdout="foo")


@node_test(
    "test-child-process-stdin-ipc",
    expects="the channel at descriptor 0 works, and the child exits 0",
    ours="the same, in both roles",
    why="the number is only a number",
)
async def test_channel_at_stdin(peer) -> None:
    """``channel_fd=0``."""
    async with peer(ECHO, PYTHON_ECHO, channel_fd=0) as child:
        await child.send("at 0")
        assert await child.recv() == ("at 0", None)
        await goodbye(child)


@node_test(
    "test-child-process-stdout-ipc",
    expects="the channel at descriptor 1 works, and the child exits 0",
    ours="the same, in both roles",
    why="as at 0; a Python child must not print then, as a Node child must not",
)
async def test_channel_at_stdout(peer) -> None:
    """``channel_fd=1``."""
    async with peer(ECHO, PYTHON_ECHO, channel_fd=1) as child:
        await child.send("at 1")
        assert await child.recv() == ("at 1", None)
        await goodbye(child)


@also("test-child-process-stdin-ipc")
@also("test-child-process-stdout-ipc")
def test_channel_at_a_standard_stream_under_node(under_node) -> None:
    """A Python child of Node with its channel at 0, then at 1."""
    javascript = """
        for (const stdio of [['ipc', 'inherit', 'inherit'], ['ignore', 'ipc', 'inherit']]) {
          const child = fork(stdio);
          child.send('hello');
          child.on('message', (m) => child.disconnect());
          child.on('exit', show);
        }
    """
    assert under_node(javascript, PYTHON_ECHO) == [0, 0]


@node_test(
    "test-child-process-validate-stdio",
    expects="`stdio` is parsed; bad values throw; `ERR_IPC_SYNC_FORK` for a channel to `spawnSync`",
    ours="a channel number that is none, or that is given to a stream as well, is `ValueError`; bad"
    " streams raise as in `subprocess`",
    why="there is no synchronous `spawn` here, and one keyword cannot ask for two channels",
)
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"channel_fd": -1}, ValueError),
        ({"channel_fd": 1, "stdout": subprocess.PIPE}, ValueError),
        ({"channel_fd": 0, "stdin": subprocess.DEVNULL}, ValueError),
        ({"stdin": ...}, TypeError),
        ({"stdio": "ipc"}, TypeError),
    ],
    ids=str,
)
async def test_validate_stdio(options, error) -> None:
    """Options that make no sense are refused before anything starts."""
    with pytest.raises(error):
        await handleipc.spawn("true", **options)


STDOUT_CLOSED = """
    async def main(parent):
        logging.basicConfig(stream=sys.stdout, level=logging.INFO)
        logging.raiseExceptions = False
        async for message, handle in parent:
            for n in range(3):
                logging.info("nobody reads this")
            await parent.send("alive")
        sys.stdout = None  # or the interpreter would complain when it flushes
"""


@node_test(
    "test-process-external-stdio-close",
    expects="a child that logs to a closed stdout does not die of it, and its channel works",
    ours="the same: `logging` survives, and the channel works (`print` raises `BrokenPipeError`)",
    why="Python ignores SIGPIPE; what a program makes of the exception is its own affair",
)
async def test_stdout_closed(peer) -> None:
    """The parent stops reading the child's output; the channel does not care."""
    javascript = """
        process.on('message', () => {
          for (let n = 0; n < 3; n++) console.log('nobody reads this');
          process.send('alive');
        });
    """
    reading, writing = os.pipe()
    async with peer(javascript, STDOUT_CLOSED, stdout=writing) as child:
        os.close(writing)
        os.close(reading)
        await child.send("log")
        assert await child.recv() == ("alive", None)
        await goodbye(child)


@node_test(
    "test-process-external-stdio-close-spawn",
    expects="the same, started with `spawn`",
    ours="the same",
    why="`fork` is `spawn` here as well",
)
def test_stdout_closed_under_node(under_node) -> None:
    """A Node parent closes the pipe that its Python child logs to."""
    javascript = """
        const child = fork(['inherit', 'pipe', 'inherit', 'ipc']);
        child.stdout.on('close', () => child.send('log'));
        child.stdout.destroy();
        child.on('message', (m) => { show(m); child.disconnect(); });
        child.on('exit', show);
    """
    assert under_node(javascript, STDOUT_CLOSED) == ["alive", 0]


@node_test(
    "es-module/test-esm-child-process-fork-main",
    expects="a message sent right after `fork` reaches a child that is an ES module",
    ours="the same, and a Python child that asks for its channel late gets what was sent before",
    why="messages are held until somebody reads them",
)
async def test_early_message(peer) -> None:
    """What is sent before the child listens is held for it."""
    javascript = """
        await new Promise((resolve) => setImmediate(resolve));
        process.on('message', (m) => process.send(m, () => process.disconnect()));
    """
    python = """
        async def main(parent):
            for _ in range(3):
                await asyncio.sleep(0)
            parent.on("message", lambda m, handle: (parent.send_nowait(m), parent.disconnect()))
            await parent.wait_disconnected()
    """
    async with peer(javascript, python, suffix=".mjs") as child:
        child.send_nowait("early")
        assert [message async for message, _ in child] == ["early"]
        assert await child.wait() == 0


@also("es-module/test-esm-child-process-fork-main")
def test_early_message_under_node(under_node) -> None:
    """Node sends at once, the Python child reads later."""
    javascript = """
        const child = fork();
        child.send('early');
        child.on('message', show);
    """
    python = """
        async def main(parent):
            await asyncio.sleep(0)
            message, handle = await parent.recv()
            await parent.send([message, handle])
    """
    assert under_node(javascript, python) == [["early", None]]


# -- serialization: 'advanced' --------------------------------------------------------------------

LATER = "serialization 'advanced' comes later, and is refused by name until then"


@node_test(
    "test-child-process-advanced-serialization",
    expects="typed arrays, Map, BigInt, circular values and errors go there and back; a bad"
    " `serialization` is rejected",
    ours='`serialization="advanced"`, and any other word but "json", is `ValueError`',
    verdict=NOT_APPLICABLE,
    why=LATER,
)
@node_test(
    "test-child-process-advanced-serialization-largebuffer",
    expects="four buffers of 8 MB arrive in order",
    ours='`serialization="advanced"` is `ValueError`',
    verdict=NOT_APPLICABLE,
    why=LATER,
)
@node_test(
    "test-child-process-advanced-serialization-splitted-length-field",
    expects="length fields split across reads are put together",
    ours='`serialization="advanced"` is `ValueError`',
    verdict=NOT_APPLICABLE,
    why=LATER,
)
@node_test(
    "test-child-process-fork-advanced-header-serialization",
    expects="impossible lengths followed by EOF do not crash the reader",
    ours='`serialization="advanced"` is `ValueError`',
    verdict=NOT_APPLICABLE,
    why=LATER,
)
@pytest.mark.parametrize("serialization", ["advanced", "xml", ""])
async def test_advanced_is_refused(serialization: str) -> None:
    """By name, before anything starts."""
    with pytest.raises(ValueError, match=repr(serialization)):
        await handleipc.spawn("true", serialization=serialization)
    with pytest.raises(ValueError, match=repr(serialization)):
        await handleipc.fork("child.py", serialization=serialization)


@also("test-child-process-advanced-serialization")
def test_advanced_under_node_is_refused(under_node) -> None:
    """A Python child of a Node that speaks 'advanced' says so, and does not guess."""
    javascript = """
        const child = child_process.spawn(python[0], python.slice(1),
          { stdio: [0, 1, 'pipe', 'ipc'], serialization: 'advanced' });
        let said = '';
        child.stderr.on('data', (data) => said += data);
        child.on('close', (code) => show([code, said.includes('advanced')]));
    """
    assert under_node(javascript, "async def main(parent): pass") == [[1, True]]
