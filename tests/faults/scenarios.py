"""What is run with each fault: a channel's whole life from several sides.

Each scenario arms the shim where the library's part begins. Both ends of a channel live in this
process, on one loop, so that what is called when does not depend on the machine; the child of the
start scenarios is a small C program.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import handleipc
from handleipc import Channel, FileDescriptor, Native
from handleipc.environment import child_environment, socket_cookie
from tests.faults.world import PATIENCE, End, World

Scenario = Callable[[World], Coroutine[Any, Any, None]]
SCENARIOS: dict[str, Scenario] = {}
"""By name. Run in an event loop of its own."""
AFTER_THE_LOOP: dict[str, Callable[[World], None]] = {}
"""What a scenario looks at when its loop has ended."""
ONLY: dict[str, tuple[str, ...]] = {}
"""Scenarios that make sense for some dialects only."""

PEER = Path(os.environ.get("FAULTS_PEER", "peer"))


def scenario(name: str, *dialects: str) -> Callable[[Scenario], Scenario]:
    def note(function: Scenario) -> Scenario:
        SCENARIOS[name] = function
        if dialects:
            ONLY[name] = dialects
        return function

    return note


@scenario("exchange")
async def exchange(world: World) -> None:
    """Messages and handles of every kind both ways, then a polite end."""
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    listener = socket.create_server(("127.0.0.1", 0))
    near, far = socket.socketpair()
    for sock in (udp, listener, near, far):
        sock.setblocking(False)
    world.keep(udp, listener, near, far)
    ends = world.join()
    if ends is None:
        return
    a, b = ends
    world.start_task("b reads", b.read())
    a.listen()
    a.post()
    await a.say()
    b.post()
    await a.give()
    for _ in range(3):
        a.hand()
        a.post()
    await a.lend(udp, udp)
    await a.lend(listener, listener)
    await a.lend(Native(near), near)
    if world.native:
        await a.lend(FileDescriptor(os.open("/dev/null", os.O_RDONLY)))
    a.post("x" * world.filling)
    await b.give()
    b.hand()
    await a.flush()
    await b.flush()
    await a.disconnect()
    await b.ended()


@scenario("aborted by the sender")
async def abort_sending(world: World) -> None:
    """The sender aborts with handles on their way and queued, and the receiver had read nothing."""
    world.lossy = True
    ends = world.join()
    if ends is None:
        return
    a, b = ends
    await a.say()
    for _ in range(4):
        world.start_task("a sends", a.give())
    for _ in range(3):
        a.hand()
        a.post()
        await asyncio.sleep(0)
    with world.told_if_fails("a abort"):
        a.channel.abort()
    await a.ended()
    await b.read()


@scenario("aborted by the receiver")
async def abort_receiving(world: World) -> None:
    """The receiver aborts between two handles, with more in its socket."""
    world.lossy = True
    ends = world.join()
    if ends is None:
        return
    a, b = ends
    await a.say()
    for _ in range(3):
        a.hand()
        a.post()
    reading = world.start_task("b reads", b.read())
    await world.bounded("two messages", b.until(2))
    with world.told_if_fails("b abort"):
        b.channel.abort()
    await b.ended()
    await a.ended()
    await world.bounded("b reads", reading)


@scenario("descriptors lost")
async def lost(world: World) -> None:
    """Descriptors find no free slot twice, and are asked for again."""
    world.loses_descriptors = True
    ends = world.join()
    if ends is None:
        return
    a, b = ends
    world.start_task("b reads", b.read())
    a.listen()
    await a.say()
    b.post()
    await a.say()
    world.shim.lose(2)
    for _ in range(3):
        a.hand()
        a.post()
    await a.give()
    await a.flush()
    await a.disconnect()
    await b.ended()


@scenario("loop ends")
async def loop_ends(world: World) -> None:
    """The event loop ends with messages queued; what it has accepted to send still leaves."""
    ours, theirs = socket.socketpair()
    world.keep(theirs)
    world.arm()
    world.roles[ours.fileno()] = "a"
    with world.told_if_fails("a made", starts=True):
        channel = Channel(ours, world.limits, inviting=world.native)
        world.last = (channel, ours, theirs)  # type: ignore[attr-defined]
        end = End(world, "a", channel)
        await end.say()
        for _ in range(5):
            end.post("x" * 20)
        world.ends.clear()
        return
    world.lost()
    ours.close()
    theirs.close()


def _after_the_loop(world: World) -> None:
    world.disarm()
    if not hasattr(world, "last"):
        return
    channel, ours, theirs = world.last
    theirs.setblocking(False)
    data = b""
    with contextlib.suppress(BlockingIOError, ConnectionError):
        while more := theirs.recv(1 << 20):
            data += more
    lines = data.splitlines()
    whole = len(lines) == 6 and all(b"x" * 20 in line for line in lines[1:])
    if not whole:
        world.lost()
        # What could not leave in time waits for the next loop, for a channel to a parent.
        waits = channel.connected and not channel._protocol.outgoing.idle
        if channel.connected and not (waits or world.told):
            world.broke(f"{6 - len(lines)} messages did not leave, and nobody was told")
    theirs.close()
    ours.close()
    del world.last  # type: ignore[attr-defined]


AFTER_THE_LOOP["loop ends"] = _after_the_loop


@scenario("parent()")
async def adopt(world: World) -> None:
    """A child finds its channel in the environment, and talks."""
    ours, theirs = socket.socketpair()
    theirs.set_inheritable(True)
    limits = world.limits
    cookie = socket_cookie(theirs) if world.native else None
    fd = theirs.detach()
    os.environ.update(child_environment({}, fd, limits, cookie))
    a = End(world, "a", Channel(ours, limits, inviting=world.native))
    world.roles.update({ours.fileno(): "a", fd: "b"})
    world.arm()
    with world.told_if_fails("parent()", starts=True):
        channel = await world.bounded("parent()", handleipc.parent(limits=limits))
        assert channel is not None
        b = End(world, "b", channel)
        world.start_task("b reads", b.read())
        a.listen()
        await a.say()
        await b.say()
        await a.give()
        await b.give()
        await b.flush()
        await b.disconnect()
        await a.ended()
        return
    world.lost()
    if a.peer is None:
        # Nobody owns it: it is this process's, as it was passed.
        with contextlib.suppress(OSError):
            os.close(fd)


@scenario("server", "node")
async def serve(world: World) -> None:
    """Listen at a port, accept, answer in every way, close."""
    await _serve(world, handleipc.listen("127.0.0.1", 0))


@scenario("unix server", "node")
async def serve_unix(world: World) -> None:
    """Listen at a path, accept, answer, close, and the path is gone."""
    path = f"/tmp/faults-{os.getpid()}.sock"
    try:
        await _serve(world, handleipc.listen_unix(path))
        if os.path.exists(path) and world.cell.call not in ("unlink", "stat", "bind"):
            world.broke("the path stays")
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)


CLIENTS = 4


async def _serve(world: World, listening: Any) -> None:
    server = None
    world.arm()
    with world.told_if_fails("listen", starts=True):
        server = await world.bounded("listen", listening)
    if server is None:
        world.lost()
        return
    world.roles[server.fileno()] = "listener"
    failed = asyncio.Event()
    server.on("error", lambda error: (world.tell("server error", error), failed.set()))
    user = End.__new__(End)  # for its ways of using a connection
    user.world, user.name, user._uses = world, "server", 0
    clients = []
    for i in range(CLIENTS):
        client = socket.socket(
            socket.AF_INET if isinstance(server.sockname, tuple) else socket.AF_UNIX
        )
        client.connect(server.sockname)
        client.setblocking(False)
        clients.append(client)

    async def accept() -> None:
        taken = 0
        with world.told_if_fails("accepting", starts=True):
            async for connection in server:
                with world.told_if_fails("server using", starts=True):
                    await user._use(connection)
                if not connection.closed:
                    connection.close()
                taken += 1
                if taken == CLIENTS:
                    return

    accepting = asyncio.ensure_future(accept())
    until = [accepting]
    if world.cell.sticky:
        until.append(asyncio.ensure_future(failed.wait()))
    await asyncio.wait(until, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
    if not accepting.done() and not failed.is_set():
        world.broke("hang: accepting, and the server says nothing")
    with world.told_if_fails("server close", starts=True):
        server.close()
    for waiter in until:
        waiter.cancel()
    await asyncio.wait(until)
    if accepting.done() and not accepting.cancelled() and accepting.exception() is not None:
        world.broke(f"accepting raised {accepting.exception()!r}")
    world.disarm()
    unserved = await _unserved(world, clients)
    if unserved:
        world.lost()
        # A client that is gone is no error of whoever answers it.
        gone = world.cell.call == "send" and world.cell.error in (errno.ECONNRESET, errno.EPIPE)
        if not (world.told or gone):
            world.broke(f"{unserved} clients unserved, and nobody was told")
        gave_up = any(one.startswith("accepting: ") for one in world.told)
        if unserved > 1 and not (world.cell.sticky or gave_up):
            world.broke(f"one fault, and {unserved} clients are unserved")
    with world.told_if_fails("wait_closed"):
        await world.bounded("server.wait_closed", server.wait_closed())


async def _unserved(world: World, clients: list[socket.socket]) -> int:
    """Count the clients without an answer; each sees its end at least."""
    unserved = 0
    loop = asyncio.get_running_loop()
    for client in clients:
        data = b""
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_WR)
        try:
            while more := await asyncio.wait_for(loop.sock_recv(client, 100), PATIENCE):
                data += more
        except TimeoutError:
            world.broke("hang: a client of the server never sees an end")
        except OSError:
            pass
        unserved += data != b"hi"
        client.close()
    return unserved


@scenario("start")
async def start(world: World) -> None:
    """Start a child, talk, hand it a connection, let it end."""
    await _start(world)


@scenario("start with pipes")
async def start_piped(world: World) -> None:
    """The same with piped stdio and the channel at a number."""
    await _start(world, stdout=-1, stdin=-1, channel_fd=9)


@scenario("start tied")
async def start_tied(world: World) -> None:
    """The same with a child that the kernel kills with its parent, which is killed here."""
    await _start(world, exit_with_parent=True, accept_handles=False, kill=True)


async def _start(world: World, *, kill: bool = False, **options: Any) -> None:
    child = None
    command = [str(PEER), world.cell.dialect]
    world.arm()
    with world.told_if_fails("spawn", starts=True):
        dialect = None if world.native else "node"
        child = await world.bounded(
            "spawn", handleipc.spawn(*command, dialect=dialect, limits=world.limits, **options)
        )
    if child is None:
        world.lost()
        return
    end = End(world, "a", child)
    exits: list[Any] = []
    child.on("exit", lambda *how: (end.events.append("exit"), exits.append(how)))
    child.on("close", lambda *how: (end.events.append("close"), exits.append(how)))
    world.start_task("a reads", end.read())
    await end.say()
    await world.bounded("the echo", end.until(1))
    await end.say()
    end.post("x" * 1000)
    await world.bounded("the echoes", end.until(3))
    label = end.label()
    gift = world.gift(label)
    gift.given = True
    with end._told(label):
        await world.bounded("send to a child", child.send([label], gift.handle))
        gift.got = 1
    await end.flush()
    if kill:
        with world.told_if_fails("kill", starts=True):
            child.kill()
    with world.told_if_fails("disconnect"):
        child.disconnect()
    await end.ended()
    if child.stdin is not None:
        child.stdin.close()
    code = await world.bounded("wait", child.wait())
    if not end.ended_early:
        await world.bounded("the close event", _until(lambda: "close" in end.events))
    if world.hung:
        return
    allowed: tuple[int | None, ...] = (7, -15) if kill else (7,)
    if world.cell.call == "waitpid":
        allowed += (None,)
    if code not in allowed:
        world.broke(f"wait() is {code}, and the child exits with 7")
    # Some may have come before anybody could listen.
    if end.events != ["disconnect", "exit", "close"] and not end.ended_early:
        world.broke(f"events {end.events}")
    echoed = [x for x in end.sent if x != label and x not in end.failed]
    if end.got != echoed:
        world.lost()
        if not world.told:
            world.broke(f"echoes {end.got} of {echoed}, and nobody was told")


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)
