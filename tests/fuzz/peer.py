"""The peer: what a correct one could write now, and how that is bent. Knows no ``Channel``."""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import socket
from typing import Any

__all__ = ["KINDS", "Peer", "bend", "control_line", "line", "make_kinds"]

# Kinds of descriptors that a tag is right for.
FITS = {
    "net.Socket": ["tcp", "tcp2", "unix"],
    "net.Server": ["listen"],
    "net.Native": ["tcp", "unix", "pipe"],
    "net.BoundSocket": ["unconnected"],
    "dgram.Socket": ["udp"],
    "dgram.Native": ["udp", "udp6"],
    "fd": [],
    "multi": [],
}
TAGS = ["net.Socket", "net.Socket", *FITS, "nobody", ""]
NUMBERS: list[Any] = [
    *(0, 1, 2, 3, 4, 7, 8, 9, 63, 64, 252, 253, 254, 255, 256, 65535, 65536),
    *(2**31 - 1, 2**31, 2**32, 2**53 - 1, 2**53, 2**63, 2**64, -1),
    *(1.0, 1.5, 1e300, None, True, "1", [], {}),
]
FIELDS = ["native", "ack", "handles", "descriptors", "bytes", "refuse", "again"]
FIELDS += ["type", "msg", "cmd", "key"]
VALUES = [
    *NUMBERS,
    *([1, 1], [[1, 1, "kind"]], [[1, 2**53 - 1, "k"]], [1, 2**53 - 1]),
    *("NODE_HANDLE_ACK", "NODE_HANDLEIPC", "NODE_HANDLE"),
]
MESSAGES: list[Any] = [
    *(1, "x", None, [], {}, {"a": 1}, {"cmd": "hello"}, {"cmd": "NODE_x"}, "\ud800", {"\ud800": 1}),
    *(2**70, [1] * 50, [[[[]]]], {"k": "y" * 300}),
    {"cmd": "NODE_SOCKET_GET_COUNT", "key": "k"},
    {"cmd": "NODE_SOCKET_NOTIFY_CLOSE", "key": "k"},
    {"cmd": "NODE_SOCKET_COUNT", "key": "k", "count": 3},
    {"cmd": "NODE_SOCKET_ALL_CLOSED", "key": "k"},
    {"cmd": "NODE_SOCKET_CLOSED", "key": "k", "count": 1},
    {"cmd": "NODE_SOCKET_GET_COUNT"},
]
OPTIONS: list[Any] = [
    *({"key": "k"}, {"key": 5}, {"key": "k" * 200}, {}),
    *({"unread": "aGVsbG8="}, {"unread": "!!"}, {"details": "fail"}, {"details": {"n": 2}}),
    *({"unlink": "/nowhere"}, {"unlink": 5}),
]
SWITCH = {"cmd": "NODE_HANDLEIPC", "native": 2, "ack": 0, "bytes": 1 << 20}
SWITCH |= {"handles": 128, "descriptors": 128}
GARBAGE = [
    *(b"\n", b"\0\n", b"[\n", b"[0]\n", b"[2]\n", b"[]\n", b"{}\n", b"null\n", b"\xff\n"),
    *(b"[9,1]\n", b"[0,1]", b"1" * 5000 + b"\n", b"[" * 300 + b"\n", b'"' + b"a" * 70000 + b'"\n'),
    *(b'"\\ud800"\n', b'{"\\ud800":1,"cmd":"NODE_HANDLE"}\n', b'{"cmd":"\\ud800"}\n'),
    *(
        b'{"cmd":"NODE_HANDLEIPC"}\n',
        b'{"cmd":"NODE_HANDLE_NACK"}\n',
        b'{"cmd":"NODE_HANDLE_ACK"}\n',
    ),
    json.dumps(SWITCH).encode() + b"\n",
]

KINDS: dict[str, int] = {}
"""Descriptors by the name of their kind, borrowed from ``make_kinds``."""
NAMES: list[str] = []
"""The names of all kinds, in the order in which they are made."""

Write = tuple[bytes, tuple[str, ...]]


def make_kinds() -> contextlib.ExitStack:
    """Open one of every kind of descriptor; returns what closes them."""
    stack = contextlib.ExitStack()

    def keep(name: str, thing: Any) -> Any:
        if isinstance(thing, int):
            stack.callback(os.close, thing)
            KINDS[name] = thing
        else:
            stack.callback(thing.close)
            KINDS[name] = thing.fileno()
        return thing

    listen = keep("listen", socket.create_server(("127.0.0.1", 0)))
    keep("tcp", socket.create_connection(listen.getsockname()))
    keep("tcp2", listen.accept()[0])
    keep("udp", socket.socket(socket.AF_INET, socket.SOCK_DGRAM)).bind(("127.0.0.1", 0))
    keep("udp6", socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
    for name, kind in (("unix", socket.SOCK_STREAM), ("datagram", socket.SOCK_DGRAM)):
        one, other = socket.socketpair(socket.AF_UNIX, kind)
        keep(name, one)
        keep(f"{name} too", other)
    reading, writing = os.pipe()
    keep("pipe", reading)
    keep("pipe too", writing)
    keep("null", os.open(os.devnull, os.O_RDWR))
    keep("folder", os.open("/", os.O_RDONLY))
    keep("path", os.open("/", os.O_PATH))
    keep("epoll", select.epoll())
    keep("eventfd", os.eventfd(0))
    keep("memfd", os.memfd_create("x"))
    keep("unconnected", socket.socket())
    keep("netlink", socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0))
    keep("pidfd", os.pidfd_open(os.getpid()))
    NAMES[:] = KINDS
    stack.callback(KINDS.clear)
    return stack


def line(value: Any) -> bytes:
    """Spell a line; bytes go as they are."""
    if isinstance(value, bytes):
        return value
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def control_line(ack: int, most: int, size: int, **more: Any) -> dict[str, Any]:
    """Return a control line, in the units of all versions."""
    grants = {"ack": ack, "handles": most, "descriptors": most, "bytes": size}
    return {"cmd": "NODE_HANDLEIPC", **more, **grants}


class Peer:
    """The far end: knows enough of the protocol to be right, and remembers what it wrote."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.setblocking(False)
        self.native = False
        """Whether this peer has switched."""
        self.dead = False
        self.wrote = bytearray()
        self.descriptors_sent = self.largest_set = 0
        self.asks: list[list[int]] = []
        self.victim_native = False
        self._buffer = b""
        self._sequence = self._granted = self._used = 0
        self._by_descriptors = False
        self._unanswered = 0
        self.greedy = False
        """Whether it sends as many descriptors as it may, in large handles."""
        self._outstanding: dict[int, int] = {}
        self._acked = self._gave = self._gave_bytes = 0

    # -- the socket ------------------------------------------------------------------------------

    def write(self, data: bytes, kinds: tuple[str, ...] | list[str]) -> None:
        """Write as much as fits; a line cut short is a mutation too."""
        if self.dead or not data:
            return
        fds = [KINDS[kind] for kind in kinds]
        try:
            count = socket.send_fds(self.sock, [data], fds) if fds else self.sock.send(data)
        except BlockingIOError:
            return
        except OSError:
            self.dead = True
            return
        self.wrote += data[:count]
        self.descriptors_sent += len(fds)
        self.largest_set = max(self.largest_set, len(fds))

    def read(self) -> None:
        """Read all there is, and remember what matters."""
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self.sock, 1 << 16, 253)
            except BlockingIOError:
                return
            except OSError:
                self.dead = True
                return
            for fd in fds:
                os.close(fd)
            if not data:
                self.dead = True
                return
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            for one in lines:
                with contextlib.suppress(ValueError, TypeError, KeyError, IndexError):
                    self._see(json.loads(one))

    def _see(self, value: Any) -> None:
        if isinstance(value, list):
            if value[0] == 2:
                self._outstanding[value[1]] = value[2]
            elif value[0] == 4:
                self._outstanding |= {value[1] + i: 1 for i in range(len(value[3]))}
        elif isinstance(value, dict):
            command = value.get("cmd")
            if command == "NODE_HANDLE":
                self._unanswered += 1
            elif command == "NODE_HANDLEIPC":
                self.victim_native |= bool(value.get("native"))
                self._by_descriptors |= "descriptors" in value
                self.grant(value.get("descriptors", value.get("handles", self._granted)))
                if value.get("again"):
                    self.asks.append(value["again"])

    def grant(self, most: int) -> None:
        """So many may be sent."""
        self._granted = most

    def switch(self, most: int, size: int) -> bytes:
        """Go over to native; returns the line that says so."""
        self.native = True
        self._gave, self._gave_bytes = most, size
        return line(control_line(0, most, size, native=2))

    # -- what a correct peer could say now -------------------------------------------------------

    def next(self, rng: random.Random) -> list[Write]:
        return self._native(rng) if self.native else self._node(rng)

    def _node(self, rng: random.Random) -> list[Write]:
        chance = rng.random()
        if self._unanswered and chance < 0.5:
            self._unanswered -= 1
            reply = rng.choice(["NODE_HANDLE_ACK", "NODE_HANDLE_ACK", "NODE_HANDLE_NACK"])
            return [(line({"cmd": reply}), ())]
        if chance < 0.5:
            return [(line(rng.choice(MESSAGES)), ())]
        tag = rng.choice(TAGS)
        options = _options(rng, tag) or {}
        envelope = {"cmd": "NODE_HANDLE", "type": tag, "msg": rng.choice(MESSAGES), **options}
        if rng.random() < 0.1:
            envelope = {"cmd": "NODE_HANDLE", "type": tag, "msg": envelope}
        return [(line(envelope), (_fitting(rng, tag),))]

    def _native(self, rng: random.Random) -> list[Write]:
        chance = rng.random()
        if self.asks and chance < 0.7:
            first, count = self.asks.pop(0)
            count = min(count, 253)
            lines = [[1, count], *([3, first + i, 1] for i in range(count))]
            kinds = tuple(rng.choice(FITS["net.Socket"]) for _ in range(count))
            return [(b"".join(map(line, lines)), kinds)]
        if self.greedy and chance < 0.9:
            return self._set(rng)
        if chance < 0.2:
            return [(line([0, rng.choice(MESSAGES)]), ())]
        if chance < 0.3:
            return [(line([5, _some_messages(rng, rng.choice([1, 2, 30]))]), ())]
        if chance < 0.55:
            return [(line(self._control(rng)), ())]
        if self._unanswered and chance < 0.6:
            self._unanswered -= 1
            return [(line({"cmd": "NODE_HANDLE_ACK"}), ())]
        return self._set(rng) if rng.random() < 0.5 else self._run(rng)

    def _run(self, rng: random.Random) -> list[Write]:
        count = min(rng.choice([1, 2, 3, 8, 64, 253]), self._granted - self._used)
        if count < 1:
            return [(line([0, 1]), ())]
        tag = rng.choice(TAGS)
        one = [4, self._sequence + 1, tag, _some_messages(rng, count)]
        options = _options(rng, tag)
        self._used += count
        self._sequence += count
        # Mostly of one kind, as a server's are.
        fits = [_fitting(rng, tag)] * count if rng.random() < 0.7 else None
        kinds = fits or [_fitting(rng, tag) for _ in range(count)]
        lines = [one if options is None else [*one, options]]
        if rng.random() < 0.2:
            lines.append([5, _some_messages(rng, 3)])
        return [(b"".join(map(line, lines)), tuple(kinds))]

    def _set(self, rng: random.Random) -> list[Write]:
        lines: list[Any] = []
        kinds: list[str] = []
        for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
            tag = rng.choice(TAGS) if not self.greedy else "multi"
            places = 1
            if tag == "multi":
                places = rng.choice([20, 60, 253] if self.greedy else [1, 2, 5, 20, 60])
            cost = places if self._by_descriptors else 1
            if self._used + cost > self._granted or len(kinds) + places > 253:
                break
            self._used += cost
            self._sequence += 1
            kinds += [_fitting(rng, tag) for _ in range(places)]
            options = _options(rng, tag)
            one = [2, self._sequence, places, tag, rng.choice(MESSAGES)]
            lines.append([*one, options] if options is not None else one)
            if rng.random() < 0.2:
                lines.append([0, rng.choice(MESSAGES)])
        if not kinds:
            return [(line([0, 1]), ())]
        return [(b"".join(map(line, [[1, len(kinds)], *lines])), tuple(kinds))]

    def _control(self, rng: random.Random) -> dict[str, Any]:
        out = self._outstanding
        fields: dict[str, Any] = {"cmd": "NODE_HANDLEIPC"}
        if out and rng.random() < 0.3:
            refused = rng.choice(list(out))
            del out[refused]
            code = rng.choice(["kind", "type", "descriptors", "closing", "zzz"])
            fields["refuse"] = [[refused, 1, code]]
        if rng.random() < 0.8:
            self._acked = max([self._acked, *(one for one in out if rng.random() < 0.7)])
            for one in [one for one in out if one <= self._acked]:
                del out[one]
            self._gave = max(self._gave, self._acked + 64)
            self._gave_bytes += 100_000
            fields |= control_line(self._acked, self._gave, self._gave_bytes)
        if out and rng.random() < 0.3:
            fields["again"] = [rng.choice(list(out)), 1]
        return fields


def _some_messages(rng: random.Random, count: int) -> list[Any]:
    return [rng.choice(MESSAGES) for _ in range(count)]


def _fitting(rng: random.Random, tag: str) -> str:
    right = FITS.get(tag)
    return rng.choice(right if right and rng.random() < 0.8 else NAMES)


def _options(rng: random.Random, tag: str) -> dict[str, Any] | None:
    if tag == "dgram.Socket" and rng.random() < 0.9:
        return {"dgramType": rng.choice(["udp4", "udp6", "x", None])}
    return None if rng.random() < 0.6 else rng.choice(OPTIONS)


# -- bending it ----------------------------------------------------------------------------------


def bend(writes: list[Write], rng: random.Random) -> list[Write]:
    """Make each of these writes wrong in one way, or right in an unusual one."""
    return [bent for write in writes for bent in rng.choice(_WAYS)(rng, *write)]


def _one_more(rng: random.Random, data: bytes, kinds: tuple[str, ...]) -> list[Write]:
    return [(data, (*kinds, rng.choice(NAMES))[:253])]


def _one_less(rng: random.Random, data: bytes, kinds: tuple[str, ...]) -> list[Write]:
    return [(data, kinds[:-1])]


def _others(rng: random.Random, data: bytes, kinds: tuple[str, ...]) -> list[Write]:
    count = rng.choice([0, 1, 2, 3, 10, 64, 253])
    return [(data, tuple(rng.choice(NAMES) for _ in range(count)))]


def _wrong_byte(rng: random.Random, data: bytes, kinds: tuple[str, ...]) -> list[Write]:
    at = rng.randrange(len(data))
    return [(data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :], kinds)]


def _cut(rng: random.Random, data: bytes, kinds: tuple[str, ...]) -> list[Write]:
    return [(data[: rng.randrange(len(data))], kinds)]


def _shuffled(rng: random.Random, data: bytes, kinds: tuple[str, ...]) -> list[Write]:
    lines = data.splitlines(keepends=True)
    rng.shuffle(lines)
    return [(b"".join(lines), kinds)]


def _twice(rng: random.Random, data: bytes, kinds: tuple[str, ...]) -> list[Write]:
    return [(data + data, kinds)]


def _split(rng: random.Random, data: bytes, kinds: tuple[str, ...]) -> list[Write]:
    at = rng.randrange(len(data))
    return [(data[:at], kinds), (data[at:], kinds if rng.random() < 0.3 or not at else ())]


def _a_line_less(rng: random.Random, data: bytes, kinds: tuple[str, ...]) -> list[Write]:
    lines = data.splitlines(keepends=True)
    del lines[rng.randrange(len(lines))]
    return [(b"".join(lines), kinds)]


def _wrong_value(rng: random.Random, data: bytes, kinds: tuple[str, ...]) -> list[Write]:
    lines = data.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    try:
        value = json.loads(lines[at])
    except ValueError:
        return [(data, kinds)]
    if isinstance(value, list) and value:
        value[rng.randrange(len(value))] = rng.choice(NUMBERS)
    elif isinstance(value, dict):
        value[rng.choice([*value, *FIELDS])] = rng.choice(VALUES)
    lines[at] = line(value)
    return [(b"".join(lines), kinds)]


def _garbage(rng: random.Random, data: bytes, kinds: tuple[str, ...]) -> list[Write]:
    return [(rng.choice(GARBAGE) + data, kinds)]


def _reversed(rng: random.Random, data: bytes, kinds: tuple[str, ...]) -> list[Write]:
    return [(data, kinds[::-1])]


_WAYS = [
    *(_one_more, _one_less, _others, _wrong_byte, _cut, _shuffled, _twice, _split, _a_line_less),
    *(_wrong_value, _wrong_value, _wrong_value, _garbage, _reversed),
]
