"""The command line that starts a Python child, as data; and reading it back in the child.

Starts nothing: the fronts do.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

__all__ = [
    "FORK_MARKER",
    "Target",
    "frozen_command",
    "python_command",
    "read_target",
]


class Target(NamedTuple):
    """What ``fork`` runs: a file, or a module, or a function of one."""

    file: str | None = None
    module: str = ""
    function: str = ""


def read_target(target: str | os.PathLike[str]) -> Target:
    """Return what a target means.

    Raises:
        ValueError: it is neither a file, nor a module, nor ``module:function``.
        TypeError: it is no text and no path.
    """
    if callable(target) and hasattr(target, "__qualname__"):
        raise TypeError(
            f"a child imports what it runs: give its name, {_name_of(target)}, not the object"
        )
    if not isinstance(target, str | os.PathLike):
        raise TypeError(f"target={target!r}: {_TARGETS}")
    if not isinstance(target, str) or target.endswith(".py") or "/" in target:
        return Target(file=os.fspath(target))
    module, colon, function = target.partition(":")
    names = [*module.split("."), *([function] if colon else [])]
    if not all(name.isidentifier() for name in names):
        raise ValueError(f"{target!r} is no target: {_TARGETS}")
    if module == "__main__" and colon:
        raise ValueError(f"{_MAIN}: move it to a module")
    return Target(None, module, function)


_TARGETS = "give the path of a .py file, a dotted module, or 'module:function'"
_MAIN = "a function of __main__ cannot be imported elsewhere"


def _name_of(function: object) -> str:
    module = getattr(function, "__module__", None) or "module"
    name = getattr(function, "__qualname__", "")
    if not name.isidentifier():
        return "'module:function' (of one at the top of a module, which this is not)"
    if module == "__main__":
        return f"'module:{name}' ({_MAIN}: move it to a module first)"
    return repr(f"{module}:{name}")


def python_command(
    target: str | os.PathLike[str],
    args: Sequence[str],
    executable: str,
    interpreter_args: Sequence[str],
    path: Sequence[str],
) -> list[str]:
    """Return the command line that runs ``target`` in a fresh interpreter.

    Args:
        target: a file, a dotted module, or ``module:function``.
        args: the program's own arguments.
        executable: the interpreter.
        interpreter_args: its options.
        path: what a function's module is looked up in. What is relative there is meant from here,
            wherever the child begins.

    Raises:
        ValueError, TypeError: as ``read_target``.
    """
    file, module, function = read_target(target)
    command = [executable, *interpreter_args]
    if file is not None:
        # Not an option of the interpreter, whatever the file is called.
        prefix = "./" if file.startswith("-") else ""
        return [*command, prefix + file, *args]
    if not function:
        return [*command, "-m", module, *args]
    # A terminal's Ctrl-C ends a child that is still being imported without a traceback; then
    # `run` sets it right.
    program = (
        "import signal, sys\n"
        "if signal.getsignal(signal.SIGINT) is signal.default_int_handler:\n"
        "    signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        f"sys.path[:] = {list(map(_from_here, path))!r}\n"
        "from handleipc.asyncio.target import run\n"
        f"run({module!r}, {function!r})"
    )
    return [*command, "-c", program, *args]


def _from_here(entry: str) -> str:
    # What does not exist is no directory, but perhaps the name by which an import hook knows its
    # entry (setuptools' editable installs have such).
    try:
        return os.path.abspath(entry) if not entry or os.path.exists(entry) else entry
    except OSError:
        return entry  # the current directory is gone, and so is what was in it


FORK_MARKER = "--handleipc-fork"


def frozen_command(
    target: str | os.PathLike[str], args: Sequence[str], executable: str
) -> list[str]:
    """Return the command line that has a frozen program run ``target``, in ``freeze_support()``.

    Raises:
        ValueError, TypeError: as ``read_target``.
    """
    file, module, function = read_target(target)
    if file is None:
        text = f"{module}:{function}" if function else module
    else:
        text = file if file.endswith(".py") or "/" in file else f"./{file}"
    return [executable, FORK_MARKER, text, *args]
