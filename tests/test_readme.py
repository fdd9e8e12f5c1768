"""The README's programs run as printed, and the wire document's examples are what is written."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.listening import dial_when_it_listens, free_port

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ANSWER = b"Child handled it."


def programs() -> dict[str, str]:
    blocks = re.findall(r"```python\n(# (\w+\.py)\n.*?)```", README, re.DOTALL)
    return {name: text for text, name in blocks}


def ask(process: subprocess.Popen[bytes], port: int) -> bytes:
    """Be the client, as soon as it listens."""
    with dial_when_it_listens(process, port, timeout=20) as client:
        answer = b""
        while chunk := client.recv(1024):
            answer += chunk
        return answer


def serve(command: list[str], directory: Path, port: int, env: dict[str, str]) -> bytes:
    process = subprocess.Popen(
        command,
        cwd=directory,
        env={**os.environ, **env},
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        return ask(process, port)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)


@pytest.fixture
def readme(tmp_path: Path) -> tuple[Path, int]:
    """The README's programs in a directory, on a port of their own."""
    port = free_port()
    for name, text in programs().items():
        (tmp_path / name).write_text(text.replace("1337", str(port)))
    return tmp_path, port


def test_parent_and_child(readme: tuple[Path, int]) -> None:
    """The two programs of the first screen answer a client."""
    directory, port = readme
    assert serve([sys.executable, "parent.py"], directory, port, {}) == ANSWER


def test_script_without_an_event_loop(readme: tuple[Path, int]) -> None:
    """The same child answers for a parent that has none."""
    directory, port = readme
    assert serve([sys.executable, "script.py"], directory, port, {}) == ANSWER


def test_node_parent(readme: tuple[Path, int], node: str) -> None:
    """The same child works under a real Node parent."""
    directory, port = readme
    (directory / "parent.js").write_text((ROOT / "examples" / "node_parent.js").read_text())
    env = {"PYTHON": sys.executable, "PORT": str(port)}
    assert serve([node, "parent.js"], directory, port, env) == ANSWER


def test_node_child(readme: tuple[Path, int], node: str) -> None:
    """The same parent works with a real Node child."""
    directory, port = readme
    (directory / "child.js").write_text((ROOT / "examples" / "node_child.js").read_text())
    parent = directory / "parent.py"
    parent.write_text(
        parent.read_text().replace('fork("child.py")', f'spawn({node!r}, "child.js")')
    )
    assert serve([sys.executable, "parent.py"], directory, port, {}) == ANSWER


def test_every_file_the_readme_names_exists() -> None:
    """No link of the README is broken."""
    for target in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / target).exists(), target
