"""The command line, run as a user would."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

from handleipc.cli import main


def run(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "handleipc", *args],
        capture_output=True,
        text=True,
        timeout=60,
        env=env,
        check=False,
    )


def test_demo_answers_from_the_child() -> None:
    """``demo --once`` ends with the child's answer, and says which process gave it."""
    result = run("demo", "--once")
    assert result.returncode == 0, result.stderr
    assert "answer: Child handled it." in result.stdout
    child = re.search(r"child (\d+)", result.stdout)
    assert child is not None
    assert f"answered by process {child[1]}" in result.stdout


@pytest.mark.parametrize("host", ["::1", "localhost", "::"])
def test_demo_at_another_address(host: str) -> None:
    """``--host`` takes names and IPv6 addresses, and what is printed can be pasted into a shell."""
    result = run("demo", "--once", "--host", host)
    assert result.returncode == 0, result.stderr
    assert "answer: Child handled it." in result.stdout
    shown = re.search(r"curl --http0.9 (.*)", result.stdout)
    assert shown is not None
    assert re.fullmatch(r"--globoff '\[[0-9a-f:]+\]:\d+'|[\d.]+:\d+", shown[1]), shown[1]


def test_demo_with_a_node_child(node: str) -> None:
    """``--node`` answers from a real Node.js."""
    path = node.rpartition("/")[0]
    curl = shutil.which("curl")
    result = run(
        "demo",
        "--once",
        "--node",
        env={"PATH": f"{path}:{curl.rpartition('/')[0]}" if curl else path},
    )
    assert result.returncode == 0, result.stderr
    assert "(Node.js)" in result.stdout
    assert "answer: Child handled it." in result.stdout


def test_demo_without_node() -> None:
    """A missing Node.js is one clear sentence."""
    result = run("demo", "--once", "--node", env={"PATH": "/nonexistent"})
    assert result.returncode == 1
    assert "install Node.js" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("port", ["99999", "-1", "http"])
def test_demo_refuses_a_bad_port(port: str) -> None:
    """A port that is none is refused before anything starts."""
    result = run("demo", "--port", port)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_doctor_says_what_a_bug_report_needs() -> None:
    """Platform, C core, limits and Node are in the output."""
    result = run("doctor")
    assert result.returncode == 0, result.stderr
    for row in ("handleipc", "python", "platform", "C core", "descriptors", "pidfd", "node"):
        assert re.search(rf"^{row}\s+\S", result.stdout, re.MULTILINE), row
    assert "works" in result.stdout


def test_version() -> None:
    """``--version`` is the package's own."""
    from handleipc import __version__

    assert run("--version").stdout.strip().endswith(__version__)
    assert main.name == "main"
