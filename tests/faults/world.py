"""The rules: what must hold whatever call failed. Watches one scenario, and judges it at the end.

- Everybody who waits is told within a bounded time: a result, or an exception of the documented
  tree; ``OSError`` with the errno of the fault where something starts, listens, or is used or closed
  by the application itself.
- A handle has one owner at the end: the sender has it back and it works, or the receiver's
  application got it, or the sender was told that this is in doubt.
- Messages arrive in order and once. What did not arrive, somebody was told of.
- No descriptor, child or count of the budget stays behind, and no copy of a handle.
- Nothing reaches the event loop's exception handler, or the interpreter's for what nobody can
  catch, and nothing is dropped with its descriptor open.
- What a transient error may change: nothing (``errors.Effect``).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import gc
import logging
import os
import socket
import sys
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import handleipc
from handleipc import Channel, Connection, HandleIPCError, HandleNotDelivered, Limits
from handleipc.asyncio import lingering
from handleipc.asyncio.driver import process_system
from handleipc.wire.syscalls import descriptor_kind
from tests.faults.errors import ERRORS, SHORT, TRUNCATED, Effect, name_of
from tests.faults.shim import Shim

T = TypeVar("T")

# How long anything may take. Only what hangs takes so long.
PATIENCE = float(os.environ.get("FAULTS_PATIENCE", "15"))

# How long what may wait for ever is waited for.
SHORT_PATIENCE = 0.5
# Waits that end in any case.
ENDS = ("wait_disconnected", "after the end", "wait_closed", "spawn", "parent()", "wait")

# After these nobody can know what the peer has acknowledged.
IN_DOUBT = ("recvmsg", "shutdown")

SMALL_TIMES = {
    "retry_time": 0.2,
    "hello_timeout": 0.3,
    "disconnect_timeout": 0.5,
    "incomplete_timeout": 0.5,
    "in_flight_delay_max": 0.01,
    "ask_delay_max": 0.01,
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One fault in one scenario: the ``at``-th use of ``call`` fails; ``at`` 0 only counts."""

    scenario: str
    dialect: str
    call: str | None = None
    error: int = 0
    at: int = 0
    sticky: bool = False
    loop: str = "asyncio"

    def __str__(self) -> str:
        if self.call is None:
            return f"{self.scenario} {self.dialect} {self.loop}"
        which = "from " if self.sticky else ""
        name = name_of(self.error)
        return f"{self.scenario} {self.dialect} {self.loop} {self.call} {name} {which}{self.at}"

    @property
    def starves(self) -> bool:
        """Whether the kernel takes nothing for ever, as of a peer that is stopped.

        It may go on at any time, so ``send`` waits as long as its caller likes.
        """
        return self.sticky and self.error in (errno.EAGAIN, errno.ETOOMANYREFS)

    @property
    def effect(self) -> Effect:
        """The most that this fault may change."""
        if self.call is None:
            return Effect.NONE
        if self.sticky and self.error != SHORT:
            return Effect.TOLD
        return ERRORS[self.call][name_of(self.error)]


class Gift:
    """A connection to hand over, and its client, which sees who serves it."""

    def __init__(self, handle: Any, client: socket.socket | None, *, moves: bool = True) -> None:
        self.handle = handle
        self.client = client
        self.moves = moves
        self.got = 0
        self.back = self.doubt = self.given = False

    @property
    def is_open(self) -> bool:
        if isinstance(self.handle, socket.socket):
            return self.handle.fileno() >= 0
        return not self.handle.closed

    def close(self) -> None:
        """Close what of it is still the sender's."""
        with contextlib.suppress(HandleIPCError, OSError):
            if self.is_open:
                self.handle.close()

    def works(self) -> bool:
        """Whether the sender's handle is the other end of the client."""
        if self.client is None:
            return self.is_open
        try:
            self.client.send(b"?")
            with socket.socket(fileno=os.dup(self.handle.fileno())) as copy:
                copy.setblocking(False)
                return copy.recv(10) == b"?"
        except (OSError, HandleIPCError):
            return False


class World:
    """One scenario: what is in it, what everybody was told, and which rules were broken."""

    def __init__(self, cell: Cell, shim: Shim) -> None:
        self.cell = cell
        self.shim = shim
        self.native = cell.dialect == "native"
        known = {field.name for field in dataclasses.fields(Limits)}
        self.limits = Limits(**{k: v for k, v in SMALL_TIMES.items() if k in known})
        self.told: list[str] = []
        self.broken: list[str] = []
        self.gifts: dict[str, Gift] = {}
        self.ends: list[End] = []
        self.roles: dict[int, str] = {}
        self.armed = False
        self._tasks: list[asyncio.Task[Any]] = []
        self._sockets: list[socket.socket] = []
        self.hung = False
        self._unlike = False
        self.filling = 400_000
        if cell.sticky and cell.error == SHORT:
            self.filling = 100  # byte by byte
        self.lossy = False
        """Whether the scenario loses something without a fault, and tells."""
        self.loses_descriptors = cell.call is not None and cell.error == TRUNCATED
        shim.role = lambda fd: self.roles.get(fd, "")

    # -- the fault -------------------------------------------------------------------------------

    def arm(self) -> None:
        """What the library calls from here on may fail."""
        cell = self.cell
        self.shim.arm(cell.call, cell.at, cell.error, sticky=cell.sticky)
        self.armed = True

    def disarm(self) -> None:
        self.shim.disarm()

    # -- what everybody is told ------------------------------------------------------------------

    def tell(self, who: str, what: object) -> None:
        self.told.append(f"{who}: {what if isinstance(what, str) else repr(what)}")

    def broke(self, rule: str) -> None:
        self.broken.append(rule)

    def is_documented(self, error: BaseException, *, starts: bool) -> bool:
        if isinstance(error, HandleIPCError):
            return True
        if not starts or self.cell.call is None:
            return False
        if self.cell.call == "mmap" and isinstance(error, MemoryError):
            return True
        return isinstance(error, OSError) and error.errno == self.cell.error

    @contextlib.contextmanager
    def told_if_fails(self, who: str, *, starts: bool = False) -> Iterator[None]:
        """An exception in this block is what ``who`` was told, if it is a documented one."""
        try:
            yield
        except Exception as error:
            self.tell(who, error)
            if not self.is_documented(error, starts=starts):
                self.broke(f"undocumented {type(error).__name__} at {who}: {error}")

    async def bounded(self, who: str, awaitable: Awaitable[T]) -> T | None:
        """Await with patience; None when it is exhausted. What it raises is raised."""
        task = asyncio.ensure_future(awaitable)
        is_starved = self.cell.starves and not who.endswith(ENDS)
        patience = SHORT_PATIENCE if is_starved else PATIENCE
        if self.hung and not (self.cell.starves and who.endswith(ENDS)):
            patience = 0.05
        done, _ = await asyncio.wait([task], timeout=patience)
        if done:
            return task.result()
        task.cancel()
        if not (self.hung or is_starved):
            self.broke(f"hang: {who}")
        self.hung = True
        with contextlib.suppress(BaseException):
            await asyncio.wait([task], timeout=0.05)
        return None

    def start_task(self, name: str, coroutine: Any) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(coroutine)
        task.set_name(name)
        self._tasks.append(task)
        return task

    async def finish_tasks(self) -> None:
        """Wait for all that was started with ``start_task``."""
        while self._tasks:
            task = self._tasks.pop(0)
            await self.bounded(task.get_name(), task)

    # -- what is in it ---------------------------------------------------------------------------

    def keep(self, *sockets: socket.socket) -> None:
        """Close these when all is over."""
        self._sockets += sockets

    def gift(self, label: str) -> Gift:
        """Return a connection with its client, not yet given to anybody."""
        client, served = socket.socketpair()
        client.setblocking(False)
        served.setblocking(False)
        self.shim.paused = True
        kind = descriptor_kind(served.fileno())
        self.shim.paused = False
        gift = self.gifts[label] = Gift(Connection(served.detach(), kind), client)
        return gift

    def join(self) -> tuple[End, End] | None:
        """Begin to fail, and make both ends of a channel; None if that failed and was told."""
        from handleipc.protocol.channel import Invitation

        self.arm()
        ours, theirs = socket.socketpair()
        limits = self.limits
        invitation = Invitation(limits.window, limits.bytes) if self.native else None
        ends: list[End] = []
        for name, sock, options in (
            ("a", ours, {"inviting": self.native}),
            ("b", theirs, {"invited_by": invitation}),
        ):
            self.roles[sock.fileno()] = name
            with self.told_if_fails(f"{name} made", starts=True):
                ends.append(End(self, name, Channel(sock, limits, **options)))
                continue
            self._unlike = True
            self.keep(*(s for s in (ours, theirs) if s.fileno() >= 0))
            return None
        return ends[0], ends[1]

    # -- the end ---------------------------------------------------------------------------------

    async def settle(self) -> None:
        """Stop failing, end what is left, and judge. Called in the loop, at its end."""
        self.disarm()
        for end in self.ends:
            await end.finish()
        await self.finish_tasks()
        self._judge_messages()
        self._judge_gifts()
        for gift in self.gifts.values():
            gift.close()
            if gift.client is not None:
                with contextlib.suppress(OSError):
                    gift.client.shutdown(socket.SHUT_WR)
        await self._judge_copies()
        for sock in self._sockets:
            sock.close()
        self._sockets.clear()

    def _judge_messages(self) -> None:
        for end in self.ends:
            if end.peer is None:
                continue
            sent, got = end.sent, end.peer.got
            order = {label: i for i, label in enumerate(sent)}
            if len(set(got)) < len(got):
                self.broke(f"{end.name} to {end.peer.name}: a message arrived twice: {got}")
            elif [order.get(label, -1) for label in got] != sorted(order.get(x, -1) for x in got):
                self.broke(f"{end.name} to {end.peer.name}: out of order: {got}")
            arrived_all_the_same = [x for x in got if x in end.failed and x not in self.gifts]
            if arrived_all_the_same:
                self.broke(
                    f"{end.name} was told of failure, and they arrived: {arrived_all_the_same}"
                )
            missing = [label for label in sent if label not in got]
            if missing:
                self._unlike = True
                if not (self.told or self.hung or self.lossy):
                    self.broke(
                        f"{end.name} to {end.peer.name}: lost, and nobody was told: {missing}"
                    )

    def _judge_gifts(self) -> None:
        for label, gift in self.gifts.items():
            if not (gift.given and gift.moves):
                continue
            if gift.got > 1:
                self.broke(f"{label}: given to the application {gift.got} times")
            if gift.back and not gift.works():
                self.broke(f"{label}: is back, and does not work")
            if gift.back and gift.got:
                self.broke(f"{label}: two owners, the sender has it back and the receiver got it")
            if gift.doubt and gift.is_open:
                self.broke(f"{label}: in doubt, and the sender's copy is open")
            if not (gift.back or gift.got or gift.doubt or self.hung):
                self.broke(f"{label}: no owner, and its sender was not told")

    async def _judge_copies(self) -> None:
        for label, gift in self.gifts.items():
            if gift.client is None:
                continue
            deadline = time.monotonic() + (0.5 if self.hung else PATIENCE)
            while _is_open(gift.client):
                if time.monotonic() > deadline:
                    self.hung = True
                    self.broke(f"{label}: a copy of the handle stays open")
                    break
                await asyncio.sleep(0.002)
            gift.client.close()

    def judge_effect(self) -> str:
        """Compare with what the fault may change; return what it did change."""
        told = [one for one in self.told if not self._is_news_of_lost(one)]
        effect = self.cell.effect
        if self.lossy:
            return "told, as without it"
        if self.shim.fired or self.cell.call is None:
            if effect is Effect.NONE and (told or self._unlike):
                self.broke(f"a transient error was told: {told or 'messages are missing'}")
            if effect is Effect.KEPT and self._unlike:
                self.broke("something was lost of which nothing need be lost")
        if not told and not self._unlike:
            return "as without it"
        return "told, something lost" if self._unlike else "told, nothing lost"

    def _is_news_of_lost(self, told: str) -> bool:
        # That descriptors found no slot is said, even if they came at the second time.
        return self.loses_descriptors and " error: " in told

    def lost(self) -> None:
        """Note that something asked for was not done."""
        self._unlike = True


class End:
    """One end of a channel, with what was sent and got there, and what it was told."""

    def __init__(self, world: World, name: str, channel: Channel) -> None:
        self.world = world
        self.name = name
        self.channel = channel
        self.peer: End | None = None
        self.sent: list[str] = []
        self.failed: set[str] = set()
        self.got: list[str] = []
        self.events: list[str] = []
        self._uses = 0
        self.ended_early = not channel.connected
        """Whether it had ended before anybody could listen."""
        self.news = asyncio.Event()
        world.ends.append(self)
        if len(world.ends) == 2:
            world.ends[0].peer, world.ends[1].peer = world.ends[1], world.ends[0]
        channel.on("error", lambda error: world.tell(f"{name} error", error))
        channel.on("undelivered", self._undelivered)
        channel.on("disconnect", lambda: self.events.append("disconnect"))

    # -- sending ---------------------------------------------------------------------------------

    def label(self) -> str:
        label = f"{self.name}{len(self.sent) + 1}"
        self.sent.append(label)
        return label

    def post(self, filling: str = "") -> None:
        """Send a message without waiting."""
        label = self.label()
        with self._told(label):
            self.channel.send_nowait([label, filling])

    async def say(self) -> None:
        """Send a message, and wait until it is written."""

        async def send() -> None:
            label = self.label()
            with self._told(label):
                await self.channel.send([label])

        await self.world.bounded(f"{self.name}.send", send())

    def hand(self) -> None:
        """Send a connection without waiting."""
        label = self.label()
        gift = self.world.gift(label)
        gift.given = True
        with self._told(label):
            self.channel.send_nowait([label], gift.handle)

    async def give(self) -> None:
        """Send a connection, and wait until it is the peer's."""
        await self._send_handle(lambda label: self.world.gift(label))

    async def lend(self, handle: Any, sock: socket.socket | None = None) -> None:
        """Send something of another kind, and wait. ``sock`` is what stays the sender's."""
        # A descriptor's owner gives it away; everything else stays.
        moves = isinstance(handle, handleipc.FileDescriptor)
        gift = Gift(handle if moves else sock, None, moves=moves)
        await self._send_handle(lambda _: gift, handle)

    async def _send_handle(self, make: Callable[[str], Gift], handle: Any = None) -> None:
        async def send() -> None:
            label = self.label()
            gift = self.world.gifts[label] = make(label)
            gift.given = True
            with self._told(label):
                await self.channel.send([label], handle if handle is not None else gift.handle)

        await self.world.bounded(f"{self.name}.send with a handle", send())

    async def flush(self) -> None:
        with self.world.told_if_fails(f"{self.name} flush"):
            await self.world.bounded(f"{self.name}.flush", self.channel.flush())

    @contextlib.contextmanager
    def _told(self, label: str) -> Iterator[None]:
        with self.world.told_if_fails(f"{self.name} send {label}"):
            try:
                yield
            except Exception as error:
                self._failed(label, error)
                raise

    def _failed(self, label: str, error: BaseException) -> None:
        self.failed.add(label)
        gift = self.world.gifts.get(label)
        if gift is None:
            return
        reason = error.reason if isinstance(error, HandleNotDelivered) else ""
        if reason.startswith("in doubt") or type(error).__name__ == "HandleInDoubt":
            gift.doubt = True
            if self.channel.dialect == "native" and self.world.cell.call not in IN_DOUBT:
                self.world.broke(f"{label}: in doubt, although the dialect is native")
        else:
            gift.back = True

    def _undelivered(self, message: Any, handle: Any, reason: str) -> None:
        self.world.tell(f"{self.name} undelivered", f"{message[0]} {reason}")
        self._failed(message[0], HandleNotDelivered(handle, reason))

    # -- receiving -------------------------------------------------------------------------------

    async def read(self) -> None:
        """Take messages until the end."""
        with self.world.told_if_fails(f"{self.name} iteration"):
            async for message, handle in self.channel:
                await self.take(message, handle)

    def listen(self) -> None:
        """Take messages as a listener."""
        self.channel.on(
            "message",
            lambda message, handle: self.world.start_task(
                f"use at {self.name}", self.take(message, handle)
            ),
        )

    async def take(self, message: Any, handle: Any) -> None:
        self.got.append(message[0])
        self.news.set()
        if handle is None:
            return
        gift = self.world.gifts[message[0]]
        gift.got += 1
        self._uses += 1
        try:
            with self.world.told_if_fails(f"{self.name} using {message[0]}", starts=True):
                if isinstance(handle, Connection) and gift.client is not None:
                    await self._use(handle)
        finally:
            with self.world.told_if_fails(f"{self.name} close", starts=True):
                handle.close()

    async def _use(self, handle: Connection) -> None:
        way = self._uses % 3
        if way == 0:
            await self.world.bounded("Connection.end", handle.end(b"hi"))
        elif way == 1:
            with handle.socket() as sock:
                # It is non-blocking: a full buffer is waited for in the loop.
                await asyncio.get_running_loop().sock_sendall(sock, b"hi")
        else:
            opened = await self.world.bounded("Connection.open", handle.open())
            if opened is not None:
                opened[1].write(b"hi")
                opened[1].close()
                await self.world.bounded("wait_closed", opened[1].wait_closed())

    async def until(self, count: int) -> None:
        """Wait until so many messages have come, or the channel has ended."""
        ended = asyncio.ensure_future(self.channel.wait_disconnected())
        try:
            while len(self.got) < count and not ended.done():
                self.news.clear()
                news = asyncio.ensure_future(self.news.wait())
                await asyncio.wait([news, ended], return_when=asyncio.FIRST_COMPLETED)
                news.cancel()
        finally:
            ended.cancel()

    async def ended(self) -> None:
        await self.world.bounded(f"{self.name}.wait_disconnected", self.channel.wait_disconnected())

    async def disconnect(self) -> None:
        """End politely, and see that it ends."""
        with self.world.told_if_fails(f"{self.name} disconnect"):
            self.channel.disconnect()
        await self.ended()

    async def finish(self) -> None:
        """See that this end ends, and take what it still holds."""
        world = self.world
        if not (self.events.count("disconnect") or self.ended_early):
            with world.told_if_fails(f"{self.name} abort"):
                self.channel.abort()
            await self.ended()
        if self.channel.connected and not world.hung:
            world.broke(f"{self.name}: connected after its end")
        with contextlib.suppress(HandleIPCError):
            while True:
                received = await world.bounded(
                    f"{self.name}.recv after the end", self.channel.recv()
                )
                if received is None:
                    break
                await self.take(*received)
        if self.events.count("disconnect") != 1 and not (world.hung or self.ended_early):
            world.broke(f"{self.name}: {self.events.count('disconnect')} disconnect events")


def _is_open(client: socket.socket) -> bool:
    try:
        while client.recv(1000):
            pass
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def open_descriptors() -> dict[int, str]:
    """Return what this process has open, but for the listing itself."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def children() -> bool:
    """Whether this process has a child, alive or not yet reaped."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


@contextlib.contextmanager
def overheard(world: World) -> Iterator[Callable[[asyncio.AbstractEventLoop], None]]:
    """Take what goes to handlers of last resort for broken rules. Yields: watch this loop."""

    def unraisable(what: Any) -> None:
        world.broke(f"unraisable: {what.exc_value!r} in {what.object!r}")

    def shown(message: Any, *_: Any, **__: Any) -> None:
        world.broke(f"warning: {message}")

    def from_loop(_: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if str(context.get("message")).startswith("exception in close() of "):
            world.tell("loop", f"{context.get('message')} {error!r}")
            return
        world.broke(f"loop exception: {context.get('message')}: {error!r}")

    logging.getLogger("handleipc").addHandler(logging.NullHandler())
    logging.getLogger("handleipc").propagate = False
    logging.getLogger("asyncio").propagate = False
    before = sys.unraisablehook
    sys.unraisablehook = unraisable
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = shown
            yield lambda loop: loop.set_exception_handler(from_loop)
    finally:
        sys.unraisablehook = before


def differences(cell: Cell, before: dict[int, str]) -> tuple[dict[int, str], dict[int, str]]:
    """Return what is open that was not, and the other way round."""
    after = open_descriptors()
    new = {fd: what for fd, what in after.items() if fd not in before}
    if cell.loop == "uvloop":
        # libuv keeps one for the day on which accept finds none free.
        new = {fd: what for fd, what in new.items() if what not in ("/dev/null", "/")}
    return new, {fd: what for fd, what in before.items() if fd not in after}


def judge_process(world: World, before: dict[int, str], *, when: str) -> None:
    """Nothing may be left of the scenario in this process."""
    deadline = time.monotonic() + PATIENCE
    gc.collect()
    while children():
        if time.monotonic() > deadline:
            world.broke("a child process is left")
            break
        time.sleep(0.002)
    new, gone = differences(world.cell, before)
    if new or gone:
        world.broke(f"descriptors {when}: left {new}, gone {gone}")
    if process_system.in_flight.total:
        world.broke(f"in flight: {process_system.in_flight.total}")


def shorten_lingering() -> None:
    """A client whose end cannot be seen is not waited for so long."""
    if hasattr(lingering, "LINGER"):
        lingering.LINGER = 0.3
