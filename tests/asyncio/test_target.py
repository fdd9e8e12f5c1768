"""What ``fork("module:function")`` says of a wrong name, frozen programs, and Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import handleipc

Program = Callable[[str, str], Path]

PIPE = subprocess.PIPE


@pytest.fixture
def workers(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of functions, and one that cannot be imported."""
    program(
        "workers.py",
        """
        NUMBER = 7

        async def work(parent):
            async for message, _ in parent:
                await parent.send(message)

        def takes_nothing():
            pass

        async def fails(parent):
            raise LookupError("of the function")
        """,
    )
    program("broken.py", "import no_such_module")
    program("syntax.py", "def work(:")
    program("raises.py", "raise LookupError('of the module')")
    monkeypatch.syspath_prepend(tmp_path)


async def ended(target: str) -> tuple[int | None, str]:
    """Return how a child ends that fails, and what it wrote to stderr."""
    child = await handleipc.fork(target, stderr=PIPE)
    async with asyncio.timeout(30):
        text = (await child.stderr.read()).decode()
        return await child.wait(), text


@pytest.mark.parametrize(
    ("target", "texts"),
    [
        ("workers:wrok", ["fork('workers:wrok')", "workers.py) has no function 'wrok'", "'work'?"]),
        ("workers:nothing_like_it", ["has no function 'nothing_like_it'.\n"]),
        ("workers:NUMBER", ["it is no function, but of type 'int'"]),
        ("workers:takes_nothing", ["it has to take one argument, the channel to the parent"]),
        ("wrokers:work", ["there is no module 'wrokers'", "sys.path"]),
        ("wrokers.inner:work", ["there is no module 'wrokers'"]),
        ("workers.inner:work", ["there is no module 'workers.inner'"]),
        ("workers.py:work", ["Name the module, not its file: 'workers:work'"]),
        ("sys:nothing", ["module 'sys' (built in) has no function"]),
    ],
)
async def test_wrong_names(workers: None, target: str, texts: list[str]) -> None:
    """What the parent named wrongly is one sentence without a traceback, and exit code 1."""
    code, said = await ended(target)
    assert code == 1
    assert "Traceback" not in said
    assert len(said.splitlines()) == 1
    for text in texts:
        assert text in said


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("broken:work", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("syntax:work", "SyntaxError"),
        ("raises:work", "LookupError: of the module"),
        ("workers:fails", "LookupError: of the function"),
    ],
)
async def test_crashes_are_visible(workers: None, target: str, text: str) -> None:
    """What fails in the module or the function itself is a traceback, and exit code 1."""
    code, said = await ended(target)
    assert code == 1
    assert said.startswith("Traceback")
    assert text in said.splitlines()[-1]
    assert "sys.path[:]" not in said


async def test_builtin_that_does_not_say_what_it_takes(workers: None) -> None:
    """A function without a signature is called all the same."""
    child = await handleipc.fork("builtins:type")
    child.disconnect()
    async with asyncio.timeout(20):
        assert await child.wait() == 0


async def test_relative_path_with_cwd(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative entry of ``sys.path`` means the same directory to a child that begins elsewhere."""
    (tmp_path / "lib").mkdir()
    program("lib/relative.py", "async def hello(parent): await parent.send('hello')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("lib")
    child = await handleipc.fork("relative:hello", cwd="/")
    async with asyncio.timeout(20):
        assert await child.recv() == ("hello", None)
        assert await child.wait() == 0


# -- frozen programs -----------------------------------------------------------------------------

# What a freezer makes: an executable that runs the program whatever its arguments are.
FROZEN = """
    import asyncio, os, sys
    import handleipc

    sys.frozen, sys.executable = True, os.environ["APP"]
    print("started", flush=True)
    SUPPORT

    async def work(parent):
        raise AssertionError("of another module")

    async def main():
        try:
            child = await handleipc.fork(sys.argv[1], "an argument", **eval(sys.argv[2]))
        except (RuntimeError, ValueError) as error:
            print(type(error).__name__, error)
            return
        async with asyncio.timeout(30):
            print(*(await child.recv())[0], flush=True)
            child.disconnect()
            print(await child.wait())

    if __name__ == "__main__":
        asyncio.run(main())
"""

ANSWERS = """
    import asyncio, sys
    import handleipc

    async def work(parent):
        await parent.send([__name__, *sys.argv[1:]])
        async for _ in parent:
            pass

    async def main():
        await work(await handleipc.parent())

    if __name__ == "__main__":
        asyncio.run(main())
"""


def frozen(program: Program, support: str, target: str, options: str = "{}") -> list[str]:
    """Run such a program, and return what it said."""
    path = program("main.py", FROZEN.replace("SUPPORT", support))
    program("answers.py", ANSWERS)
    app = program("app", f'#!/bin/sh\nexec "{sys.executable}" "{path}" "$@"\n')
    app.chmod(0o755)
    done = subprocess.run(
        [app, target, options],
        env={**os.environ, "APP": str(app)},
        cwd=path.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.parametrize("target", ["answers:work", "answers", "answers.py", "./answers.py"])
def test_frozen_program(program: Program, target: str) -> None:
    """With ``freeze_support()`` a frozen program runs every kind of target."""
    said = frozen(program, "handleipc.freeze_support()", target)
    name = "answers" if ":" in target else "__main__"
    assert said == ["started", "started", f"{name} an argument", "0"]


@pytest.mark.parametrize("target", ["answers:work", "answers", "answers.py"])
def test_frozen_program_without_support(program: Program, target: str) -> None:
    """Without it ``fork`` is refused with advice: the program would start itself without end."""
    started, refused = frozen(program, "pass", target)
    assert started == "started"
    assert refused.startswith(
        "RuntimeError this program is frozen: call handleipc.freeze_support()"
    )


def test_frozen_program_with_an_interpreter(program: Program) -> None:
    """An interpreter that is named is one, frozen or not."""
    options = repr({"executable": sys.executable, "interpreter_args": ["-O"]})
    said = frozen(program, "pass", "answers.py", options)
    assert said == ["started", "__main__ an argument", "0"]


def test_frozen_program_has_no_interpreter(program: Program) -> None:
    """Options of an interpreter that is not there are ``ValueError``."""
    options = repr({"interpreter_args": ["-O"]})
    said = frozen(program, "handleipc.freeze_support()", "answers.py", options)
    assert said[1].startswith("ValueError a frozen program has no interpreter")


async def test_embedded_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ``sys.executable`` is empty, ``fork`` says what to name."""
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(RuntimeError, match="executable="):
        await handleipc.fork("child.py")


def test_freeze_support_elsewhere() -> None:
    """In any other program it does nothing."""
    handleipc.freeze_support()


# -- Ctrl-C --------------------------------------------------------------------------------------

PARENT = """
    import asyncio, sys
    import handleipc

    async def main():
        child = await handleipc.fork(*sys.argv[1:])
        print(*(await child.recv())[0], flush=True)
        try:
            await asyncio.sleep(60)
        finally:
            print("child", await child.wait(), flush=True)

    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        pass
"""

CHILD = """
    import asyncio, sys
    import handleipc

    HOOK

    async def work(parent):
        try:
            await parent.send(["ready"])
            async for _ in parent:
                pass
        finally:
            print("cleaned up", flush=True)

    async def main():
        await work(await handleipc.parent())

    if __name__ == "__main__":
        asyncio.run(main())
"""


def interrupted(program: Program, target: str, hook: str = "", **environment: str) -> Any:
    """Return what both ends print when Ctrl-C comes, as a terminal sends it: to all of a group."""
    program("child.py", CHILD.replace("HOOK", hook))
    path = program("parent.py", PARENT)
    process = subprocess.Popen(
        [sys.executable, path, target],
        cwd=path.parent,
        env={**os.environ, **environment},
        stdout=PIPE,
        stderr=PIPE,
        text=True,
        process_group=0,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with process:
        assert process.stdout is not None
        said = [process.stdout.readline()]
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    return process.returncode, [*said, *out.splitlines(keepends=True)], err


@pytest.mark.parametrize("target", ["child:work", "child.py", "child"])
def test_ctrl_c(program: Program, target: str) -> None:
    """Ctrl-C ends a child as it ends any program: cleaned up, by SIGINT; but without a traceback."""
    code, said, err = interrupted(program, target)
    assert (code, err) == (0, "")
    assert sorted(said) == ["child -2\n", "cleaned up\n", "ready\n"]


@pytest.mark.parametrize(
    ("hook", "environment", "text"),
    [
        ("", {"PYTHONDEVMODE": "1"}, "KeyboardInterrupt"),
        ("sys.excepthook = lambda *_: print('mine', file=sys.stderr)", {}, "mine"),
    ],
)
def test_ctrl_c_for_who_wants_to_see_it(
    program: Program, hook: str, environment: dict[str, str], text: str
) -> None:
    """In development mode, or with a hook of its own, a child shows what it did."""
    _, _, err = interrupted(program, "child.py", hook, **environment)
    assert text in err


def test_ctrl_c_while_the_child_is_still_imported(program: Program) -> None:
    """A function's child that has not begun yet ends without a traceback, too."""
    program("late.py", "raise AssertionError('never imported')")
    command = handleipc.fork.__globals__["fork_command"]("late:work", [], None, [])
    # As the program begins, before the package is there to be imported.
    command[2] = command[2].replace(
        "from handleipc", "import os\nos.kill(os.getpid(), signal.SIGINT)\nfrom handleipc"
    )
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


SLOW = """
    import asyncio

    async def work(parent):
        async for _, connection in parent:
            reader, writer = await connection.open()
            await parent.send("has it")
            await parent.recv()
            writer.write(b"answer")
            await writer.drain()
            writer.close()
"""

STOPPED = """
    import asyncio, os, signal, socket, sys
    import handleipc

    async def main():
        stopped = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
        child = await handleipc.fork("slow:work", process_group=0)
        ours, theirs = socket.socketpair()
        await child.send("x", theirs)
        await child.recv()
        os.killpg(0, signal.SIGTERM)
        await stopped.wait()
        await child.send("go on")
        print((await asyncio.to_thread(ours.recv, 100)).decode())
        child.disconnect()
        print(await child.wait())

    asyncio.run(main())
"""


def test_signal_to_the_group_of_the_parent(program: Program) -> None:
    """A child in a group of its own answers what it has, when a supervisor stops the parent's."""
    program("slow.py", SLOW)
    path = program("parent.py", STOPPED)
    done = subprocess.run(
        [sys.executable, path], cwd=path.parent, capture_output=True, timeout=60, process_group=0
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"answer\n0\n", b"")
