"""The paths of Unix servers: who removes them, and which."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import handleipc
from tests.asyncio.helpers import DIALECTS, joined, raw_peer


@pytest.fixture
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory to work in, which a test may leave."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def dial(path: str | bytes) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(10)
    client.connect(path)
    return client


async def test_removed_by_close(tmp_path: Path) -> None:
    """``listen_unix`` listens at a path, of whatever type, and ``close`` removes it."""
    for path in (tmp_path / "one", str(tmp_path / "two"), os.fsencode(tmp_path / "th\udcffree")):
        async with handleipc.listen_unix(path) as server:
            assert server.sockname == os.fsdecode(path)
            with dial(os.fspath(path)) as client:
                await (await anext(server)).end(b"x")
                assert client.recv(10) == b"x"
        assert not os.path.lexists(path)


async def test_path_that_exists(tmp_path: Path) -> None:
    """A path that exists is ``OSError``, and is left alone."""
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(OSError, match="file"):
        await handleipc.listen_unix(path)
    assert path.read_text() == "mine"


async def test_path_that_is_too_long(tmp_path: Path) -> None:
    """The error has a number, and says what is wrong with which path."""
    with pytest.raises(OSError, match="nnn'?: AF_UNIX path too long") as caught:
        await handleipc.listen_unix(tmp_path / ("n" * 200))
    assert caught.value.errno


async def test_path_with_a_nul(short: Path) -> None:
    """It is refused, rather than cut."""
    with pytest.raises(ValueError, match="is no path"):
        await handleipc.listen_unix("a\0b")
    assert list(short.iterdir()) == []


async def test_path_that_is_no_longer_ours(tmp_path: Path) -> None:
    """``close`` does not remove what another server has bound at the path meanwhile."""
    path = tmp_path / "socket"
    async with handleipc.listen_unix(path) as one:
        path.unlink()
        async with handleipc.listen_unix(path):
            one.close()
            assert path.exists()
        assert not path.exists()


@pytest.mark.parametrize("name", ["\0handleipc-test-{}", b"\0handleipc-test-b-{}", ""])
async def test_names_without_a_path(name: str | bytes) -> None:
    """An abstract name, and one the kernel chooses, have no path to remove."""
    if isinstance(name, bytes):
        name = name.replace(b"{}", b"%d" % os.getpid())
    else:
        name = name.format(os.getpid())
    async with handleipc.listen_unix(name) as server:
        with dial(server.sockname):
            (await anext(server)).close()
        assert server.close(unlink=True) == 0


async def test_relative_path_after_chdir(short: Path) -> None:
    """A relative path is what it was when it was bound, wherever the process works since."""
    (short / "elsewhere").mkdir()
    (short / "elsewhere" / "socket").write_text("somebody else's")
    server = await handleipc.listen_unix("socket")
    os.chdir("elsewhere")
    server.close()
    assert not os.path.lexists(short / "socket")
    assert Path("socket").read_text() == "somebody else's"


async def test_directory_swapped_for_a_link(tmp_path: Path) -> None:
    """A directory on the way that now is a link to another leads to nothing of ours."""
    (tmp_path / "real").mkdir()
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "socket").write_text("precious")
    async with handleipc.listen_unix(tmp_path / "real" / "socket"):
        (tmp_path / "real").rename(tmp_path / "moved")
        (tmp_path / "real").symlink_to(tmp_path / "victim")
    assert (tmp_path / "victim" / "socket").read_text() == "precious"


async def test_name_swapped_for_a_link(tmp_path: Path) -> None:
    """A link in place of the socket is not ours, even if it leads to the socket."""
    path = tmp_path / "socket"
    async with handleipc.listen_unix(path):
        path.rename(tmp_path / "moved")
        path.symlink_to(tmp_path / "moved")
    assert path.is_symlink()


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_transfer_leaves_the_path(dialect: str, tmp_path: Path) -> None:
    """A listener that was transferred can be dialled, and no path has travelled with it."""
    path = tmp_path / "socket"
    async with joined(dialect) as (here, there):
        server = await handleipc.listen_unix(path)
        await here.send("transferred", server, transfer=True)
        _, theirs = await there.recv()
        assert server.closed
        assert server.close(unlink=True) == 0
        with dial(str(path)) as client:
            connection = await anext(theirs)
            connection.close()
            assert client.recv(1) == b""
        theirs.close()
        assert path.exists()


async def test_shared_server_closed_here(tmp_path: Path) -> None:
    """Closing a shared server takes the path away; with ``unlink=False`` others go on."""
    for unlink in (None, False):
        path = tmp_path / f"socket {unlink}"
        async with joined("native") as (here, there):
            server = await handleipc.listen_unix(path)
            await here.send("shared", server)
            _, theirs = await there.recv()
            server.close(unlink=unlink)
            assert path.exists() is (unlink is False)
            theirs.close()
            assert path.exists() is (unlink is False)


async def test_receiver_says_so_himself(tmp_path: Path) -> None:
    """``close(unlink=True)`` removes the path of a received listener, and ``stop`` as well."""
    for how in ("close", "stop"):
        path = tmp_path / how
        async with joined("native") as (here, there):
            await here.send("x", await handleipc.listen_unix(path), transfer=True)
            _, theirs = await there.recv()
            getattr(theirs, how)(unlink=True)
            assert theirs.closed
            assert not path.exists()


async def test_receiver_removes_no_other_file(short: Path) -> None:
    """Not a file that is no socket, not a path that is relative to somebody else's directory."""
    async with joined("native") as (here, there):
        await here.send("x", await handleipc.listen_unix(short / "absolute"), transfer=True)
        _, one = await there.recv()
        await here.send("x", await handleipc.listen_unix("relative"), transfer=True)
        _, two = await there.recv()
    (short / "absolute").unlink()
    (short / "absolute").write_text("precious")
    one.close(unlink=True)
    with pytest.raises(ValueError, match="'relative' is relative"):
        two.close(unlink=True)
    assert one.closed and two.closed
    assert (short / "absolute").read_text() == "precious"
    assert (short / "relative").exists()


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_path_that_a_peer_names(dialect: str, tmp_path: Path) -> None:
    """An option ``unlink``, as older peers send it, is nobody's wish: nothing is removed."""
    path = str(tmp_path / "socket")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    async with raw_peer(dialect) as (channel, peer):
        if dialect == "node":
            lines = [{"cmd": "NODE_HANDLE", "type": "net.Server", "msg": "x", "unlink": path}]
        else:
            lines = [[1, 1], [2, 1, 1, "net.Server", "x", {"unlink": path}]]
        peer.write(*lines, fds=(listener.fileno(),))
        _, server = await channel.recv()
        listener.close()
        server.close()
        assert os.path.exists(path)
