"""The libFuzzer targets of the C core: built, and run for a few seconds each."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "csrc" / "run"
TARGETS = sorted(path.stem.removeprefix("fuzz_") for path in RUN.parent.glob("fuzz_*.c"))


def test_every_target_has_inputs_to_begin_with() -> None:
    """Each target has a corpus, of small files."""
    assert TARGETS == ["control", "framer", "socket"]
    for target in TARGETS:
        sizes = [path.stat().st_size for path in (RUN.parent / "corpus" / target).iterdir()]
        assert sizes
        assert max(sizes) <= 1024


@pytest.mark.skipif(shutil.which("clang") is None, reason="no clang")
@pytest.mark.parametrize("target", TARGETS)
def test_fuzz(target: str, tmp_path: Path) -> None:
    """Five seconds of inputs that nobody thought of find nothing."""
    done = subprocess.run(
        [RUN, "5", target],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=110,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "stat::number_of_executed_units" in done.stdout
