"""The rules of node-wire.md 9.1, against a raw peer that can do what Node cannot be made to do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.interop.raw import ACK, HERE, NACK, PRELUDE, RawParent, envelope, raw_parent, tcp_pair

pytestmark = pytest.mark.usefixtures("child_loop")


# -- receiving handles ---------------------------------------------------------------------------

COLLECT = """
    async def main(parent):
        async for message, handle in parent:
            if handle is None:
                await parent.send([message, None])
            else:
                await parent.send([message, type(handle).__name__])
                handle.close()
"""


def test_one_ack_per_handle(tmp_path: Path) -> None:
    """Each NODE_HANDLE gets exactly one ACK, before the application's answer."""
    with raw_parent(tmp_path, COLLECT) as raw:
        for n in range(3):
            with tcp_pair() as (_, accepted):
                raw.send(envelope("net.Socket", n), accepted.fileno())
            assert raw.recv() == ACK
            assert raw.recv() == [n, "Connection"]
        raw.send("end")
        assert raw.recv() == ["end", None]
        assert raw.disconnect() == []
        raw.finish()


def test_nested_retry(tmp_path: Path) -> None:
    """A retry, which Node wraps into a second envelope, is unwrapped and acknowledged once."""
    with raw_parent(tmp_path, COLLECT) as raw, tcp_pair() as (_, accepted):
        inner = envelope("net.Socket", {"n": 1}, key="4:127.0.0.1:0")
        raw.send(envelope("net.Native", inner), accepted.fileno())
        assert raw.recv() == ACK
        assert raw.recv() == [{"n": 1}, "Connection"]
        raw.send("end")
        assert raw.recv() == ["end", None]
        assert raw.disconnect() == []
        raw.finish()


def test_large_message_with_handle_in_pieces(tmp_path: Path) -> None:
    """A handle stays with its message, however many reads that takes."""
    with raw_parent(tmp_path, COLLECT) as raw, tcp_pair() as (_, accepted):
        pad = "x" * 300_000
        raw.send("before")
        raw.send(envelope("net.Socket", pad), accepted.fileno())
        raw.send("after")
        assert raw.recv() == ["before", None]
        assert raw.recv() == ACK
        assert raw.recv() == [pad, "Connection"]
        assert raw.recv() == ["after", None]
        assert raw.disconnect() == []
        raw.finish()


def test_inner_message_is_classified(tmp_path: Path) -> None:
    """An internal message with a handle goes to "internal_message", with the handle."""
    text = """
        async def main(parent):
            done = asyncio.Event()
            async def on_internal(message, handle):
                await parent.send([message, type(handle).__name__])
                handle.close()
                done.set()
            parent.on("internal_message", on_internal)
            await done.wait()
    """
    with raw_parent(tmp_path, text) as raw, tcp_pair() as (_, accepted):
        raw.send(envelope("net.Socket", {"cmd": "NODE_foo"}), accepted.fileno())
        assert raw.recv() == ACK
        assert raw.recv() == [{"cmd": "NODE_foo"}, "Connection"]
        assert raw.rest() == []
        raw.finish()


# -- sending handles -----------------------------------------------------------------------------


def take_back(raw: RawParent) -> tuple[Any, int]:
    """Give the child a connection, which it sends back; returns its line and the descriptor."""
    with tcp_pair() as (_, accepted):
        raw.send(envelope("net.Socket", "yours"), accepted.fileno())
        assert raw.recv() == ACK
        return raw.recv_handle()


def test_nack_sends_the_same_again(tmp_path: Path) -> None:
    """A NACK brings the same line again, three times with growing pauses; then it is given back."""
    text = """
        async def main(parent):
            _, connection = await parent.recv()
            try:
                await parent.send({"n": 1}, connection)
            except handleipc.HandleNotDelivered as error:
                assert error.handle is connection
                await parent.send(["given back", error.reason])
            with connection.socket() as sock:
                sock.sendall(b"still usable")
    """
    with raw_parent(tmp_path, text) as raw, tcp_pair() as (client, accepted):
        raw.send(envelope("net.Socket", None), accepted.fileno())
        accepted.close()
        assert raw.recv() == ACK
        pauses = []
        for attempt in range(4):
            began = time.monotonic()
            message, fd = raw.recv_handle()
            pauses.append(time.monotonic() - began)
            os.close(fd)
            assert message == envelope("net.Socket", {"n": 1}), attempt
            raw.send(NACK)
        given_back, reason = raw.recv()
        assert given_back == "given back"
        assert reason
        assert raw.rest() == []
        assert client.recv(100) == b"still usable"
        # At least so long: how much longer is the scheduler's affair.
        assert all(pause >= least for pause, least in zip(pauses, (0, 0.001, 0.004, 0.016)))
        client.close()
        raw.finish()


def test_retry_accepted(tmp_path: Path) -> None:
    """A handle that is acknowledged at its second try is delivered, and the next starts afresh."""
    text = """
        async def main(parent):
            for _ in range(2):
                _, connection = await parent.recv()
                await parent.send("take it", connection)
                assert connection.closed
                await parent.send("delivered")
    """
    with raw_parent(tmp_path, text) as raw:
        for _ in range(2):
            message, fd = take_back(raw)
            os.close(fd)
            for _ in range(3):
                raw.send(NACK)
                again, fd = raw.recv_handle()
                os.close(fd)
                assert again == message
            raw.send(ACK)
            assert raw.recv() == "delivered"
        assert raw.rest() == []
        raw.finish()


@pytest.mark.parametrize("stray", [ACK, NACK], ids=["ack", "nack"])
def test_stray_reply(tmp_path: Path, stray: dict[str, str]) -> None:
    """An ACK or NACK that nothing waits for is one warning a minute, and counts for nothing later."""
    text = """
        class Collect(logging.Handler):
            def emit(self, record):
                print(record.levelname)

        async def main(parent):
            logging.getLogger("handleipc").addHandler(Collect())
            logging.getLogger("handleipc").propagate = False
            parent.on("error", lambda error: print("error", error))
            _, connection = await parent.recv()
            await parent.send("take it", connection)
            await parent.send("delivered")
    """
    with raw_parent(tmp_path, text) as raw:
        raw.send(stray)
        raw.send(stray)
        message, fd = take_back(raw)
        os.close(fd)
        raw.send(ACK)
        assert raw.recv() == "delivered"
        assert raw.rest() == []
        assert raw.finish().split() == ["WARNING"]


def test_one_handle_in_flight(tmp_path: Path) -> None:
    """Behind an unanswered handle everything is held, in order, but for ACK and NACK."""
    text = """
        async def main(parent):
            parent.on("error", lambda error: None)
            connections = [(await parent.recv())[1] for _ in range(2)]
            parent.send_nowait("first", connections[0])
            parent.send_nowait("a")
            parent.send_nowait("second", connections[1])
            parent.send_nowait("b")
            message, handle = await parent.recv()
            handle.close()
            await parent.flush()
    """
    with raw_parent(tmp_path, text) as raw, tcp_pair() as (_, accepted):
        for _ in range(2):
            raw.send(envelope("net.Socket", None), accepted.fileno())
            assert raw.recv() == ACK
        message, fd = raw.recv_handle()
        os.close(fd)
        assert message["msg"] == "first"
        raw.send(envelope("net.Socket", "crossing"), accepted.fileno())
        assert raw.recv() == ACK, "an ACK passes"
        raw.send(envelope("net.Socket", "without a descriptor"))
        assert raw.recv() == NACK, "a NACK passes"
        raw.send(ACK)
        assert raw.recv() == "a"
        message, fd = raw.recv_handle()
        os.close(fd)
        assert message["msg"] == "second"
        raw.send(ACK)
        assert raw.recv() == "b"
        assert raw.rest() == []
        raw.finish()


def test_descriptor_with_the_first_byte(tmp_path: Path) -> None:
    """A descriptor leaves with the first byte of its line, also when the buffer is full."""
    text = """
        async def main(parent):
            _, connection = await parent.recv()
            parent.send_nowait("x" * 1_000_000)
            parent.send_nowait("y" * 1_000_000, connection)
            parent.send_nowait("z" * 1_000_000)
            await parent.flush()
    """
    with raw_parent(tmp_path, text) as raw, tcp_pair() as (_, accepted):
        raw.send(envelope("net.Socket", None), accepted.fileno())
        assert raw.recv() == ACK
        assert raw.recv() == "x" * 1_000_000
        message, fd = raw.recv_handle()
        os.close(fd)
        assert message == envelope("net.Socket", "y" * 1_000_000)
        raw.send(ACK)
        assert raw.recv() == "z" * 1_000_000
        assert raw.rest() == []
        raw.finish()


def test_what_is_sent_is_non_blocking(tmp_path: Path) -> None:
    """Every kind of descriptor leaves in non-blocking mode, and with the envelope Node writes."""
    text = """
        async def main(parent):
            with socket.create_server(("127.0.0.1", 0)) as server:
                client = socket.create_connection(server.getsockname())
                accepted, _ = server.accept()
                with client, accepted, socket.socket(type=socket.SOCK_DGRAM) as udp:
                    udp.bind(("127.0.0.1", 0))
                    reading, writing = os.pipe()
                    with open(reading, "rb") as reading, open(writing, "wb"):
                        for handle in (handleipc.Native(accepted), accepted, server, udp,
                                       handleipc.Native(server), handleipc.Native(udp),
                                       handleipc.Native(reading)):
                            inner = handle.source if type(handle) is handleipc.Native else handle
                            os.set_blocking(inner.fileno(), True)
                            await parent.send(None, handle)
    """
    with raw_parent(tmp_path, text) as raw:
        for kind in (
            "net.Native",
            "net.Socket",
            "net.Server",
            "dgram.Socket",
            "net.Native",
            "dgram.Native",
            "net.Native",
        ):
            message, fd = raw.recv_handle()
            assert not os.get_blocking(fd), kind
            os.close(fd)
            more = {"dgramType": "udp4"} if kind == "dgram.Socket" else {}
            assert message == envelope(kind, None, **more)
            raw.send(ACK)
        assert raw.rest() == []
        raw.finish()


# -- messages ------------------------------------------------------------------------------------


def test_spelling(tmp_path: Path) -> None:
    """A line is plain ASCII or UTF-8 JSON: NaN is null, a lone surrogate is escaped."""
    text = r"""
        async def main(parent):
            await parent.send([float("nan"), float("inf"), -float("inf")])
            await parent.send("\ud800")
            await parent.send(2**53 + 1)
            await parent.send(10**400)
            await parent.send("line\nfeed\r\0\x7f")
            await parent.send(None)
            message, _ = await parent.recv()
            assert message == ["\ud800", 2**53 + 1, 10**400], message
    """
    with raw_parent(tmp_path, text) as raw:
        assert raw.recv_line()[0] == b"[null,null,null]\n"
        assert raw.recv_line()[0].lower() == b'"\\ud800"\n'
        assert raw.recv_line()[0] == b"9007199254740993\n"
        assert raw.recv_line()[0] == b"1" + b"0" * 400 + b"\n"
        assert raw.recv() == "line\nfeed\r\0\x7f"
        assert raw.recv_line()[0] == b"null\n"
        raw.send(["\ud800", 2**53 + 1, 10**400])
        assert raw.rest() == []
        raw.finish()


def test_spaces_around_a_line(tmp_path: Path) -> None:
    """Spaces, tabs and a carriage return around a message are accepted, as Node does."""
    with raw_parent(tmp_path, COLLECT) as raw:
        raw.send(b' \t"x" \r\n')
        assert raw.recv() == ["x", None]
        assert raw.disconnect() == []
        raw.finish()


def test_user_messages(tmp_path: Path) -> None:
    """``{"cmd": "NODE_"}``, arrays and a ``cmd`` that is no string are user messages."""
    with raw_parent(tmp_path, COLLECT) as raw:
        for message in (
            {"cmd": "NODE_"},
            [{"cmd": "NODE_foo"}],
            ["NODE_foo"],
            {"cmd": 5},
            {"cmd": "fooNODE_"},
            {"cmd": "node_foo"},
        ):
            raw.send(message)
            assert raw.recv() == [message, None]
        assert raw.disconnect() == []
        raw.finish()


def test_internal_message_without_listener(tmp_path: Path) -> None:
    """An internal message is no user message, and nobody need listen to it."""
    with raw_parent(tmp_path, COLLECT) as raw:
        raw.send({"cmd": "NODE_foo"})
        raw.send("user")
        assert raw.recv() == ["user", None]
        assert raw.disconnect() == []
        raw.finish()


def test_reserved_messages_are_refused(tmp_path: Path) -> None:
    """A message that reads as a command of the protocol is refused at ``send``, nothing leaves."""
    text = """
        async def main(parent):
            for cmd in ("NODE_HANDLE", "NODE_HANDLE_ACK", "NODE_HANDLE_NACK",
                        "NODE_SOCKET_COUNT", "NODE_HANDLEIPC"):
                try:
                    parent.send_nowait({"cmd": cmd})
                except handleipc.MessageNotSerializable as error:
                    assert isinstance(error, TypeError)
                else:
                    raise AssertionError(cmd)
            parent.send_nowait({"cmd": "NODE_foo"})
            await parent.flush()
    """
    with raw_parent(tmp_path, text) as raw:
        assert raw.rest() == [{"cmd": "NODE_foo"}]
        raw.finish()


# -- the life of a channel -----------------------------------------------------------------------


def test_first_line_towards_node(tmp_path: Path) -> None:
    """A child that was not invited writes nothing of its own, and speaks "node"."""
    text = """
        async def main(parent):
            assert parent.dialect == "node"
            await parent.send("first")
            assert [n for n in os.environ if n.startswith(("NODE_CHANNEL", "HANDLEIPC"))] == []
    """
    with raw_parent(tmp_path, text) as raw:
        assert raw.rest() == ["first"]
        raw.finish()


def test_message_before_the_child_listens(tmp_path: Path) -> None:
    """What is in the socket before the child has started arrives, then the end."""
    text = """
        async def main(parent):
            print(json.dumps([message async for message, _ in parent]))
    """
    with raw_parent(tmp_path, text) as raw:
        for n in range(3):
            raw.send(n)
        assert raw.finish() == "[0, 1, 2]\n"


def test_parent_closes_first(tmp_path: Path) -> None:
    """At the child, "disconnect" comes once, ``connected`` is false, and ``send`` fails clearly."""
    text = """
        async def main(parent):
            parent.on("disconnect", lambda: print("disconnect", parent.connected))
            await parent.wait_disconnected()
            try:
                await parent.send("late")
            except handleipc.ChannelClosed as error:
                print(type(error).__name__)
            parent.disconnect()
    """
    with raw_parent(tmp_path, text) as raw:
        assert raw.finish() == "disconnect False\nChannelBroken\n"


def test_disconnect_flushes(tmp_path: Path) -> None:
    """What was sent before ``disconnect`` arrives, however much it is."""
    text = """
        async def main(parent):
            for n in range(20):
                parent.send_nowait([n, "x" * 100_000])
            parent.disconnect()
            assert not parent.connected
    """
    with raw_parent(tmp_path, text) as raw:
        assert [n for n, _ in raw.rest()] == list(range(20))
        raw.finish()


@pytest.mark.parametrize("mode", ["advanced", "nonsense"])
def test_unknown_serialization(tmp_path: Path, mode: str) -> None:
    """A serialization mode this end does not speak is refused by name, and nothing is written."""
    path = tmp_path / "program.py"
    path.write_text(
        PRELUDE
        + "async def main():\n"
        + "    try:\n"
        + "        await handleipc.parent()\n"
        + "    except handleipc.HandleIPCError as error:\n"
        + "        print(error)\n"
        + "asyncio.run(main())\n"
    )
    ours, theirs = socket.socketpair()
    with ours, theirs:
        run = subprocess.run(
            [sys.executable, path],
            env={
                **os.environ,
                "PYTHONPATH": str(HERE),
                "NODE_CHANNEL_FD": str(theirs.fileno()),
                "NODE_CHANNEL_SERIALIZATION_MODE": mode,
            },
            pass_fds=[theirs.fileno()],
            capture_output=True,
            text=True,
            timeout=20,
        )
        theirs.close()
        assert ours.recv(100) == b""
    assert mode in run.stdout
    assert run.stderr == ""


@pytest.mark.parametrize("value", [None, "", "99", "-1", "x", "1"])
def test_no_channel(tmp_path: Path, value: str | None) -> None:
    """A variable that names no channel is ``NoChannel``, not a crash."""
    path = tmp_path / "program.py"
    path.write_text(
        PRELUDE
        + "async def main():\n"
        + "    try:\n"
        + "        await handleipc.parent()\n"
        + "    except handleipc.NoChannel as error:\n"
        + "        print('NoChannel')\n"
        + "asyncio.run(main())\n"
    )
    env = {**os.environ, "PYTHONPATH": str(HERE)}
    if value is not None:
        env["NODE_CHANNEL_FD"] = value
    run = subprocess.run(
        [sys.executable, path], env=env, capture_output=True, text=True, timeout=20
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "NoChannel\n", "")
