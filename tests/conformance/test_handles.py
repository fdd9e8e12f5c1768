"""Handles of each kind, in every role."""

from __future__ import annotations

import asyncio
import socket
import weakref

import handleipc
from tests.conformance.peers import (
    clients,
    connect,
    connection,
    goodbye,
    readable,
    receive,
    receive_all,
)
from tests.conformance.record import also, node_test


@node_test(
    "test-child-process-fork-net-socket",
    expects="the child writes 'echo' to an accepted socket it got; client and server close",
    ours="the same, in both roles",
    why="the plain use",
)
async def test_one_socket(peer) -> None:
    """Accepted here, answered there."""
    javascript = "process.on('message', (m, socket) => { assert(socket); socket.end('echo'); });"
    python = """
        async def main(parent):
            async for message, connection in parent:
                await connection.end(b"echo")
    """
    async with peer(javascript, python) as child:
        server = await handleipc.listen("127.0.0.1", 0)
        with await connect(server.sockname) as client:
            accepted = await anext(server)
            await child.send("socket", accepted)
            assert accepted.closed
            assert await receive_all(client) == b"echo"
        server.close()
        await asyncio.wait_for(server.wait_closed(), 10)
        await goodbye(child)


@also("test-child-process-fork-net-socket")
def test_one_socket_under_node(under_node) -> None:
    """Accepted by Node, answered by Python."""
    javascript = """
        const child = fork();
        const server = net.createServer((socket) => {
          child.send('socket', socket);
          server.close(() => { show('closed'); child.disconnect(); });
        }).listen(0, '127.0.0.1', () => {
          net.connect(server.address()).on('data', (data) => show(String(data)));
        });
    """
    python = """
        async def main(parent):
            async for message, connection in parent:
                await connection.end(b"echo")
    """
    assert under_node(javascript, python) == ["echo", "closed"]


SERVE = """
    process.on('message', (message, server) => {
      if (!server) return held.close(() => process.send('closed'));
      held = server;
      server.on('connection', (socket) => { socket.end('child'); process.send('accepted'); });
      process.send('up');
    });
    let held;
"""
PYTHON_SERVE = """
    async def serve(parent, server):
        async for connection in server:
            await connection.end(b"child")
            await parent.send("accepted")

    async def main(parent):
        async for message, handle in parent:
            if handle is not None:
                held, serving = handle, asyncio.create_task(serve(parent, handle))
                await parent.send("up")
            else:
                held.close()
                await serving
                await held.wait_closed()
                await parent.send("closed")
"""


@node_test(
    "test-child-process-fork-net-server",
    expects="a server is passed; both processes accept; closing it in each emits 'close'",
    ours="the same, in both roles",
    why="both have a descriptor of one listening socket",
)
async def test_one_server(peer) -> None:
    """Both ends accept until each has closed its own."""
    async with peer(SERVE, PYTHON_SERVE) as child:
        server = await handleipc.listen("127.0.0.1", 0)
        await child.send("server", server)
        assert await child.recv() == ("up", None)
        assert not server.closed
        # Who accepts is the kernel's choice; the parent does only while it asks for one.
        async with clients(server.sockname, 1) as (client,):
            assert await receive_all(client) == b"child"
            assert await child.recv() == ("accepted", None)
        await child.send("close")
        assert await child.recv() == ("closed", None)
        async with clients(server.sockname, 1) as (client,):
            await (await anext(server)).end(b"parent")
            assert await receive_all(client) == b"parent"
        server.close()
        await asyncio.wait_for(server.wait_closed(), 10)
        await goodbye(child)


@also("test-child-process-fork-net-server")
def test_one_server_under_node(under_node) -> None:
    """A Python child accepts on a Node parent's server, then closes it."""
    javascript = """
        const child = fork();
        const ask = (done) => {
          let got = '';
          net.connect(server.address())
            .on('data', (data) => got += data)
            .on('end', () => { show(got); done && done(); });
        };
        let accepts = false;
        const server = net.createServer((socket) => socket.end('parent'))
          .listen(0, '127.0.0.1', () => child.send('server', server));
        child.on('message', (message) => {
          if (message === 'up') child.send('close');
          if (message === 'closed') ask(() => server.close(() => {
            show('closed');
            child.disconnect();
          }));
        });
    """
    assert under_node(javascript, PYTHON_SERVE) == ["parent", "closed"]


@also("test-child-process-fork-net-server")
def test_transferred_server_under_node(under_node) -> None:
    """When the Node parent closes its own, the Python child is the one who accepts."""
    javascript = """
        const child = fork();
        const server = net.createServer().listen(0, '127.0.0.1', () => child.send('server', server));
        child.once('message', () => {
          const address = server.address();
          server.close(() => net.connect(address)
            .on('data', (data) => show(String(data)))
            .on('close', () => child.send('close')));
          child.on('message', (m) => { show(m); if (m === 'closed') child.disconnect(); });
        });
    """
    assert sorted(under_node(javascript, PYTHON_SERVE)) == ["accepted", "child", "closed"]


@node_test(
    "test-child-process-fork-dgram",
    expects="a UDP socket is passed; parent and child both receive datagrams",
    ours="the same, in both roles",
    why="the sender's copy stays open; each datagram goes to whoever reads first",
)
async def test_udp(peer) -> None:
    """Datagrams are read at both ends of one socket."""
    javascript = """
        process.on('message', (m, socket) => {
          socket.on('message', (data) => {
            process.send(String(data));
            socket.close();
          });
          process.send('up');
        });
    """
    python = """
        async def main(parent):
            message, sock = await parent.recv()
            loop, ready = asyncio.get_running_loop(), asyncio.Event()
            loop.add_reader(sock.fileno(), ready.set)
            await parent.send("up")
            await ready.wait()
            await parent.send(sock.recv(100).decode())
            loop.remove_reader(sock.fileno())
            sock.close()
            async for message in parent:
                pass
    """
    with (
        socket.socket(type=socket.SOCK_DGRAM) as udp,
        socket.socket(type=socket.SOCK_DGRAM) as client,
    ):
        udp.bind(("127.0.0.1", 0))
        client.connect(udp.getsockname())
        async with peer(javascript, python) as child:
            await child.send("socket", udp)
            assert await child.recv() == ("up", None)
            client.send(b"to the child")
            assert await child.recv() == ("to the child", None)
            client.send(b"to the parent")
            await readable(udp)
            assert udp.recv(100) == b"to the parent"
            await goodbye(child)


@also("test-child-process-fork-dgram")
def test_udp_under_node(under_node) -> None:
    """A Node parent's socket, read by a Python child until that closes it, then by the parent."""
    javascript = """
        const child = fork();
        const dgram = require('dgram');
        const server = dgram.createSocket('udp4');
        const client = dgram.createSocket('udp4');
        const say = (text) => client.send(text, server.address().port, '127.0.0.1');
        let total = 0;
        const count = () => {
          if (++total < 20) return setImmediate(say, 'again');
          show('all'); server.close(); client.close(); child.disconnect();
        };
        server.on('message', count);
        child.on('message', (m) => m === 'up' ? say('first') : count());
        server.bind(0, '127.0.0.1', () => child.send('socket', server));
    """
    python = """
        async def main(parent):
            message, sock = await parent.recv()
            def read():
                try:
                    parent.send_nowait(sock.recv(100).decode())
                except BlockingIOError:
                    pass
            loop = asyncio.get_running_loop()
            loop.add_reader(sock.fileno(), read)
            await parent.send("up")
            async for message in parent:
                pass
            loop.remove_reader(sock.fileno())
            sock.close()
    """
    assert under_node(javascript, python) == ["all"]


@node_test(
    "test-child-process-send-keep-open",
    expects="with `keepOpen` the child writes to the socket, then the parent does; both arrive",
    ours="the same with `keep_open=True`, in both roles",
    why="nothing is closed at the acknowledgement",
)
async def test_keep_open(peer) -> None:
    """Both processes write to one connection."""
    javascript = """
        process.on('message', (m, socket) => {
          socket.write('child ', () => { process.send('written'); socket.destroy(); });
        });
    """
    python = """
        async def main(parent):
            async for message, connection in parent:
                with connection.socket() as sock:
                    sock.send(b"child ")
                await parent.send("written")
    """
    async with peer(javascript, python) as child, connection() as (client, accepted):
        await child.send("socket", accepted, keep_open=True)
        assert not accepted.closed
        assert await child.recv() == ("written", None)
        with accepted.socket() as sock:
            sock.send(b"parent")
            assert (await receive(client, 6), await receive(client)) == (b"child ", b"parent")
        await goodbye(child)


@also("test-child-process-send-keep-open")
def test_keep_open_under_node(under_node) -> None:
    """A Node parent keeps what it sends to a Python child."""
    javascript = """
        const child = fork();
        const server = net.createServer((socket) => {
          child.send('socket', socket, { keepOpen: true });
          child.on('message', () => socket.end('parent'));
          server.close();
        }).listen(0, '127.0.0.1', () => {
          let got = '';
          net.connect(server.address())
            .on('data', (data) => got += data)
            .on('end', () => { show(got); child.disconnect(); });
        });
    """
    python = """
        async def main(parent):
            async for message, connection in parent:
                with connection.socket() as sock:
                    sock.send(b"child ")
                await parent.send("written")
    """
    assert under_node(javascript, python) == ["child parent"]


@node_test(
    "test-child-process-recv-handle",
    expects="of three messages that arrive together only the middle one has a handle",
    ours="the same, in both roles",
    why="a descriptor belongs to its envelope, not to what is read with it",
)
async def test_handle_of_the_middle_message(peer) -> None:
    """one, two with a server, three."""
    javascript = """
        const server = net.createServer().listen(0, '127.0.0.1', () => {
          process.send('one');
          process.send('two', server, () => server.close());
          process.send('three');
        });
        process.on('message', () => {});  // or it would end before the handle has been taken
    """
    python = """
        async def main(parent):
            server = await handleipc.listen("127.0.0.1", 0)
            parent.send_nowait("one")
            parent.send_nowait("two", server)
            parent.send_nowait("three")
            await parent.flush()
            server.close()
    """
    async with peer(javascript, python) as child:
        got = [(message, type(handle)) for message, handle in [await child.recv()]]
        message, server = await child.recv()
        async with server:
            got += [(message, type(server))]
            got += [(message, type(handle)) for message, handle in [await child.recv()]]
            none = type(None)
            assert got == [("one", none), ("two", handleipc.Server), ("three", none)]
        await goodbye(child)


@also("test-child-process-recv-handle")
def test_handle_of_the_middle_message_under_node(under_node) -> None:
    """Node sends the three before the Python child reads."""
    javascript = """
        const child = fork();
        const server = net.createServer().listen(0, '127.0.0.1', () => {
          child.send('one');
          child.send('two', server, () => server.close());
          child.send('three');
        });
        child.on('message', show);
    """
    python = """
        async def main(parent):
            for _ in range(3):
                message, handle = await parent.recv()
                await parent.send([message, handle is not None])
                if handle is not None:
                    handle.close()
    """
    assert under_node(javascript, python) == [["one", False], ["two", True], ["three", False]]


@node_test(
    "test-child-process-http-socket-leak",
    expects="after an http socket was sent, the sender keeps no timer, parser or message of it; the"
    " child answers the request",
    ours="the child answers the request that nobody has read; after the acknowledgement nothing of the"
    " sender's socket is kept",
    why="a connection travels before its first byte is read, so there is no parser to release",
)
async def test_http_socket(peer) -> None:
    """The request is read and answered by the child, and the sender forgets its objects."""
    javascript = """
        const http = require('http').createServer((request, response) => response.end(request.url));
        process.on('message', (m, socket) => http.emit('connection', socket));
    """
    python = """
        async def main(parent):
            async for message, connection in parent:
                reader, writer = await connection.open()
                url = (await reader.readuntil(b"\\r\\n\\r\\n")).split()[1]
                writer.write(b"HTTP/1.1 200 OK\\r\\nConnection: close\\r\\n\\r\\n" + url)
                await writer.drain()
                writer.close()
                await writer.wait_closed()
    """
    async with peer(javascript, python) as child, connection() as (client, accepted):
        client.send(b"GET /path HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        sock = accepted.socket()
        kept = weakref.ref(sock)
        await child.send("request", sock)
        assert sock.fileno() < 0
        del sock
        assert b"/path" in await receive_all(client)
        assert kept() is None
        await goodbye(child)


@also("test-child-process-http-socket-leak")
def test_http_socket_under_node(under_node) -> None:
    """A Node http server hands the socket of a request to a Python child, who answers it."""
    javascript = """
        const http = require('http');
        const child = fork();
        const server = http.createServer((request, response) => {
          const { socket } = request;
          child.send(request.url, socket, () => {
            assert.strictEqual(socket.timeout, 0);
            server.unref();  // close() would crash in Node 20 and 22
          });
        }).listen(0, '127.0.0.1', () => http.get({ port: server.address().port, path: '/path' }, (r) =>
          r.on('data', (data) => show(String(data))).on('end', () => child.disconnect())));
    """
    python = """
        async def main(parent):
            async for url, connection in parent:
                await connection.end(b"HTTP/1.1 200 OK\\r\\nConnection: close\\r\\n\\r\\n" + url.encode())
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                await task
    """
    assert under_node(javascript, python) == ["/path"]


@node_test(
    "sequential/test-child-process-pass-fd",
    expects="80 children each send a connected socket to the parent; every one arrives usable",
    ours="the same, with ten sockets from each of eight children, Node's and Python's",
    why="the sender's copy is closed at the acknowledgement, never before",
)
async def test_sockets_from_children(peer) -> None:
    """Children connect, and the parent writes over what they send."""
    javascript = """
        for (let n = 0; n < 10; n++) {
          const socket = net.connect(Number(process.argv[2]), '127.0.0.1', () => process.send('s', socket));
        }
        process.on('message', () => {});
    """
    python = """
        async def main(parent):
            for n in range(10):
                sock = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
                parent.send_nowait("s", sock)
            async for message in parent:
                pass
    """
    server = await handleipc.listen("127.0.0.1", 0)
    port = str(server.sockname[1])

    async def one() -> None:
        async with peer(javascript, python, port) as child:
            for _ in range(10):
                message, sent = await child.recv()
                await sent.end(b"hello")
                accepted = await anext(server)
                with accepted.socket() as sock:
                    assert await receive_all(sock) == b"hello"
            await goodbye(child)

    for _ in range(2):
        await one()
    server.close()


@node_test(
    "sequential/test-cluster-send-handle-large-payload",
    expects="a message of 800 KB with a socket goes there and back, and the handle is still attached",
    ours="the same, in both roles",
    why="descriptors are paired with envelopes by their place in the stream",
)
async def test_large_payload(peer) -> None:
    """The socket is found again after many reads."""
    javascript = "process.on('message', (m, socket) => process.send(m, socket));"
    python = """
        async def main(parent):
            async for message, connection in parent:
                await parent.send(message, connection)
    """
    payload = "a" * 800_000
    async with peer(javascript, python) as child, connection() as (client, accepted):
        await child.send(payload, accepted)
        message, returned = await child.recv()
        assert message == payload
        await returned.end(b"hello")
        assert await receive_all(client) == b"hello"
        client.close()
        await goodbye(child)


@also("sequential/test-cluster-send-handle-large-payload")
def test_large_payload_under_node(under_node) -> None:
    """A Node parent sends, a Python child sends back."""
    javascript = """
        const child = fork();
        const payload = 'a'.repeat(800000);
        const server = net.createServer({ pauseOnConnect: true }, (socket) => {
          child.send({ payload }, socket);
          server.close();
        }).listen(0, '127.0.0.1', () => net.connect(server.address()).resume());
        child.on('message', (m, socket) => {
          show([m.payload === payload, socket instanceof net.Socket]);
          socket.destroy();
          child.disconnect();
        });
    """
    python = """
        async def main(parent):
            async for message, connection in parent:
                await parent.send(message, connection)
    """
    assert under_node(javascript, python) == [[True, True]]
