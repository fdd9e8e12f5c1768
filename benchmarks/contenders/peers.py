"""What a Python user would pick instead: ``python peers.py CONTENDER N``."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import multiprocessing.reduction
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import orjson

from benchmarks.contenders.common import ANSWER, Answer, connection, message, report, run


def in_two_processes(
    child: Callable[[Any, int], None], parent: Callable[[Any, int], None], ends: Any, n: int
) -> None:
    """Fork, let the child warm up, and time the parent until the child says that it is done."""
    ready, done = os.pipe(), os.pipe()
    if os.fork() == 0:
        code = 1
        try:
            ends[0].close()
            os.write(ready[1], b"x")
            child(ends[1], n)
            os.write(done[1], b"x")
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    # The only copies are the child's from here on: if it fails, a read and a write end.
    os.close(ready[1])
    os.close(done[1])
    ends[1].close()
    os.read(ready[0], 1)
    begin = time.perf_counter()
    parent(ends[0], n)
    if not os.read(done[0], 1):
        raise SystemExit("the other process failed")
    report(n, time.perf_counter() - begin)
    os.wait()


# -- handles ---------------------------------------------------------------------------------------


def send_fds(sock: socket.socket, n: int) -> None:
    """socket.send_fds with a line of JSON."""
    fd = connection().detach()
    for i in range(n):
        socket.send_fds(sock, [json.dumps(message(i, n)).encode() + b"\n"], [fd])


def recv_fds(sock: socket.socket, n: int) -> None:
    """The other end, which makes sockets and closes them."""
    count, rest = 0, b""
    while count < n:
        data, fds, _, _ = socket.recv_fds(sock, 65536, 16)
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            json.loads(line)
        for fd in fds:
            socket.socket(fileno=fd).close()
            count += 1


def send_handle(pipe: Any, n: int) -> None:
    """multiprocessing.reduction.send_handle, which carries no message."""
    fd = connection().detach()
    for _ in range(n):
        multiprocessing.reduction.send_handle(pipe, fd, os.getppid())


def recv_handle(pipe: Any, n: int) -> None:
    """The other end."""
    for _ in range(n):
        os.close(multiprocessing.reduction.recv_handle(pipe))


def send_pickled(pipe: Any, n: int) -> None:
    """A socket through Connection.send, with a message."""
    sock = connection()
    for i in range(n):
        pipe.send((message(i, n), sock))


def recv_pickled(pipe: Any, n: int) -> None:
    """The other end."""
    for _ in range(n):
        pipe.recv()[1].close()


def anyio_send(sock: socket.socket, n: int) -> None:
    """Anyio's UNIXSocketStream.send_fds, with a line of JSON."""
    import anyio
    from anyio.abc import UNIXSocketStream

    async def main() -> None:
        sock.setblocking(False)
        fd = connection().detach()
        async with await UNIXSocketStream.from_socket(sock) as stream:
            for i in range(n):
                await stream.send_fds(json.dumps(message(i, n)).encode() + b"\n", [fd])
            await anyio.lowlevel.checkpoint()

    anyio.run(main)


def anyio_receive(sock: socket.socket, n: int) -> None:
    """The other end."""
    import anyio
    from anyio.abc import UNIXSocketStream

    async def main() -> None:
        sock.setblocking(False)
        count, rest = 0, b""
        async with await UNIXSocketStream.from_socket(sock) as stream:
            while count < n:
                data, fds = await stream.receive_fds(65536, 16)
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    json.loads(line)
                for fd in fds:
                    socket.socket(fileno=fd).close()
                    count += 1

    anyio.run(main)


# The least that Python can do: the same libraries and batches as handleipc, blocking sockets, no
# event loop, no acknowledgement, nothing kept, nothing checked. What is between this and handleipc
# is what its promises cost.

SET = 64


class Line(msgspec.Struct, array_like=True, gc=False):
    """``[sequence,message]``."""

    sequence: int
    message: Any


class Owner:
    """An object that owns a descriptor."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Close it."""
        os.close(self.fd)


def sketch_send(sock: socket.socket, n: int) -> None:
    """Sets of 64 handles, in the C core's own call, which does not wait."""
    import select

    from handleipc.wire.syscalls import Refused, send_with_fds

    fd, number = connection().detach(), sock.fileno()
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    lines = []
    for i in range(n):
        lines.append(b"[%d,%b]\n" % (i, orjson.dumps(message(i, n))))
        if len(lines) == SET or i == n - 1:
            data = b"".join(lines)
            sent = 0
            while sent < len(data):
                written = send_with_fds(number, data, sent, [] if sent else [fd] * len(lines))
                if isinstance(written, Refused):
                    poll.poll()
                else:
                    sent += written
            lines.clear()


def sketch_receive(sock: socket.socket, n: int) -> None:
    """The other end: a typed decoder and the smallest object there is."""
    import select

    from handleipc.wire.framing import LineFramer
    from handleipc.wire.syscalls import Receiver

    sock.setblocking(False)
    decode = msgspec.json.Decoder(Line).decode_lines
    owners: deque[Owner] = deque()
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    receiver, count = Receiver(LineFramer(1 << 20)), 0
    while count < n:
        poll.poll()
        batch = receiver.receive(sock.fileno())
        if receiver.at_eof:
            raise SystemExit("the other process failed")
        if not batch.ends:
            continue
        lines = decode(batch.view[batch.start : batch.ends[-1]])
        owners += [Owner(fd) for one in batch.sets for fd in one.fds]
        for line in lines:
            assert line.message["of"] == n
            owners.popleft().close()
        count += len(lines)


def plain_sketch_send(sock: socket.socket, n: int) -> None:
    """The same without descriptors: lines of JSON in blocks of 64 KiB."""
    lines, size = [], 0
    for i in range(n):
        line = orjson.dumps(message(i, n))
        lines.append(line)
        size += len(line) + 1
        if size > 65536 or i == n - 1:
            sock.sendall(b"\n".join(lines) + b"\n")
            lines, size = [], 0


def plain_sketch_receive(sock: socket.socket, n: int) -> None:
    """The other end."""
    decode = msgspec.json.Decoder().decode_lines
    count, rest = 0, b""
    while count < n:
        data = rest + sock.recv(262_144)
        end = data.rfind(b"\n") + 1
        rest = data[end:]
        count += len(decode(data[:end]))


# -- messages --------------------------------------------------------------------------------------


def pipe_send(pipe: Any, n: int) -> None:
    """multiprocessing.Connection.send, which pickles."""
    for i in range(n):
        pipe.send(message(i, n))


def pipe_receive(pipe: Any, n: int) -> None:
    """The other end."""
    for _ in range(n):
        pipe.recv()


def bytes_send(pipe: Any, n: int) -> None:
    """Connection.send_bytes with JSON."""
    for i in range(n):
        pipe.send_bytes(json.dumps(message(i, n)).encode())


def bytes_receive(pipe: Any, n: int) -> None:
    """The other end."""
    for _ in range(n):
        json.loads(pipe.recv_bytes())


# -- a server without any handoff ------------------------------------------------------------------


async def serve(port: int) -> None:
    """One asyncio process with a SO_REUSEPORT listener of its own."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(ANSWER)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", port, reuse_port=True, backlog=1024)
    print("ready", flush=True)
    async with server:
        await server.serve_forever()


async def serve_protocol(port: int) -> None:
    """As ``serve``, without streams."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Answer, "127.0.0.1", port, reuse_port=True, backlog=1024)
    print("ready", flush=True)
    async with server:
        await server.serve_forever()


def reuse_port(how: str, workers: int) -> None:
    """So many such processes. Until SIGTERM."""
    with socket.socket() as first:
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        first.bind(("127.0.0.1", 0))
        port = first.getsockname()[1]
        command = [sys.executable, __file__, how, str(port)]
        servers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(workers)]
        for server in servers:
            assert server.stdout is not None
            server.stdout.readline()
    print(port, flush=True)
    signal.sigwait({signal.SIGTERM})
    for server in servers:
        server.kill()
        server.wait()


def main(contender: str, n: int) -> None:
    """Run one contender."""
    match contender:
        case "send_fds":
            in_two_processes(recv_fds, send_fds, socket.socketpair(), n)
        case "send_handle":
            in_two_processes(recv_handle, send_handle, multiprocessing.Pipe(), n)
        case "pickled":
            in_two_processes(recv_pickled, send_pickled, multiprocessing.Pipe(), n)
        case "anyio":
            in_two_processes(anyio_receive, anyio_send, socket.socketpair(), n)
        case "sketch":
            in_two_processes(sketch_receive, sketch_send, socket.socketpair(), n)
        case "pipe":
            in_two_processes(pipe_receive, pipe_send, multiprocessing.Pipe(), n)
        case "bytes":
            in_two_processes(bytes_receive, bytes_send, multiprocessing.Pipe(), n)
        case "plain_sketch":
            in_two_processes(plain_sketch_receive, plain_sketch_send, socket.socketpair(), n)
        case "serve":
            run(serve(n))
        case "serve_protocol":
            run(serve_protocol(n))
        case "reuse_port" | "reuse_port_protocol":
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            reuse_port("serve" if contender == "reuse_port" else "serve_protocol", n)
        case _:
            raise SystemExit(f"no contender {contender!r}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
