"""Where Node is wrong, and handleipc is not: the channel and its handles."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest

import handleipc
from handleipc import HandleNotDelivered, Limits, Native
from tests.conformance.peers import (
    ACK,
    NACK,
    PATIENCE,
    clients,
    collect_events,
    connection,
    envelope,
    event,
    goodbye,
    python_program,
    raw_peer,
    readable,
    receive,
    receive_all,
    sockets,
    turns,
    two_ends,
)
from tests.conformance.record import also, node_bug


def works(client: socket.socket, fd: int) -> bool:
    """Say whether this descriptor is the other end of that client."""
    client.send(b"?")
    return os.read(fd, 10) == b"?"


# -- acknowledgements -----------------------------------------------------------------------------


@node_bug(
    "own; area of nodejs/node#13235",
    problem="a retry wraps the first envelope a second time; when it succeeds, the receiver acknowledges"
    " twice, and the second kills the sender with an assertion",
    ours="the original envelope is sent again; a stray acknowledgement is a warning; a wrapped retry of"
    " Node's is unwrapped and acknowledged once",
    why="a peer must not be able to end our process",
)
async def test_retry_is_the_same_line(caplog) -> None:
    """NACK, NACK, ACK: three times the same line, each with the descriptor."""
    with sockets() as (client, given):
        async with raw_peer() as (channel, raw):
            sending = asyncio.create_task(channel.send("take", given))
            lines = []
            for reply in (NACK, NACK, ACK):
                lines.append(await raw.line())
                assert works(client, raw.fds[0])
                assert raw.drop_descriptors() == 1
                raw.write(reply)
            await sending
            assert lines[0] == lines[1] == lines[2]
            with caplog.at_level(logging.CRITICAL, "handleipc"):
                raw.write(ACK, NACK, "next")
                assert await channel.recv() == ("next", None)
            assert channel.connected


@also("own; area of nodejs/node#13235")
async def test_wrapped_retry_is_acknowledged_once() -> None:
    """What Node's retransmission looks like, twice around."""
    with sockets() as (client, given):
        async with raw_peer() as (channel, raw):
            raw.write(envelope(envelope("m"), "net.Native"), fds=(given.fileno(),))
            message, received = await channel.recv()
            assert (message, type(received)) == ("m", handleipc.Connection)
            received.close()
            assert await raw.read() == ACK
            await channel.send("only one")
            assert await raw.read() == "only one"


@node_bug(
    "nodejs/help#4121",
    problem="after the fourth NACK a process warning is printed, and the socket is dropped silently",
    ours="`HandleNotDelivered` with the reason, after pauses between the tries; the socket is the"
    " caller's again",
    why="only the sender knows what to do with its client",
)
async def test_given_up_after_retries() -> None:
    """Four NACKs: the handle comes back, usable, and the next one has its own four tries."""
    with sockets() as (client, given):
        async with raw_peer() as (channel, raw):
            for _ in range(2):
                sending = asyncio.create_task(channel.send("take", given))
                for _ in range(4):
                    assert (await raw.read())["msg"] == "take"
                    raw.drop_descriptors()
                    raw.write(NACK)
                with pytest.raises(HandleNotDelivered) as caught:
                    await sending
                assert caught.value.handle is given
                assert caught.value.reason
                assert works(client, given.fileno())


@node_bug(
    "nodejs/node#3072, nodejs/node#13235",
    problem="a receiver without a free descriptor slot got an invalid handle (MSG_CTRUNC); all retries"
    " are used up in a millisecond",
    ours="the receiver answers when it has room again, and the handle arrives",
    why="EMFILE is mostly short",
)
async def test_receiver_out_of_descriptors(python_peer) -> None:
    """A child that has no slot left gets the connection when it has one."""
    python = """
        import resource

        async def main(parent):
            logging.getLogger("handleipc").addHandler(logging.NullHandler())
            parent.on("error", lambda error: None)
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (60, hard))
            taken = []
            try:
                while True:
                    taken.append(os.dup(2))
            except OSError:
                pass
            def relent():
                while taken:
                    os.close(taken.pop())
            asyncio.get_running_loop().call_later(0.1, relent)
            await parent.send("full")
            message, connection = await parent.recv()
            with connection.socket() as sock:
                sock.send(b"served")
    """
    async with python_peer("", python) as child, connection() as (client, accepted):
        assert await child.recv() == ("full", None)
        await child.send("take", accepted)
        assert await receive_all(client) == b"served"
        assert await child.wait() == 0


@node_bug(
    "own; nodejs/node#19439, nodejs/node#19566, nodejs/node#21746, nodejs/node#21940, nodejs/node#3551,"
    " node-v0.x-archive#8792",
    problem="a peer that dies with a handle not acknowledged: no 'disconnect', no callback, the"
    " descriptor leaks, the client hangs",
    ours="every pending send fails, every handle comes back, and `disconnect` comes once",
    why="the sender keeps its copy until the acknowledgement",
)
async def test_peer_dies_with_a_handle_in_flight(peer) -> None:
    """Killed while stopped: what it never saw is ours again."""
    javascript = "process.on('message', (m) => process.kill(process.pid, 'SIGSTOP'));"
    python = """
        import signal
        async def main(parent):
            await parent.recv()
            os.kill(os.getpid(), signal.SIGSTOP)
    """
    async with peer(javascript, python) as child, connection() as (client, accepted):
        events = collect_events(child)
        await child.send("stop")
        await asyncio.to_thread(os.waitid, os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
        handle = asyncio.create_task(child.send("take", accepted))
        behind = asyncio.create_task(child.send("behind" * 100_000))
        flushing = asyncio.create_task(child.flush())
        await turns(3)
        closed = event(child, "close")
        child.kill(signal.SIGKILL)
        with pytest.raises(HandleNotDelivered) as caught:
            await handle
        assert caught.value.handle is accepted
        for task in (behind, flushing):
            with pytest.raises(handleipc.ChannelBroken):
                await task
        await closed
        end = [["disconnect", False], ["exit", False, None, 9], ["close", False, None, 9]]
        assert events == end
        await accepted.end(b"back")
        assert await receive(client) == b"back"


# -- ends ------------------------------------------------------------------------------------------


@node_bug(
    "nodejs/node#19433, nodejs/node#65646",
    problem="after the parent's `disconnect()` the child's 'close' never comes",
    ours="`disconnect`, `exit`, `close`, each once",
    why="our own end counts as closed whoever closed it",
)
async def test_close_after_disconnect(peer) -> None:
    """All three events, though the end was ours."""
    python = """
        async def main(parent):
            await parent.send("up")
            async for message in parent:
                pass
    """
    async with peer("process.on('message', () => {}); process.send('up');", python) as child:
        assert await child.recv() == ("up", None)
        events, closed = collect_events(child), event(child, "close")
        child.disconnect()
        await closed
    assert events == [["disconnect", False], ["exit", False, 0, None], ["close", False, 0, None]]


@node_bug(
    "own",
    problem="`disconnect()` with half a message of the peer read never finishes, and throws at EOF",
    ours="it ends, and half a message is nothing",
    why="what is not complete was not sent",
)
async def test_disconnect_with_half_a_message() -> None:
    """The other half never comes."""
    async with raw_peer() as (channel, raw):
        raw.write("whole", b'{"half": ')
        assert await channel.recv() == ("whole", None)
        gone = event(channel, "disconnect")
        channel.disconnect()
        await asyncio.wait_for(gone, 10)
        assert await raw.line() == b""


@node_bug(
    "own; a held message",
    problem="`process.disconnect()` in the listener of a message that was held until it was added throws"
    " an uncaught TypeError in Node's own code",
    ours="it disconnects",
    why="held messages are delivered like others",
)
async def test_disconnect_in_the_listener_of_a_held_message() -> None:
    """Three are held; the listener of the first ends the channel; all three are delivered."""
    async with two_ends() as (a, b):
        for n in range(3):
            await a.send(n)
        seen = []
        b.on("message", lambda message, handle: (seen.append(message), b.disconnect()))
        await b.wait_disconnected()
        assert seen == [0, 1, 2]


@node_bug(
    "nodejs/node#760, nodejs/node#6767, nodejs/node#8249, nodejs/node#36268, nodejs/node#34797,"
    " denoland/deno#33085",
    problem="`send` of 5 MB and then `disconnect()` or `exit()` loses the message; its callback says"
    " null",
    ours="`disconnect()` flushes first, also at the end of `asyncio.run`; `await send()` returns when"
    " the kernel has it all",
    why="a polite end ends after what was said",
)
async def test_send_then_end(peer) -> None:
    """Five megabytes each way, and an end right behind."""
    javascript = """
        process.on('message', (m) => process.send(m.length, () => process.exit(0)));
    """
    python = """
        async def main(parent):
            message, _ = await parent.recv()
            await parent.send(len(message))
    """
    async with peer(javascript, python) as child:
        child.send_nowait("x" * 5_000_000)
        received = asyncio.create_task(anext(child))
        assert await received == (5_000_000, None)
        assert await child.wait() == 0


@also(
    "nodejs/node#760, nodejs/node#6767, nodejs/node#8249, nodejs/node#36268, nodejs/node#34797,"
    " denoland/deno#33085"
)
def test_send_then_end_under_node(under_node) -> None:
    """A Python child's last five megabytes, queued just before its main returns."""
    python = """
        async def main(parent):
            parent.send_nowait("x" * 5_000_000)
            parent.disconnect()
    """
    assert under_node("fork().on('message', (m) => show(m.length));", python) == [5_000_000]


@node_bug(
    "own; oven-sh/bun#43000, oven-sh/bun#43081",
    problem="write errors that come later are reported as success; queued callbacks never run",
    ours="each `send` that was not written raises `ChannelBroken`",
    why="a send that returned was written",
)
async def test_write_errors_are_told() -> None:
    """The peer vanishes with most of it unread."""
    async with raw_peer() as (channel, raw):
        sends = [asyncio.create_task(channel.send("x" * 500_000)) for _ in range(5)]
        await readable(raw.sock)
        raw.close()
        outcomes = await asyncio.gather(*sends, return_exceptions=True)
        assert all(isinstance(one, handleipc.ChannelBroken) for one in outcomes), outcomes


@node_bug(
    "nodejs/node#32106, nodejs/node#4205, nodejs/node#5153, nodejs/node#3395,"
    " prometheus/client_js#244",
    problem="races of an end with a `send`, or with Node's own replies, crash with EPIPE,"
    " ERR_IPC_CHANNEL_CLOSED or an assertion as an unhandled 'error'",
    ours="`send` raises `ChannelBroken`, to its caller; replies of ours raise nothing",
    why="one kind of error, where it can be handled",
)
async def test_end_races_with_replies() -> None:
    """The peer sends a handle and a question and is gone: nobody is there to answer."""
    with sockets() as (client, given):
        async with raw_peer() as (channel, raw):
            raw.write(envelope("m", key="k"), fds=(given.fileno(),))
            raw.write({"cmd": "NODE_SOCKET_GET_COUNT", "key": "k"})
            given.close()
            raw.close()
            with pytest.raises(handleipc.ChannelBroken):
                while True:
                    await channel.send("crossing")
            async for _, handle in channel:
                if handle is not None:
                    handle.close()
            await channel.wait_disconnected()
        assert await receive(client) == b""


# -- amounts ---------------------------------------------------------------------------------------


@node_bug(
    "nodejs/node#7657, node-v0.x-archive#8746",
    problem="back-pressure is a boolean without a 'drain' event",
    ours="`await send()` waits by itself; `drain()` waits after `send_nowait` returned False;"
    " `ChannelFull` is the hard limit",
    why="a sender that cannot wait fills its memory",
)
async def test_back_pressure() -> None:
    """A peer that does not read stops the sender, and lets it go on when it reads."""
    async with raw_peer(Limits(queued_bytes=300_000)) as (channel, raw):
        while channel.send_nowait("x" * 10_000):
            await asyncio.sleep(0)
        draining = asyncio.create_task(channel.drain())
        await turns()
        assert not draining.done()
        with pytest.raises(handleipc.ChannelFull):
            for _ in range(100):
                channel.send_nowait("x" * 10_000)

        async def read() -> None:
            while await raw.line():
                pass

        reading = asyncio.create_task(read())
        await draining
        reading.cancel()
        await asyncio.wait([reading])


def cpu_seconds(start: float) -> float:
    """Return the processor time since then."""
    return time.process_time() - start


@node_bug(
    "nodejs/node#3145, nodejs/node#10557, nodejs/node#42931, oven-sh/bun#25743",
    problem="large messages took time that grew with the square of their size",
    ours="eight times the size takes about eight times the time",
    why="each byte is looked at once",
)
async def test_large_messages_take_linear_time() -> None:
    """4 MB and 32 MB; quadratic would be a factor of 64."""
    times = []
    async with two_ends() as (a, b):
        for size in (4_000_000, 32_000_000):
            message = "x" * size
            start = time.process_time()
            sending = asyncio.create_task(a.send(message))
            assert await b.recv() == (message, None)
            await sending
            times.append(cpu_seconds(start))
    assert times[1] < 30 * times[0], times


@node_bug(
    "own; node-v0.x-archive#5192",
    problem="every acknowledgement submits the whole queue again: 32,000 handles take a square of time",
    ours="the time per queued handle does not grow; native peers have many in flight",
    why="the queue is a queue",
)
async def test_many_queued_handles_take_linear_time() -> None:
    """250 and 2,000 handles to a node peer; quadratic would be a factor of 64."""
    times = []
    with socket.socket(type=socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        async with two_ends() as (a, b):
            for count in (250, 2_000):
                start = time.process_time()
                for n in range(count):
                    a.send_nowait(n, Native(udp))
                for n in range(count):
                    message, received = await b.recv()
                    assert message == n
                    received.close()
                await a.flush()
                times.append(cpu_seconds(start))
    assert times[1] < 30 * times[0], times


# -- descriptors and their envelopes ----------------------------------------------------------------


@node_bug(
    "nodejs/node#13778, nodejs/node#14588",
    problem="a handle was lost if its message was longer than one read",
    ours="it is found, however the line is cut",
    why="descriptors are paired with envelopes by their place in the stream",
)
async def test_envelope_in_pieces() -> None:
    """The descriptor comes with the first byte, the rest one by one, others between."""
    with sockets() as (client, given):
        async with raw_peer() as (channel, raw):
            raw.write(b"{", fds=(given.fileno(),))
            await turns(3)
            for byte in b'"cmd":"NODE_HANDLE","type":"net.Socket","msg":"m"}\n':
                raw.write(bytes([byte]))
                await asyncio.sleep(0)
            message, received = await channel.recv()
            assert message == "m"
            assert works(client, received.fileno())
            received.close()


@node_bug(
    "own; two handles in flight",
    problem="a message that crosses a read boundary is delivered with the descriptor of another message",
    ours="towards node one handle is in flight; a peer that sends several gets each paired right",
    why="a descriptor given to the wrong recipient is a security hole",
)
async def test_two_handles_in_flight() -> None:
    """Many at once, of sizes around a read's, each with its own socket."""
    with sockets() as (one, first), sockets() as (two, second):
        async with raw_peer() as (channel, raw):
            for _ in range(5):
                raw.write(envelope("1" * 40_000), fds=(first.fileno(),))
                raw.write(envelope("2" * 40_000), fds=(second.fileno(),))
                for client in (one, two):
                    message, received = await channel.recv()
                    assert message[0] == ("1" if client is one else "2")
                    assert works(client, received.fileno())
                    received.close()
            assert [await raw.read() for _ in range(10)] == [ACK] * 10
            sends = [asyncio.create_task(channel.send(n, s)) for n, s in enumerate((first, second))]
            assert (await raw.read())["msg"] == 0
            await turns()
            assert raw.nothing_came()
            raw.write(ACK)
            assert (await raw.read())["msg"] == 1
            raw.write(ACK)
            await asyncio.gather(*sends)


@node_bug(
    "libuv/libuv#806, libuv/libuv#1352",
    problem="sending a handle that was closed while it waited: an assertion, or EBADF for the write",
    ours="`HandleNotDelivered` for that one, naming why; what is behind it goes on",
    why="the descriptor is read when the line is written, and no other can have its number by then",
)
async def test_closed_while_queued() -> None:
    """The second of three is closed before its turn."""
    with sockets() as (_, first), sockets() as (_, second), sockets() as (_, third):
        async with raw_peer() as (channel, raw):
            sends = [
                asyncio.create_task(channel.send(n, sock))
                for n, sock in enumerate((first, second, third))
            ]
            assert (await raw.read())["msg"] == 0
            second.close()
            raw.write(ACK)
            assert (await raw.read())["msg"] == 2
            raw.write(ACK)
            outcomes = await asyncio.gather(*sends, return_exceptions=True)
            assert outcomes[0] is outcomes[2] is None
            assert isinstance(outcomes[1], HandleNotDelivered)
            assert outcomes[1].handle is second


@node_bug(
    "libuv/libuv#2086, libuv/libuv#2097",
    problem="a descriptor was sent twice when its message was written in parts",
    ours="it goes with the first byte, once",
    why="a second copy keeps the client's connection open for ever",
)
async def test_partial_writes() -> None:
    """A message far larger than the socket's buffer carries one descriptor."""
    with sockets() as (_, given):
        async with raw_peer() as (channel, raw):
            sending = asyncio.create_task(channel.send("x" * 3_000_000, given))
            assert len((await raw.read())["msg"]) == 3_000_000
            assert raw.drop_descriptors() == 1
            raw.write(ACK)
            await sending


@node_bug(
    "libuv/libuv#5082, libuv/libuv#4358",
    problem="close-on-exec is not checked, and descriptors leak when receiving fails",
    ours="received descriptors are close-on-exec and non-blocking; refused ones are closed",
    why="a leaked descriptor keeps its client waiting",
)
async def test_received_descriptors() -> None:
    """A good one, one of the wrong kind, and one that no line claims."""
    with sockets() as (client, given):
        async with raw_peer() as (channel, raw):
            errors = []
            channel.on("error", errors.append)
            raw.write(envelope("m"), fds=(given.fileno(),))
            _, received = await channel.recv()
            assert not os.get_inheritable(received.fileno())
            assert not os.get_blocking(received.fileno())
            received.close()
            assert await raw.read() == ACK
            raw.write(envelope("m", "dgram.Native"), fds=(given.fileno(),))
            assert await raw.read() == NACK
            assert len(errors) == 1
            raw.write("plain", fds=(given.fileno(),))
            raw.write("next")
            given.close()
            assert await channel.recv() == ("plain", None)
            with pytest.raises(handleipc.RemoteProtocolError):
                await channel.recv()
            assert await receive(client) == b""


@node_bug(
    "nodejs/node#8353, nodejs/node#6951, node-v0.x-archive#7784, #7905, #8576, #25594",
    problem="bytes that the sender has already read are lost with a handed-over socket",
    ours="a server's connections are not read before; what a stream has read goes along to a handleipc"
    " peer (`head`), and is refused towards Node",
    why="the receiver must see the whole connection",
)
async def test_bytes_already_read(python_peer) -> None:
    """A request that was read halfway is finished in the child."""
    python = """
        async def main(parent):
            async for message, connection in parent:
                reader, writer = await connection.open()
                writer.write(await reader.readexactly(11))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
    """
    async with python_peer("", python) as child, connection() as (client, accepted):
        client.send(b"line\nhello ")
        reader, writer = await accepted.open()
        assert await reader.readline() == b"line\n"
        await child.send("go on", writer)
        client.send(b"world")
        assert await receive_all(client) == b"hello world"
        await goodbye(child)
    async with raw_peer() as (channel, raw), connection() as (client, accepted):
        client.send(b"line\nhello ")
        reader, writer = await accepted.open()
        assert await reader.readline() == b"line\n"
        with pytest.raises(handleipc.UnsupportedHandle):
            await channel.send("go on", writer)
        assert await reader.readexactly(6) == b"hello "
        writer.close()
        await writer.wait_closed()


@node_bug(
    "nodejs/help#865, nodejs/node#4037, nodejs/node#8711",
    problem="a TLS socket is accepted by `send`, never arrives, and ends in an uncaught exception",
    ours="`UnsupportedHandle` at once, which says to send the connection before the handshake",
    why="the keys live in the process",
)
async def test_tls_socket() -> None:
    """Refused by both ways to send; it stays the caller's."""
    with sockets() as (_, plain):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        tls = context.wrap_socket(plain, do_handshake_on_connect=False)
        with tls:
            async with raw_peer() as (channel, raw):
                with pytest.raises(handleipc.UnsupportedHandle, match="handshake"):
                    await channel.send("take", tls)
                with pytest.raises(handleipc.UnsupportedHandle, match="TLS"):
                    channel.send_nowait("take", Native(tls))
                await channel.send("alive")
                assert await raw.read() == "alive"


# -- life ------------------------------------------------------------------------------------------


@node_bug(
    "nodejs/node#15651, nodejs/node#20305",
    problem="after sends a server keeps child objects, and sockets keep http objects, for ever",
    ours="a child that has ended and a handle that was sent are let go",
    why="long-lived parents start many children",
)
async def test_nothing_is_retained(peer) -> None:
    """Only weak references are left, and they are empty, with the server still there."""
    javascript = "process.on('message', (m, socket) => socket.destroy());"
    python = """
        async def main(parent):
            async for message, connection in parent:
                connection.close()
    """
    async with handleipc.listen("127.0.0.1", 0) as server, clients(server.sockname, 1):

        async def use() -> list[weakref.ref]:
            async with peer(javascript, python) as child:
                sock = (await anext(server)).socket()
                await child.send("take", sock)
                await goodbye(child)
                return [weakref.ref(child), weakref.ref(sock)]

        kept = await use()
        await turns(5)
        gc.collect()
        assert [ref() for ref in kept] == [None, None]


@node_bug(
    "nodejs/node#34785, nodejs/node#37782, nodejs/node#39140, nodejs/node#41134, nodejs/help#1383",
    problem="messages that came before there was a listener were lost (and are held without bound now)",
    ours="they are held until there is a listener or a reader, up to `Limits.held_messages` and"
    " `held_bytes`; beyond, reading pauses",
    why="the kernel's buffer then makes the sender wait",
)
async def test_early_messages_are_held() -> None:
    """A flood before the first reader: memory is bounded, the sender waits, nothing is lost."""
    limits = Limits(held_messages=10, held_bytes=10_000)
    ours, theirs = socket.socketpair()
    a, b = handleipc.Channel(ours, Limits()), handleipc.Channel(theirs, limits)
    sends = [asyncio.create_task(a.send([n, "x" * 10_000])) for n in range(100)]
    await turns(100)
    assert not sends[-1].done()
    got = []
    done = asyncio.get_running_loop().create_future()
    b.on("message", lambda m, _: (got.append(m[0]), len(got) == 100 and done.set_result(None)))
    await done
    await asyncio.gather(*sends)
    assert got == list(range(100))
    for channel in (a, b):
        channel.abort()
        await channel.wait_disconnected()


@node_bug(
    "nodejs/node#43930, nodejs/node#21962, nodejs/node#7974",
    problem="children outlive a killed parent, and surprising rules say when",
    ours="iteration ends with the parent; with `exit_with_parent=True` the kernel kills even a child that"
    " is blocked",
    why="an orphan keeps ports and memory",
)
def test_parent_is_killed(tmp_path: Path) -> None:
    """Two children share the parent's output: its end is the end of both."""
    (tmp_path / "blocked.py").write_text(
        "import sys, time\nprint('up', flush=True)\ntime.sleep(60)\n"
    )
    reads = python_program(
        tmp_path,
        """
        async def main(parent):
            await parent.send("up")
            async for message in parent:
                pass
        """,
    )
    (tmp_path / "parent.py").write_text(
        f"""
import asyncio, handleipc, os, signal, sys

async def main():
    child = await handleipc.spawn(*{reads!r})
    await child.recv()
    await handleipc.fork({str(tmp_path / "blocked.py")!r}, exit_with_parent=True)
    await asyncio.get_running_loop().create_future()

asyncio.run(main())
"""
    )
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py")], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout.readline() == "up\n"
        parent.kill()
        assert parent.communicate(timeout=PATIENCE) == ("", None)


@node_bug(
    "nodejs/node#17405, nodejs/node#16491, nodejs/node#17460, nodejs/node#17545; nodejs/help#397, #588,"
    " #48",
    problem="the wire is undocumented, and 'undefined' for peers that are not Node",
    ours="docs/wire.md describes it, and what each Node really writes is compared with that",
    why="another language can join",
)
def test_wire_is_as_documented(node: str, tmp_path: Path) -> None:
    """Node's own bytes for a message and a handle, and its answer to a handle."""
    (tmp_path / "child.js").write_text(
        "process.send({ a: [1, 'é'] });\n"
        "process.on('message', (m, socket) => process.send(m, socket));\n"
    )
    documented = (Path(__file__).parents[2] / "docs" / "wire.md").read_text()
    for text in ('{"cmd":"NODE_HANDLE","type":T,"msg":M}', '{"cmd":"NODE_HANDLE_ACK"}'):
        assert text in documented
    ours, theirs = socket.socketpair()
    with sockets() as (_, given), ours, theirs:
        env = {**os.environ, "NODE_CHANNEL_FD": str(theirs.fileno())}
        env["NODE_CHANNEL_SERIALIZATION_MODE"] = "json"
        with subprocess.Popen(
            [node, str(tmp_path / "child.js")], env=env, pass_fds=[theirs.fileno()]
        ) as process:
            theirs.close()
            ours.settimeout(PATIENCE)

            def read_line() -> bytes:
                data = b""
                while not data.endswith(b"\n"):  # no byte further, or its descriptor would be lost
                    data += ours.recv(1)
                return data

            assert read_line() == '{"a":[1,"é"]}\n'.encode()
            line = b'{"cmd":"NODE_HANDLE","type":"net.Socket","msg":null}\n'
            socket.send_fds(ours, [line], [given.fileno()])
            assert read_line() == b'{"cmd":"NODE_HANDLE_ACK"}\n'
            data, fds, _, _ = socket.recv_fds(ours, 65536, 4)
            assert (data, len(fds)) == (line, 1)
            os.close(fds[0])
            ours.sendall(b'{"cmd":"NODE_HANDLE_ACK"}\n')
            ours.close()
            assert process.wait(PATIENCE) == 0


# -- servers ---------------------------------------------------------------------------------------


@node_bug(
    "nodejs/node#13740",
    problem="a parent that goes on listening takes connections from the child it gave its server to",
    ours="`send(server, transfer=True)` stops accepting here when the child has it",
    why="either both shall accept, or one; the caller says",
)
async def test_server_is_transferred(peer) -> None:
    """After the acknowledgement every client is the child's."""
    javascript = """
        process.on('message', (m, server) => {
          server.on('connection', (socket) => socket.end('child'));
          process.on('disconnect', () => server.close());
          process.send('up');
        });
    """
    python = """
        async def main(parent):
            message, server = await parent.recv()
            await parent.send("up")
            for _ in range(5):
                connection = await anext(server)
                with connection.socket() as sock:
                    sock.send(b"child")
            server.close()
            async for message in parent:
                pass
    """
    async with peer(javascript, python) as child:
        server = await handleipc.listen("127.0.0.1", 0)
        await child.send("server", server, transfer=True)
        assert server.closed
        assert await child.recv() == ("up", None)
        for _ in range(5):
            async with clients(server.sockname, 1) as (client,):
                assert await receive_all(client) == b"child"
        await goodbye(child)


FAULTS = "oven-sh/bun#31829, #31715, #34659, #37802, #39242; denoland/deno#34096, #34948, #35968"


@node_bug(
    FAULTS,
    problem="(other runtimes) no NACK for a missing descriptor, which stops the sender for ever; handles"
    " overtaken by messages; connections accepted before the application has the server; a null message"
    " lost; the retry counter never reset",
    ours="none of them",
    why="this is where a second implementation of the wire goes wrong",
)
async def test_missing_descriptor_is_refused() -> None:
    """An envelope without its descriptor gets its NACK, and the channel lives."""
    async with raw_peer() as (channel, raw):
        errors = []
        channel.on("error", errors.append)
        raw.write(envelope("lost"), "next")
        assert await raw.read() == NACK
        assert await channel.recv() == ("next", None)
        assert len(errors) == 1


@also(FAULTS)
async def test_order_of_messages_and_handles(peer) -> None:
    """Handles and messages by turns, there and back, in their order."""
    javascript = """
        process.on('message', (m, socket) => { process.send(m); if (socket) socket.destroy(); });
    """
    python = """
        async def main(parent):
            async for message, connection in parent:
                if connection is not None:
                    connection.close()
                await parent.send(message)
    """
    async with peer(javascript, python) as child, handleipc.listen("127.0.0.1", 0) as server:
        async with clients(server.sockname, 5):
            for n in range(10):
                child.send_nowait(n, await anext(server) if n % 2 else None)
            assert [(await child.recv())[0] for _ in range(10)] == list(range(10))
        await goodbye(child)


@also(FAULTS)
async def test_backlog_waits_for_the_application() -> None:
    """A received server accepts nothing until somebody asks it to."""
    async with two_ends() as (a, b), handleipc.listen("127.0.0.1", 0) as server:
        async with clients(server.sockname, 1) as (client,):
            await a.send("server", server)
            _, received = await b.recv()
            await turns()
            assert (received.connections, server.connections) == (0, 0)
            accepted = await anext(received)
            await accepted.end(b"accepted late")
            assert await receive(client) == b"accepted late"
        received.close()


@also(FAULTS)
async def test_null_with_a_handle(peer) -> None:
    """``None`` is a message, with a handle and without, there and back."""
    javascript = "process.on('message', (m, handle) => process.send(m, handle));"
    python = """
        async def main(parent):
            async for message, handle in parent:
                await parent.send(message, handle)
    """
    async with peer(javascript, python) as child, connection() as (_, accepted):
        await child.send(None)
        assert await child.recv() == (None, None)
        await child.send(None, accepted)
        message, returned = await child.recv()
        assert message is None
        returned.close()
        await goodbye(child)
