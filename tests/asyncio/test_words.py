"""What is said to who gets an argument wrong: what happened, whose fault it is, what to do."""

from __future__ import annotations

from typing import Any

import pytest

import handleipc


@pytest.mark.parametrize(
    "use",
    [
        lambda listening: listening.close(),
        lambda listening: aiter(listening),
    ],
)
async def test_listen_not_awaited(use: Any) -> None:
    """What ``listen`` returns is no server yet, and says how it becomes one."""
    with pytest.raises((AttributeError, TypeError), match="has not been awaited: write"):
        use(handleipc.listen("127.0.0.1", 0))


async def test_port_as_text() -> None:
    """A port is a number."""
    with pytest.raises(TypeError, match="port='80': give an integer"):
        handleipc.listen("127.0.0.1", "80")  # type: ignore[arg-type]


async def test_host_with_a_port() -> None:
    """Host and port are two arguments."""
    with pytest.raises(OSError, match="the port is an argument of its own"):
        await handleipc.listen("127.0.0.1:80", 80)


async def test_listener_that_is_none() -> None:
    """Said at once, not at the first message."""
    async with handleipc.listen("127.0.0.1", 0) as server:
        with pytest.raises(TypeError, match="7 cannot be called"):
            server.on("drop", 7)  # type: ignore[type-var]


async def test_max_connections_as_text() -> None:
    """Said at once, not when a client comes."""
    async with handleipc.listen("127.0.0.1", 0) as server:
        with pytest.raises(TypeError, match="max_connections='5': give an integer or None"):
            server.max_connections = "5"  # type: ignore[assignment]
        server.max_connections = 5
        assert server.max_connections == 5


async def test_program_that_is_none() -> None:
    """The argument is named by its place."""
    with pytest.raises(TypeError, match="argument 2 is 7"):
        await handleipc.spawn("echo", 7)  # type: ignore[arg-type]
