"""The command line, run as a user would."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
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


def test_doctor_names_a_channel() -> None:
    """A channel is told from variables that leaked here."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.set_inheritable(True)
        number = str(theirs.fileno())
        command = [sys.executable, "-m", "handleipc", "doctor"]
        for passed, words in ((True, "found at import: "), (False, "none, but stale variables: ")):
            done = subprocess.run(
                command,
                env={**os.environ, "NODE_CHANNEL_FD": number},
                pass_fds=[theirs.fileno()] if passed else [],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert re.search(rf"^channel\s+{words}.*NODE_CHANNEL_FD={number}", done.stdout, re.M)


@pytest.mark.parametrize("options", [[], ["--node"]])
def test_demo_ends_quietly_at_ctrl_c(options: list[str]) -> None:
    """Ctrl-C, which a terminal sends to parent and child, ends both without a traceback."""
    if options and shutil.which("node") is None:
        pytest.skip("no node in PATH")
    process = subprocess.Popen(
        [sys.executable, "-m", "handleipc", "demo", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with process:
        assert process.stdout is not None
        while "curl" not in process.stdout.readline():
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out.strip(), err) == (0, "", "")


def test_version() -> None:
    """``--version`` is the package's own."""
    from handleipc import __version__

    assert run("--version").stdout.strip().endswith(__version__)
    assert main.name == "main"
