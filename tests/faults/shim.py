"""Builds the C programs of this folder, and arms the shim in the process that preloads it."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import handleipc

HERE = Path(__file__).parent
LIBRARY = os.path.dirname(os.path.abspath(handleipc.__file__)) + os.sep
COMPILER = shutil.which("gcc") or shutil.which("cc")

Roles = Callable[[int], str]


def build(directory: Path) -> tuple[Path, Path]:
    """Compile the shim and the child program into a directory; return their paths."""
    assert COMPILER is not None
    shim, peer = directory / "shim.so", directory / "peer"
    options = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror"]
    for command in (
        [COMPILER, *options, "-shared", "-fPIC", HERE / "shim.c", "-o", shim, "-ldl"],
        [COMPILER, *options, HERE / "peer.c", "-o", peer],
    ):
        subprocess.run(command, check=True, timeout=100)
    return shim, peer


class Shim:
    """The preloaded shim. ``sites`` are the calls it has counted, in order, while recording."""

    def __init__(self) -> None:
        self._lib = ctypes.CDLL(None)
        self._lib.fault_names.restype = ctypes.POINTER(ctypes.c_char_p)
        self._lib.fault_count.restype = ctypes.c_long
        names = self._lib.fault_names()
        self.names: list[str] = []
        while (name := names[len(self.names)]) is not None:
            self.names.append(name.decode())
        self._hook = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int)(self._is_ours)
        self.sites: dict[str, list[str]] = {}
        self.role: Roles = lambda fd: ""
        self.paused = False

    def arm(self, call: str | None, at: int, error: int, *, sticky: bool) -> None:
        """Begin to count; make the ``at``-th use of ``call`` fail, if there is one named."""
        number = self.names.index(call) if call is not None else -1
        self.sites = {name: [] for name in self.names}
        self._lib.fault_arm(
            number, ctypes.c_long(at if call else 0), error, int(sticky), self._hook
        )

    def lose(self, receptions: int) -> None:
        """Have so many receptions of descriptors lose them, beside what is armed."""
        self._lib.fault_lose(receptions)

    def disarm(self) -> None:
        self._lib.fault_disarm()

    @property
    def fired(self) -> int:
        """How often the call was made to fail."""
        return int(self._lib.fault_fired())

    def counts(self) -> dict[str, int]:
        """How often each call was used while armed."""
        return {name: int(self._lib.fault_count(i)) for i, name in enumerate(self.names)}

    def _is_ours(self, call: int, fd: int) -> int:
        """Whether the library made this call, itself or through the standard library."""
        if self.paused:
            return 0
        frame: FrameType | None = sys._getframe().f_back  # None in a thread that is starting
        via = ""
        while frame is not None:
            name = frame.f_code.co_filename
            kind = _kind(name)
            if kind == "ours":
                role = self.role(fd) if fd >= 0 else ""
                where = f"{Path(name).stem}.{frame.f_code.co_qualname}:{frame.f_lineno}"
                self.sites[self.names[call]].append(f"{where} {role}{via}".strip())
                return 1
            if kind == "test":
                return 0
            via = f" by {Path(name).stem}"
            frame = frame.f_back
        return 0


@functools.cache
def _kind(filename: str) -> str:
    folder = os.path.dirname(filename)
    if folder == str(HERE):
        return "test"
    return "ours" if (folder + os.sep).startswith(LIBRARY) else ""
