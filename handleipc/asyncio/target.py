"""The program behind ``fork("module:function")``, in the child; and behind any ``fork``, frozen."""

from __future__ import annotations

import asyncio
import difflib
import importlib
import inspect
import runpy
import signal
import sys
from collections.abc import Callable
from typing import Any

from handleipc.asyncio.channel import Channel
from handleipc.asyncio.process import parent
from handleipc.asyncio.starting import Frozen
from handleipc.commands import FORK_MARKER, read_target

__all__ = ["freeze_support", "run"]


def run(module: str, function: str) -> None:
    """Import ``module`` and call its ``function`` with the channel to the parent."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Adopted first: the parent may be sending already, and the import may take its time.
    asyncio.run(_run(module, function))


async def _run(module: str, function: str) -> None:
    channel = await parent()
    result = _find(module, function, channel)(channel)
    if inspect.isawaitable(result):
        await result
    else:
        # A plain function has set up listeners: they are what the process is for.
        await channel.wait_disconnected()


def _find(module: str, function: str, channel: Channel) -> Callable[[Any], Any]:
    """Import the function. What the parent named wrongly ends the process with one sentence."""

    def wrong(text: str) -> SystemExit:
        return SystemExit(f"handleipc.fork({f'{module}:{function}'!r}): {text}")

    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # another module, which this one imports
        hint = ""
        if module.endswith(".py"):
            hint = f" Name the module, not its file: {module[:-3] + ':' + function!r}."
        places = ", ".join(map(str, sys.path))
        raise wrong(
            f"there is no module {error.name!r}.{hint} It is looked up in the parent's sys.path:"
            f" {places}"
        ) from None
    except RuntimeError as error:
        if "running event loop" not in str(error):
            raise
        raise wrong(
            f"importing module {module!r} starts an event loop: put its asyncio.run(...) under"
            " if __name__ == '__main__':"
        ) from None
    try:
        target: Callable[[Any], Any] = getattr(found, function)
    except AttributeError:
        close = difflib.get_close_matches(function, dir(found), 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        place = getattr(found, "__file__", None) or "built in"
        raise wrong(f"module {module!r} ({place}) has no function {function!r}.{hint}") from None
    if not callable(target):
        raise wrong(f"it is no function, but of type {type(target).__name__!r}")
    try:
        inspect.signature(target).bind(channel)
    except TypeError as error:
        raise wrong(f"it has to take one argument, the channel to the parent: {error}") from None
    except ValueError:
        pass  # something built in that does not say
    return target


def freeze_support() -> None:
    """Let ``fork`` work in a program that was frozen into an executable (PyInstaller and others).

    There ``sys.executable`` is the program itself, so a child is the program started again, with an
    argument that this function knows: it then runs the child's target, and does not return. To be
    called first in the main module, as its namesake in ``multiprocessing``::

        if __name__ == "__main__":
            handleipc.freeze_support()
            asyncio.run(main())

    In any other process it does nothing.
    """
    Frozen.is_supported = True
    if sys.argv[1:2] != [FORK_MARKER]:
        return
    text, args = sys.argv[2], sys.argv[3:]
    file, module, function = read_target(text)
    sys.argv[:] = [file or sys.argv[0], *args]
    if file is not None:
        runpy.run_path(file, run_name="__main__")
    elif function:
        run(module, function)
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit()
