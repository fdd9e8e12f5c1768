"""One case: a script of what a peer and this end do, run against a ``Channel``, and judged.

A script is either made up as it goes (``Maker``, from a seed, looking at what the peer knows) or
read from a file of the corpus; what is run is written down, so that the one becomes the other.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import gc
import json
import logging
import os
import random
import resource
import socket
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import handleipc
from handleipc import Channel, ChannelBusy, Connection, FileDescriptor, HandleIPCError, Limits
from handleipc.asyncio.driver import process_system
from handleipc.exceptions import DescriptorReleased, HandleNotDelivered, RemoteProtocolError
from handleipc.limits import Invitation
from handleipc.wire.syscalls import descriptor_kind
from tests.fuzz.peer import KINDS, Peer, bend, make_kinds

__all__ = ["Fuzzer", "Maker", "Replay", "Script"]

Step = dict[str, Any]
# How long an end may take; nothing but a hang takes so long.
PATIENCE = float(os.environ.get("FUZZ_PATIENCE", "10"))
# The most descriptors of one message.
MOST = 253


class Script:
    """What is done, step by step. ``done`` is what has been, to be run again."""

    def __init__(self) -> None:
        self.setup: Step = {}
        self.done: list[Step] = []

    def steps(self, peer: Peer) -> Iterator[Step]:
        raise NotImplementedError

    def dump(self) -> dict[str, Any]:
        return {"setup": self.setup, "steps": self.done}


class Replay(Script):
    """A script that was written down."""

    def __init__(self, written: dict[str, Any]) -> None:
        super().__init__()
        self.setup = written["setup"]
        self._steps = written["steps"]

    def steps(self, peer: Peer) -> Iterator[Step]:
        """Yield what was done."""
        yield from self._steps


class Maker(Script):
    """A script made up from a seed and a number."""

    def __init__(self, seed: int, number: int) -> None:
        super().__init__()
        self._rng = rng = random.Random(seed * 1_000_003 + number)
        pick = rng.choice
        self.setup = {
            "style": pick(["node", "parent", "child", "parent", "child"]),
            "app": pick(["listener", "reader", "none", "slow", "batches"]),
            "accept_handles": rng.random() > 0.1,
            "greedy": rng.random() < 0.1,
            "invitation": [pick([1, 8, 128]), pick([100, 1 << 20])],
            "limits": {
                "window": pick([1, 4, 8, 64]),
                "ready": pick([0, 1, 4, 32]),
                "bytes": pick([100, 4096, 1 << 20]),
                "line": pick([2000, 65536, 1 << 27]),
                "depth": pick([3, 128]),
                "incomplete_timeout": pick([0.002, 30]),
                "held_messages": pick([3, 16384]),
                "held_bytes": pick([500, 1 << 20]),
                "held_hard": pick([2000, 1 << 26]),
                "node_hard": pick([3000, 1 << 26]),
                "set_size": pick([1, 4, 64]),
            },
        }

    def steps(self, peer: Peer) -> Iterator[Step]:
        """Yield what a peer does that is right most of the time, and this end meanwhile."""
        rng, style = self._rng, self.setup["style"]
        limits = self.setup["limits"]
        if style == "parent" and rng.random() < 0.8:
            most, size = rng.choice([0, 1, 8, 128, 65536]), rng.choice([0, 100, 1 << 20])
            yield _write(peer.switch(most, size), ())
            peer.grant(limits["window"])
        rate = rng.choice([0, 0.1, 0.3, 0.6])
        squeezed = rng.random() < 0.15
        for _ in range(rng.randrange(1, 25)):
            what = rng.random()
            if what < 0.25:
                local = "hand" if what < 0.15 else "say" if what < 0.2 else "give away"
                if what > 0.22:
                    local = "disconnect" if what < 0.24 else "abort"
                yield {"do": local, "timeout": rng.choice([None, None, 0.001])}
            yield {"do": "read"}
            if style == "child" and peer.victim_native and not peer.native and rng.random() < 0.8:
                yield _write(peer.switch(64, 1 << 20), ())
            writes = peer.next(rng)
            if rng.random() < rate:
                writes = bend(writes, rng)
            if squeezed:
                yield {"do": "squeeze", "spare": rng.choice([0, 1, 2, 3])}
            for data, kinds in writes:
                yield _write(data, kinds)
            turns = rng.choice([0, 1, 3, 6])
            if turns:
                yield {"do": "turns", "count": turns}
            if squeezed:
                if rng.random() < 0.5:
                    yield {"do": "pause"}
                yield {"do": "loosen"}
        yield {"do": rng.choice(["close", "close", "shut writing", "shut reading", "disconnect"])}


def _write(data: bytes, kinds: Any) -> Step:
    return {"do": "write", "data": data.decode("latin-1"), "kinds": list(kinds)}


class _Many:
    def __init__(self, fds: list[FileDescriptor]) -> None:
        self.fds = fds
        self.closed = False

    def close(self) -> None:
        self.closed = True
        for fd in self.fds:
            fd.close()


class _ManyConversion:
    tag = "multi"

    def to_wire(self, many: _Many) -> tuple[Any, list[int]]:
        return {"n": len(many.fds)}, [fd.fileno() for fd in many.fds]

    def from_wire(self, details: Any, fds: list[FileDescriptor]) -> _Many:
        if details == "fail":
            raise ValueError("as asked")
        return _Many(fds)


class Fuzzer:
    """Runs cases one after the other on the running loop. ``findings`` are what was wrong.

    Args:
        findings: called with what was found, and the script.
    """

    def __init__(self) -> None:
        self.found: list[str] = []
        self.stats: collections.Counter[str] = collections.Counter()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Fuzzer:
        stack = self._stack
        stack.enter_context(make_kinds())
        self._low = max(KINDS.values()) + 1
        handleipc.register(_Many, _ManyConversion())
        for name in ("handleipc", "asyncio"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL + 1)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("error")
        stack.callback(setattr, sys, "unraisablehook", sys.unraisablehook)
        sys.unraisablehook = lambda what: self._find(f"unraisable {what.exc_value!r}")
        self._soft, self._hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        stack.callback(self._loosen)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _find(self, what: str) -> None:
        self.found.append(what)

    def _loosen(self) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (self._soft, self._hard))

    async def run(self, script: Script) -> list[str]:
        """Run one case; return what was found."""
        self.found = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(
            lambda _, context: self._find(
                f"loop exception {context.get('message')}: {context.get('exception')!r}"
            )
        )
        before = _count_descriptors()
        case = _Case(self, script)
        try:
            await case.run()
        finally:
            self._loosen()
        most = max(self.stats["most held"], case.stats.pop("most held", 0))
        self.stats += case.stats
        self.stats["most held"] = most
        self.stats["cases"] += 1
        del case
        await asyncio.sleep(0)
        if _count_descriptors() != before:
            gc.collect()
            await asyncio.sleep(0.002)
            if (after := _count_descriptors()) != before:
                self._find(f"leak: {before} descriptors, then {after}")
        if process_system.in_flight.total:
            self._find(f"in flight: {process_system.in_flight.total}")
            process_system.in_flight.total = 0
        return self.found


class _Case:
    def __init__(self, fuzzer: Fuzzer, script: Script) -> None:
        self.fuzzer = fuzzer
        self.script = script
        self.stats: collections.Counter[str] = collections.Counter()
        setup = script.setup
        self.limits = Limits(
            **setup["limits"],
            retry_time=0.005,
            hello_timeout=0.002,
            disconnect_timeout=0.003,
            ask_delay_max=0.002,
            in_flight_delay_max=0.002,
        )
        ours, theirs = socket.socketpair()
        self.theirs = theirs
        self.peer = Peer(theirs)
        self.peer.greedy = setup["greedy"]
        self.style = style = setup["style"]
        invitation = Invitation(*setup["invitation"]) if style == "child" else None
        self.channel = Channel(
            ours,
            self.limits,
            inviting=style == "parent",
            invited_by=invitation,
            accept_handles=setup["accept_handles"],
        )
        self.got: list[Any] = []
        self.handles = 0
        self.fatal: list[Any] = []
        self.disconnects = 0
        self.held_here = 0
        self.clients: list[socket.socket] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.own: list[Any] = []
        self.channel.on("error", self.fatal.append)
        self.channel.on("undelivered", self._undelivered)
        self.channel.on("disconnect", self._disconnected)
        app = setup["app"]
        if app == "listener":
            self.channel.on("message", self._take)
        elif app != "none":
            self.tasks.append(asyncio.ensure_future(self._read(app)))
        self.base = _count_descriptors() - 1  # as it is when the peer has closed: own end aside

    def find(self, what: str) -> None:
        self.fuzzer._find(f"{what} ({self.style}, {self.script.setup['app']})")

    # -- the application -------------------------------------------------------------------------

    def _undelivered(self, message: Any, handle: Any, reason: str) -> None:
        if not reason.startswith("in doubt") and _closed(handle):
            self.find(f"undelivered, and closed: {reason}")
        handle.close()

    def _disconnected(self) -> None:
        self.disconnects += 1

    def _take(self, message: Any, handle: Any) -> None:
        self.got.append(message)
        if handle is not None:
            self.handles += 1
            if _closed(handle):
                self.find(f"got a closed {type(handle).__name__}")
            handle.close()

    async def _read(self, app: str) -> None:
        with contextlib.suppress(RemoteProtocolError):
            if app == "batches":
                async for batch in self.channel.batches():
                    for message, handle in batch:
                        self._take(message, handle)
                return
            async for message, handle in self.channel:
                self._take(message, handle)
                if app == "slow":
                    await asyncio.sleep(0)

    async def _hand(self, handle: Any, timeout: float | None) -> None:
        told: BaseException | None = None
        try:
            await self.channel.send({"n": 1}, handle, timeout=timeout)
        except (HandleIPCError, TimeoutError) as error:
            told = error
        in_doubt = "in doubt" in str(told) or type(told).__name__ == "HandleInDoubt"
        if told is None and not handle.closed:
            self.find("delivered, and the sender's handle is open")
        if isinstance(told, HandleNotDelivered) and not in_doubt and handle.closed:
            self.find(f"not delivered, and the sender's handle is closed: {told}")
        # After a timeout, or ChannelBusy, it may be on its way still: then "undelivered" tells.
        if not (isinstance(told, TimeoutError | ChannelBusy) and handle.closed):
            with contextlib.suppress(DescriptorReleased):
                handle.close()

    # -- the steps -------------------------------------------------------------------------------

    async def _do(self, step: Step) -> None:
        channel, do = self.channel, step["do"]
        if do == "write":
            self.peer.write(step["data"].encode("latin-1"), step["kinds"])
            self.stats["writes"] += 1
        elif do == "turns":
            for _ in range(step["count"]):
                await asyncio.sleep(0)
        elif do == "read":
            self.peer.read()
        elif do == "hand":
            client, served = socket.socketpair()
            served.setblocking(False)
            self.clients.append(client)
            handle = Connection(served.detach(), UNIX_STREAM)
            self.own.append(handle)
            self.tasks.append(asyncio.ensure_future(self._hand(handle, step["timeout"])))
        elif do == "say":
            with contextlib.suppress(HandleIPCError):
                channel.send_nowait({"plain": 1})
        elif do == "give away":
            handle = FileDescriptor(os.dup(KINDS["null"]))
            self.own.append(handle)
            try:
                channel.send_nowait("fd", handle)
            except HandleIPCError:
                handle.close()
        elif do == "disconnect":
            channel.disconnect()
        elif do == "abort":
            channel.abort()
        elif do == "squeeze":
            top = max(map(int, os.listdir("/proc/self/fd")))
            limit = (top + step["spare"], self.fuzzer._hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        elif do == "loosen":
            self.fuzzer._loosen()
        elif do == "pause":
            await asyncio.sleep(0.003)
        elif do == "close":
            self.theirs.close()
        elif do == "shut writing":
            self._shut(socket.SHUT_WR)
        elif do == "shut reading":
            self._shut(socket.SHUT_RD)

    def _shut(self, how: int) -> None:
        with contextlib.suppress(OSError):
            self.theirs.shutdown(how)

    async def run(self) -> None:
        done = self.script.done
        for count, step in enumerate(self.script.steps(self.peer)):
            done.append(step)
            try:
                await self._do(step)
            except OSError as error:
                if step["do"] not in ("hand", "give away"):  # no slot: of this test's own
                    self.find(f"{step['do']} raised {error!r}")
            if step["do"] == "turns" and (self.peer.greedy or count % 4 == 0):
                self._judge_bound()
        self.fuzzer._loosen()
        self._judge_bound()
        await self._end()
        self._judge()

    async def _end(self) -> None:
        channel = self.channel
        last = self.script.done[-1]["do"] if self.script.done else ""
        if last == "shut writing":
            # A half-close is the end; the peer goes on reading.
            for _ in range(5):
                self.peer.read()
                await asyncio.sleep(0)
        elif last != "disconnect" or self.script.setup["app"] == "none":
            await asyncio.sleep(0)
            self.theirs.close()
        if self.script.setup["app"] == "none":
            self.tasks.append(asyncio.ensure_future(self._read("none")))
        if not await self._within(channel.wait_disconnected()):
            self.find(f"hang: {channel!r} after {last!r}")
            channel.abort()
            await self._within(channel.wait_disconnected())
        self.theirs.close()
        if self.tasks:
            _, pending = await asyncio.wait(self.tasks, timeout=PATIENCE)
            for task in pending:
                self.find(f"hang: {task.get_coro().__qualname__} after {last!r}")
                task.cancel()
            for task in self.tasks:
                if not task.cancelled() and task.done() and task.exception() is not None:
                    self.find(f"a task raised {task.exception()!r}")
            if pending:
                await asyncio.wait(pending)
        channel.off("message", self._take)
        with contextlib.suppress(HandleIPCError):
            while True:
                self._take(*await asyncio.wait_for(channel.recv(), PATIENCE))

    async def _within(self, awaitable: Any) -> bool:
        try:
            await asyncio.wait_for(awaitable, PATIENCE)
        except TimeoutError:
            return False
        return True

    # -- the rules -------------------------------------------------------------------------------

    def _judge_bound(self) -> None:
        """Nobody pins more descriptors than a window, and what is ready; one large handle for each."""
        with contextlib.suppress(OSError):
            mine = sum(not _closed(one) for one in self.own) + len(self.clients)
            # What is on its way is open, although its owner says that it is not his.
            mine += sum(getattr(one, "_fd", 0) == -3 for one in self.own)
            held = _count_descriptors() - self.base - mine
            # Under a window below MOST a larger handle passes alone, as `Limits.window` says.
            window = max(self.limits.window, self.peer.largest_set)
            bound = window + max(self.limits.ready, MOST) + 2
            self.stats["most held"] = max(self.stats["most held"], held)
            if held > bound:
                self.find(f"bound: {held} descriptors are held, and {bound} is the bound")

    def _judge(self) -> None:
        self._judge_order()
        if self.handles > self.peer.descriptors_sent:
            self.find(f"{self.handles} handles of {self.peer.descriptors_sent} descriptors")
        if self.disconnects != 1:
            self.find(f"{self.disconnects} disconnect events")
        if self.channel.connected:
            self.find("connected after the end")
        fatal = [one for one in self.fatal if isinstance(one, RemoteProtocolError)]
        for one in self.fatal:
            if not isinstance(one, HandleIPCError):
                self.find(f"an error event that is not documented: {one!r}")
        self.stats["error events"] += len(fatal)
        self.stats["messages"] += len(self.got)
        self.stats["handles"] += self.handles
        for client in self.clients:
            client.close()

    def _judge_order(self) -> None:
        """What arrived is on the wire, in this order; each line once."""
        at = 0
        lines = _single_lines(bytes(self.peer.wrote))
        for message in self.got:
            while at < len(lines) and not _may_be(lines[at], message):
                at += 1
            if at == len(lines):
                self.find(f"out of order, or never written: {message!r:.100}")
                return
            at += 1


def _single_lines(wrote: bytes) -> list[bytes]:
    """Return the lines that were written, each message of a run as a line of its own."""
    found: list[bytes] = []
    for one in wrote.split(b"\n"):
        messages = None
        if one[:3] in (b"[4,", b"[5,"):
            with contextlib.suppress(ValueError, IndexError):
                messages = json.loads(one)[3 if one[1:2] == b"4" else 1]
        if isinstance(messages, list):
            found += [json.dumps([0, message]).encode() for message in messages]
        else:
            found.append(one)
    return found


def _may_be(one: bytes, message: Any) -> bool:
    try:
        value = json.loads(one)
    except ValueError:
        return False
    if value == message:
        return True
    if isinstance(value, dict) and "msg" in value:
        inner = value["msg"]
        return bool(inner == message or (isinstance(inner, dict) and inner.get("msg") == message))
    if isinstance(value, dict) and value.get("cmd") == "NODE_HANDLE":
        return message is None
    if isinstance(value, list) and value:
        place = 1 if value[0] == 0 else 4 if value[0] == 2 else 0
        return bool(place and len(value) > place and value[place] == message)
    return False


def _closed(handle: Any) -> bool:
    if isinstance(handle, socket.socket):
        return handle.fileno() < 0
    sock = getattr(handle, "sock", None)
    if isinstance(sock, socket.socket):
        return sock.fileno() < 0
    return bool(handle.closed)


def _count_descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) - 1


def _unix_stream() -> int:
    one, other = socket.socketpair()
    with one, other:
        return descriptor_kind(one.fileno())


UNIX_STREAM = _unix_stream()
