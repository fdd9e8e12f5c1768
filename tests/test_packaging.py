"""What an installed package says of itself, and a program that was frozen with it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from handleipc import _pyinstaller

FROZEN = """
import asyncio, handleipc, handleipc.cli

async def main():
    child = await handleipc.fork("handleipc.cli:answer")
    async with handleipc.listen("127.0.0.1", 0) as server:
        reader, writer = await asyncio.open_connection(*server.sockname[:2])
        await child.send("socket", await anext(aiter(server)))
        print((await reader.read()).decode())
        writer.close()
    child.disconnect()
    await child.wait()

if __name__ == "__main__":
    handleipc.freeze_support()
    asyncio.run(main())
"""


def test_pyinstaller_finds_the_hook() -> None:
    (entry,) = (
        one
        for one in importlib.metadata.entry_points(group="pyinstaller40")
        if one.value.startswith("handleipc.")
    )
    (directory,) = entry.load()()
    assert [directory] == _pyinstaller.hook_dirs()
    hook = runpy.run_path(str(Path(directory) / "hook-handleipc.py"))
    assert "_cffi_backend" in hook["hiddenimports"]
    for name in hook["hiddenimports"]:
        assert importlib.import_module(name)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("PyInstaller") is None, reason="PyInstaller is not installed"
)
@pytest.mark.skipif(
    not sysconfig.get_config_var("Py_ENABLE_SHARED"),
    reason="PyInstaller needs an interpreter with a shared library, such as Debian's",
)
def test_a_frozen_program(tmp_path: Path) -> None:
    """It hands a connection to a child, which is the same program."""
    script = tmp_path / "frozen.py"
    script.write_text(FROZEN)
    subprocess.run(
        [
            *(sys.executable, "-m", "PyInstaller", "--onedir", "--log-level=ERROR"),
            # It does not follow the hooks of an editable installation.
            *("--paths", str(Path(_pyinstaller.__file__).parents[2]), str(script)),
        ],
        cwd=tmp_path,
        check=True,
        timeout=110,
    )
    done = subprocess.run(
        [tmp_path / "dist/frozen/frozen"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "Child handled it.\n"), done.stderr
