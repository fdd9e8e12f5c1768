"""Three processes in a row: a channel belongs to the child it was made for, and to nobody else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


import handleipc
from tests.interop.children import spawned


HERE = Path(__file__).parent

Program = Callable[[str, str], Path]

# Prints the variables of a channel that it was born with: a process that adopts a channel deletes
# them from its environment, but not from here.
BORN_WITH = """
    import sys
    for pair in open("/proc/self/environ").read().split("\\0"):
        if pair.startswith(("NODE_CHANNEL", "HANDLEIPC")):
            print(pair)
"""

MIDDLE = """
    import asyncio, os, sys
    sys.path.insert(0, sys.argv[1])
    import handleipc
    from child import run

    async def plain(*argv):
        process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
        output, _ = await process.communicate()
        return output.decode()

    async def main(parent):
        node, grandchild, born_with = sys.argv[2:]
        leaked = [name for name in os.environ if name.startswith(("NODE_CHANNEL", "HANDLEIPC"))]
        assert leaked == [], leaked
        child = await handleipc.spawn(node, grandchild)
        await parent.send({"from": "middle", "plain": await plain(sys.executable, born_with)})
        # Up and down, each with its own words and its own handle.
        async for message, handle in parent:
            await child.send({"by": "middle", **message}, handle)
            answer, handle = await child.recv()
            await parent.send({"through": "middle", **answer}, handle)
            if message["last"]:
                break
        child.disconnect()
        assert await child.wait() == 0
        await child.wait_disconnected()
        assert (child.dialect, parent.dialect) == ("node", "node")

    run(main)
"""

GRANDCHILD = """
    process.on('message', (message, socket) => {
      if (socket) return process.send({ echo: message }, socket);
      process.send({ echo: message });
    });
"""

NODE_PARENT = """
    const assert = require('assert');
    const net = require('net');
    const child_process = require('child_process');
    const { nextMessage, once } = require(process.argv[2]);

    async function main() {
      const child = child_process.spawn(process.argv[3], process.argv.slice(4),
                                        { stdio: [0, 1, 2, 'ipc'] });
      child.on('exit', (code, signal) => { process.exitCode = signal ? 99 : code; });
      const first = await nextMessage(child);
      assert.deepStrictEqual(first, [{ from: 'middle', plain: '' }, undefined]);
      child.send({ last: false, text: 'hello' });
      const [message, none] = await nextMessage(child);
      const echo = { by: 'middle', last: false, text: 'hello' };
      assert.deepStrictEqual(message, { through: 'middle', echo });
      assert.strictEqual(none, undefined);

      const server = net.createServer({ pauseOnConnect: true }).listen(0, '127.0.0.1');
      await once(server, 'listening');
      const client = net.connect(server.address());
      const [socket] = await once(server, 'connection');
      server.close();
      child.send({ last: true }, socket);
      const [, returned] = await nextMessage(child);
      returned.end('around');
      let data = '';
      client.on('data', (chunk) => { data += chunk; });
      await once(client, 'end');
      assert.strictEqual(data, 'around');
    }
    main();
"""


def test_python_between_two_nodes(node: str, program: Program, child_loop: str) -> None:
    """Node, Python and Node talk in a row, and a process without a channel inherits no trace."""
    middle = program("middle.py", MIDDLE)
    grandchild = program("grandchild.js", GRANDCHILD)
    born_with = program("born_with.py", BORN_WITH)
    parent = program("parent.js", NODE_PARENT)
    run = subprocess.run(
        [
            *(node, parent, HERE / "harness.js"),
            *(sys.executable, "-W", "error", middle, HERE, node, grandchild, born_with),
        ],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


NODE_MIDDLE = """
    const child_process = require('child_process');
    const [python, grandchild, directory] = process.argv.slice(2);
    const child = child_process.spawn(python, [grandchild, directory], { stdio: [0, 1, 2, 'ipc'] });
    const servers = []; // a server that is sent stays open here
    child.on('message', (message, server) => {
      if (server) servers.push(server);
      process.send({ through: message }, server);
    });
    process.on('message', (message, server) => {
      servers.push(server);
      child.send({ by: 'middle', ...message }, server);
    });
    process.on('disconnect', () => {
      child.disconnect();
      for (const server of servers) server.close();
    });
    child.on('exit', (code, signal) => { process.exitCode = signal ? 99 : code; });
"""

PYTHON_GRANDCHILD = """
    import os, sys
    # Node hands on what it does not know: the invitation to another process's channel.
    invitation = os.environ.get("HANDLEIPC_CHANNEL")
    sys.path.insert(0, sys.argv[1])
    from child import run

    async def main(parent):
        leaked = [name for name in os.environ if name.startswith(("NODE_CHANNEL", "HANDLEIPC"))]
        await parent.send({"invited": invitation is not None, "leaked": leaked})
        async for message, handle in parent:
            await parent.send({"echo": message, "dialect": parent.dialect}, handle)

    run(main)
"""


async def test_node_between_two_pythons(node: str, program: Program, child_loop: str) -> None:
    """A Python grandchild under Node inherits the invitation of its parent, and ignores it."""
    grandchild = program("grandchild.py", PYTHON_GRANDCHILD)
    middle = program("middle.js", NODE_MIDDLE)
    async with spawned(node, middle, sys.executable, grandchild, HERE) as child:
        said, _ = await child.recv()
        assert said == {"through": {"invited": True, "leaked": []}}
        async with handleipc.listen("127.0.0.1", 0) as server:
            await child.send({"n": 1}, server)
            message, returned = await child.recv()
        echo = {"by": "middle", "n": 1}
        assert message == {"through": {"echo": echo, "dialect": "node"}}
        async with returned:
            assert returned.sockname == server.sockname
        assert child.dialect == "node"
        child.disconnect()
        assert await child.wait() == 0
