"""Messages, ends and floods between Python and real Node, in both roles."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import handleipc
from tests.interop.children import spawned
from tests.interop.raw import HERE, PRELUDE

Program = Callable[[str, str], Path]

MANY = 50_000


def under_node(node: str, program: Program, javascript: str, python: str, *argv: str) -> list[Any]:
    """Run a Node parent with a Python child, and return what the parent printed, line by line.

    ``javascript`` has ``child``, ``net`` and ``show(value)``; ``python`` defines ``main(parent)``.
    """
    child = program("child_program.py", "pass")
    child.write_text(PRELUDE + program("text.py", python).read_text() + "\nrun(main)\n")
    parent = program("parent.js", NODE_PARENT + javascript)
    run = subprocess.run(
        [node, parent, HERE, sys.executable, "-W", "error", child, *argv],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (run.returncode, run.stderr) == (0, ""), run.stdout
    return [json.loads(line) for line in run.stdout.splitlines()]


NODE_PARENT = """
    const net = require('net');
    const [here, ...argv] = process.argv.slice(2);
    process.env.PYTHONPATH = here;
    const show = (value) => require('fs').writeSync(1, JSON.stringify(value) + '\\n');
    const child = require('child_process')
      .spawn(argv[0], argv.slice(1), { stdio: [0, 1, 2, 'ipc'] });
"""

SHOW_EVENTS = """
    child.on('disconnect', () => show(['disconnect', child.connected]));
    child.on('exit', (code, signal) => show(['exit', code, signal]));
    child.on('close', (code, signal) => show(['close', code, signal]));
"""


def collect_events(child: handleipc.Child) -> list[Any]:
    """Return a list that the events of the end will be in."""
    events: list[Any] = []
    child.on("disconnect", lambda: events.append(["disconnect", child.connected]))
    child.on("exit", lambda code, sig: events.append(["exit", code, sig]))
    child.on("close", lambda code, sig: events.append(["close", code, sig]))
    return events


async def closed(child: handleipc.Child) -> None:
    """Wait for the "close" event."""
    done = asyncio.get_running_loop().create_future()
    child.once("close", lambda code, sig: done.set_result(None))
    await done


# -- messages ------------------------------------------------------------------------------------

JUDGE = """
    process.on('message', (value) => {
      const is = (what) => process.send([what, value]);
      if (value === null) return is('null');
      if (typeof value === 'number') return is('number ' + value);
      if (typeof value === 'string' && value.length === 1) return is('unit ' + value.charCodeAt(0));
      is(Array.isArray(value) ? 'array' : typeof value);
    });
"""


@pytest.mark.parametrize(
    ("message", "judgement", "returned"),
    [
        (float("nan"), "null", None),
        (float("-inf"), "null", None),
        ([float("inf"), 1], "array", [None, 1]),
        ("\ud800", "unit 55296", "\ud800"),
        ("\udfff", "unit 57343", "\udfff"),
        (2**53 + 1, "number 9007199254740992", 2**53),
        (2**60, "number 1152921504606847000", 1152921504606847000),
        (-0.0, "number 0", None),
        ("\u2028\u2029\ufeff\0\U0001f600", "string", "\u2028\u2029\ufeff\0\U0001f600"),
        ({"cmd": "NODE_"}, "object", {"cmd": "NODE_"}),
        ([{"cmd": "NODE_foo"}], "array", [{"cmd": "NODE_foo"}]),
        ({"__proto__": 1, "": 2}, "object", {"__proto__": 1, "": 2}),
        ("é" * 400_000, "string", "é" * 400_000),
    ],
    ids=lambda value: repr(value)[:20],
)
async def test_value(
    node: str, program: Program, message: Any, judgement: str, returned: Any
) -> None:
    """Each value arrives at Node as JavaScript has it, and comes back."""
    async with spawned(node, program("judge.js", JUDGE)) as child:
        await child.send(message)
        answer, _ = await child.recv()
        assert answer[0] == judgement
        if returned is not None:
            assert answer[1] == returned
        child.disconnect()
        assert await child.wait() == 0


async def test_internal_messages(node: str, program: Program) -> None:
    """``{"cmd": "NODE_foo"}`` goes to "internal_message", here and in Node; others do not."""
    text = """
        process.on('internalMessage', (message) => process.send({ internal: message }));
        process.on('message', (message) => process.send({ user: message }));
        process.send({ cmd: 'NODE_bar' });
    """
    internal: list[Any] = []
    async with spawned(node, program("child.js", text)) as child:
        child.on("internal_message", lambda message, handle: internal.append((message, handle)))
        for message in ({"cmd": "NODE_foo"}, {"cmd": "NODE_"}, ["NODE_foo"], {"cmd": "foo"}):
            await child.send(message)
        assert [(await child.recv())[0] for _ in range(4)] == [
            {"internal": {"cmd": "NODE_foo"}},
            {"user": {"cmd": "NODE_"}},
            {"user": ["NODE_foo"]},
            {"user": {"cmd": "foo"}},
        ]
        assert internal == [({"cmd": "NODE_bar"}, None)]
        child.disconnect()
        assert await child.wait() == 0


# -- before the other end is there, and after it has gone ------------------------------------------


async def test_node_listens_late(node: str, program: Program) -> None:
    """What is sent before a Node child listens arrives, with its handle."""
    text = """
        require('fs').readFile(__filename, () => setImmediate(() => {
          const seen = [];
          process.on('message', (message, handle) => {
            seen.push([message, handle && handle.constructor.name]);
            if (handle) handle.close();
            if (message === 'last') process.send(seen, () => process.disconnect());
          });
        }));
    """
    async with handleipc.listen("127.0.0.1", 0) as server:
        async with spawned(node, program("child.js", text)) as child:
            child.send_nowait("first")
            child.send_nowait("server", server)
            child.send_nowait("last")
            answer, _ = await child.recv()
            assert answer == [["first", None], ["server", "Server"], ["last", None]]
            assert await child.wait() == 0


def test_python_listens_late(node: str, program: Program, child_loop: str) -> None:
    """What Node sends before a Python child asks for its channel arrives."""
    javascript = """
        for (let i = 0; i < 100; i++) child.send(i);
        child.on('message', (message) => { show(message); child.disconnect(); });
    """
    python = """
        async def main(parent):
            got = [(await parent.recv())[0] for _ in range(100)]
            await parent.send(got == list(range(100)))
            assert [m async for m, _ in parent] == []
    """
    assert under_node(node, program, javascript, python) == [True]


async def test_node_child_exits_after_its_last_words(node: str, program: Program) -> None:
    """All that a Node child wrote before its exit is read, then iteration says how it ended."""
    text = """
        for (let i = 0; i < 1000; i++) process.send(i);
        process.send('last', () => process.exit(7));
    """
    async with spawned(node, program("child.js", text)) as child:
        assert await child.wait() == 7
        received = []
        with pytest.raises(handleipc.ChannelBroken, match="exited with code 7"):
            async for message, _ in child:
                received.append(message)
        assert received == [*range(1000), "last"]


async def test_node_child_exits_with_unread_messages(node: str, program: Program) -> None:
    """A child that exits without reading ends the channel: no hang, and a clear error at send."""
    async with spawned(node, program("child.js", "process.send('up'); process.exit(0);")) as child:
        for n in range(10):
            child.send_nowait([n, "x" * 100_000])
        received = [message async for message, _ in child]
        assert received in ([], ["up"])  # Node's exit may lose it
        assert await child.wait() == 0
        with pytest.raises(handleipc.ChannelBroken):
            await child.send("late")


def test_python_child_exits_with_unread_messages(
    node: str, program: Program, child_loop: str
) -> None:
    """A Python child that does not read what Node sent exits at once; Node sees a plain end."""
    javascript = (
        SHOW_EVENTS
        + """
        child.on('message', (message) => show(message));
        child.on('error', () => {});
        for (let i = 0; i < 100; i++) child.send([i, 'x'.repeat(10000)]);
    """
    )
    python = """
        async def main(parent):
            await parent.send("bye")
    """
    assert under_node(node, program, javascript, python) == [
        "bye",
        ["disconnect", False],
        ["exit", 0, None],
        ["close", 0, None],
    ]


# -- the order of the end ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code", "sig"),
    [
        ("process.disconnect();", 0, None),
        ("process.exit(3);", 3, None),
        ("process.kill(process.pid, 'SIGKILL');", None, signal.SIGKILL),
        ("process.exitCode = 1; process.send('up');", 1, None),
    ],
    ids=["disconnects", "exits", "killed", "ends"],
)
async def test_node_child_ends(
    node: str, program: Program, text: str, code: int | None, sig: int | None
) -> None:
    """However a Node child ends: disconnect, exit, close, each once."""
    async with spawned(node, program("child.js", text)) as child:
        events = collect_events(child)
        await closed(child)
        # A crash; Node's own end, with its loop empty, closes the channel first.
        crashed = pytest.raises(handleipc.ChannelBroken, match="exited with code 3|signal 9")
        with crashed if sig or code == 3 else contextlib.nullcontext():
            async for _ in child:
                pass
        await child.wait()
    assert events == [["disconnect", False], ["exit", code, sig], ["close", code, sig]]
    assert (child.exit_code, child.signal) == (code, sig)


async def test_disconnect_from_a_node_child(node: str, program: Program) -> None:
    """After ``disconnect`` here, the three events come too: Node itself forgets "close"."""
    text = "process.on('message', () => {}); process.on('disconnect', () => process.exit(4));"
    async with spawned(node, program("child.js", text)) as child:
        events = collect_events(child)
        await child.send("up")
        child.disconnect()
        child.disconnect()
        assert not child.connected
        assert events == [], "asynchronously"
        await closed(child)
    assert events == [["disconnect", False], ["exit", 4, None], ["close", 4, None]]


@pytest.mark.parametrize("how", ["returns", "disconnects", "exits", "killed"])
def test_python_child_ends(node: str, program: Program, child_loop: str, how: str) -> None:
    """However a Python child ends, Node sees disconnect, exit, close, each once."""
    python = """
        async def main(parent):
            match sys.argv[1]:
                case "disconnects": parent.disconnect()
                case "exits": os._exit(3)
                case "killed": os.kill(os.getpid(), 9)
    """
    code, sig = {"exits": (3, None), "killed": (None, "SIGKILL")}.get(how, (0, None))
    assert under_node(node, program, SHOW_EVENTS, python, how) == [
        ["disconnect", False],
        ["exit", code, sig],
        ["close", code, sig],
    ]


def test_node_parent_disconnects(node: str, program: Program, child_loop: str) -> None:
    """When Node disconnects, a Python child sees "disconnect" once, and its iteration ends."""
    javascript = "child.send('last'); child.disconnect(); child.on('exit', (code) => show(code));"
    python = """
        async def main(parent):
            events = []
            parent.on("disconnect", lambda: events.append(parent.connected))
            assert [m async for m, _ in parent] == ["last"]
            await parent.wait_disconnected()
            await asyncio.sleep(0)
            parent.disconnect()
            await asyncio.sleep(0)
            assert events == [False], events
    """
    assert under_node(node, program, javascript, python) == [0]


# -- floods --------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_both_send_before_reading_over_node(node: str, program: Program) -> None:
    """A Python parent and its Node child both send 50,000 messages before they read any."""
    text = f"""
        for (let i = 0; i < {MANY}; i++) process.send(i);
        let next = 0;
        process.on('message', (message) => {{
          if (message !== next++) process.exit(9);
          if (next === {MANY}) process.send('all', () => process.disconnect());
        }});
    """
    async with spawned(node, program("child.js", text)) as child:
        for n in range(MANY):
            await child.send(n)
        assert [message async for message, _ in child] == [*range(MANY), "all"]
        assert await child.wait() == 0


@pytest.mark.slow
def test_both_send_before_reading_under_node(node: str, program: Program, child_loop: str) -> None:
    """A Node parent and its Python child both send 50,000 messages before they read any."""
    javascript = f"""
        for (let i = 0; i < {MANY}; i++) child.send(i);
        let next = 0;
        child.on('message', (message) => {{
          if (message === 'all') {{ show(next); return child.disconnect(); }}
          if (message !== next++) {{ show(['not', next, message]); child.kill(); }}
        }});
    """
    python = f"""
        async def main(parent):
            for n in range({MANY}):
                await parent.send(n)
            for n in range({MANY}):
                assert await parent.recv() == (n, None)
            await parent.send("all")
            assert [m async for m, _ in parent] == []
    """
    assert under_node(node, program, javascript, python) == [MANY]


# -- retries -------------------------------------------------------------------------------------


def test_node_retries_after_our_nack(node: str, program: Program, child_loop: str) -> None:
    """Without a free descriptor a handle is refused late enough for one of Node's retries to work."""
    javascript = """
        process.on('warning', (warning) => show(String(warning)));
        const server = net.createServer({ pauseOnConnect: true }).listen(0, '127.0.0.1', () => {
          child.once('message', () => {
            server.once('connection', (socket) => { server.close(); child.send('retried', socket); });
            const client = net.connect(server.address());
            client.on('data', (data) => show(String(data)));
            client.on('end', () => { client.destroy(); child.disconnect(); });
          });
        });
        child.on('exit', (code) => show(code));
    """
    python = """
        import resource

        async def main(parent):
            logging.getLogger("handleipc").addHandler(logging.NullHandler())
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
            taken = []
            try:
                while True:
                    taken.append(os.dup(2))
            except OSError:
                pass
            await parent.send("full")
            def relent():
                while taken:
                    os.close(taken.pop())
            # Before or after the handle has come, all is well; likely after.
            asyncio.get_running_loop().call_later(0.3, relent)
            message, connection = await parent.recv()
            assert message == "retried", message
            with connection.socket() as sock:
                sock.sendall(b"served")
            assert [m async for m, _ in parent] == []
            del sock, connection
    """
    assert under_node(node, program, javascript, python) == ["served", 0]


# -- where the channel is, and what else is counted ------------------------------------------------


@pytest.mark.parametrize("slot", [0, 1, 3, 5, 17])
async def test_slot_of_a_node_child(node: str, program: Program, slot: int) -> None:
    """A Node child takes its channel at any number."""
    text = "process.send(process.channel.fd); process.on('message', (m) => process.send(m));"
    async with spawned(node, program("child.js", text), channel_fd=slot) as child:
        assert await child.recv() == (slot, None)
        await child.send("echo")
        assert await child.recv() == ("echo", None)
        child.disconnect()
        assert await child.wait() == 0


@pytest.mark.parametrize("slot", [0, 1, 3, 5, 17])
def test_slot_of_a_python_child(node: str, program: Program, child_loop: str, slot: int) -> None:
    """A Python child takes its channel at any number."""
    javascript = f"""
        child.kill('SIGKILL'); // this one is not needed
        const stdio = Array(18).fill('ignore');
        stdio[2] = 'inherit';
        stdio[{slot}] = 'ipc';
        const other = require('child_process').spawn(argv[0], argv.slice(1), {{ stdio }});
        other.on('message', (m) => {{ show(m); other.disconnect(); }});
        other.on('exit', (code) => show(code));
    """
    python = """
        async def main(parent):
            await parent.send("up")
            assert [m async for m, _ in parent] == []
    """
    assert under_node(node, program, javascript, python) == ["up", 0]


async def test_close_waits_for_piped_stdio(node: str, program: Program) -> None:
    """With piped stdio, "close" comes after the pipes have ended, once, on every loop."""
    text = "process.stdout.write('out'); process.stderr.write('err'); process.disconnect();"
    pipe = asyncio.subprocess.PIPE
    async with spawned(node, program("child.js", text), stdout=pipe, stderr=pipe) as child:
        events = collect_events(child)
        end = asyncio.create_task(closed(child))
        assert child.stdout is not None and child.stderr is not None
        assert (await child.stdout.read(), await child.stderr.read()) == (b"out", b"err")
        await end
    assert events == [["disconnect", False], ["exit", 0, None], ["close", 0, None]]


def test_node_counts_the_connections_we_hold(node: str, program: Program, child_loop: str) -> None:
    """``server.getConnections`` and ``server.close`` of a Node parent count what a child holds."""
    javascript = """
        const server = net.createServer({ pauseOnConnect: true }).listen(0, '127.0.0.1', () => {
          for (let i = 0; i < 3; i++) net.connect(server.address()).resume();
        });
        let sent = 0;
        server.on('connection', (socket) => child.send(++sent, socket));
        child.on('message', (held) => {
          server.getConnections((error, count) => {
            show([held, error, count]);
            if (held === 1) server.close(() => { show('closed'); child.disconnect(); });
            child.send('less');
          });
        });
    """
    python = """
        async def main(parent):
            held = [(await parent.recv())[1] for _ in range(3)]
            while held:
                await parent.send(len(held))
                assert await parent.recv() == ("less", None)
                held.pop().close()
            assert [m async for m, _ in parent] == []
    """
    lines = under_node(node, program, javascript, python)
    assert lines == [[3, None, 3], [2, None, 2], [1, None, 1], "closed"]


async def test_refused_descriptors_of_a_node_child(node: str, program: Program) -> None:
    """With ``accept_handles=False`` messages come, and no descriptor of the child is ever taken.

    Where the kernel refuses, Node cannot tell, and waits for an answer for ever: so this one exits.
    """
    text = """
        process.on('message', (message) => {
          process.send(message);
          const server = require('net').createServer().listen(0, '127.0.0.1', () => {
            process.send('handle', server, () => process.exit(0));
          });
        });
    """
    async with spawned(node, program("child.js", text), accept_handles=False) as child:
        child.on("error", lambda error: None)
        await child.send("echo")
        assert [received async for received in child] == [("echo", None)]
        assert await child.wait() == 0
