"""The command line that starts a Python child, and the targets it is made of."""

from __future__ import annotations

import os
import pathlib

import pytest

from handleipc.commands import FORK_MARKER, frozen_command, python_command, read_target


@pytest.mark.parametrize(
    ("target", "tail"),
    [
        ("child.py", ["child.py", "a"]),
        ("dir/child", ["dir/child", "a"]),
        ("./child", ["./child", "a"]),
        ("/abs/child.py", ["/abs/child.py", "a"]),
        (pathlib.PurePath("child"), ["child", "a"]),
        ("module", ["-m", "module", "a"]),
        ("package.module", ["-m", "package.module", "a"]),
    ],
)
def test_python_command(target: str | os.PathLike[str], tail: list[str]) -> None:
    """Files are run as they are, modules with -m, with the arguments behind."""
    assert python_command(target, ["a"], "python", ["-X", "dev"], []) == [
        "python",
        "-X",
        "dev",
        *tail,
    ]


def test_python_command_of_function() -> None:
    """A function is imported with the parent's path, however odd its directories are called."""
    path = ["/a'b", 'c"d', "new\nline", "\udcff"]
    command = python_command("package.module:function", ["a"], "python", [], path)
    assert (command[:2], command[3:]) == (["python", "-c"], ["a"])
    compile(command[2], "<command>", "exec")
    assert f"sys.path[:] = {path!r}" in command[2]
    assert command[2].endswith("run('package.module', 'function')")


@pytest.mark.parametrize(
    "target",
    ["", ":", "m:", ":f", "m:f:g", "m f", "a..b", ".a", "a.", "m:a.b", "1a", "a-b", "m:f()", "-m"],
)
def test_python_command_of_no_target(target: str) -> None:
    """Anything else is refused, and never reaches a command line."""
    with pytest.raises(ValueError, match="is no target"):
        python_command(target, [], "python", [], [])


def test_python_command_of_function_in_main() -> None:
    """A function of the program itself cannot be imported by another."""
    with pytest.raises(ValueError, match="move it to a module"):
        python_command("__main__:main", [], "python", [], [])


@pytest.mark.parametrize("target", ["-c.py", "./-c.py", pathlib.PurePath("-i")])
def test_python_command_of_file_that_looks_like_an_option(target: str) -> None:
    """The name of a file is never taken for an option of the interpreter."""
    assert not python_command(target, [], "python", [], [])[-1].startswith("-")


def test_path_is_meant_from_here(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is relative in the path is made absolute; what names no directory stays as it is."""
    (tmp_path / "lib").mkdir()
    monkeypatch.chdir(tmp_path)
    path = ["", "lib", "/abs", "__editable__.finder.__path_hook__"]
    command = python_command("m:f", [], "python", [], path)
    expected = [str(tmp_path), str(tmp_path / "lib"), *path[2:]]
    assert f"sys.path[:] = {expected!r}" in command[2]


def test_path_without_a_current_directory(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a directory that is gone there is nothing to be found, and that is no error."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "sys.path[:] = ['']" in python_command("m:f", [], "python", [], [""])[2]


def in_a_module() -> None:
    pass


in_main = type(in_a_module)(in_a_module.__code__, {"__name__": "__main__"})


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (in_a_module, "'tests.test_commands:in_a_module', not the object"),
        (
            in_main,
            "'module:in_a_module' (a function of __main__ cannot be imported elsewhere: move",
        ),
        (lambda: None, "'module:function' (of one at the top of a module, which this is not)"),
        (pathlib.Path, ":Path'"),
    ],
)
def test_function_as_target(function: object, text: str) -> None:
    """Who gives a function itself is told what to give instead."""
    with pytest.raises(TypeError) as caught:
        read_target(function)  # type: ignore[arg-type]
    assert text in str(caught.value)


@pytest.mark.parametrize("target", [7, None, ["child.py"], b"child.py", object()])
def test_target_of_another_type(target: object) -> None:
    """Anything else that is no text and no path is refused with what to give."""
    with pytest.raises(TypeError, match="give the path of a .py file, a dotted module, or"):
        read_target(target)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("child.py", "child.py"),
        ("dir/child", "dir/child"),
        (pathlib.PurePath("child"), "./child"),
        (pathlib.PurePath("-c.py"), "-c.py"),
        ("package.module", "package.module"),
        ("package.module:function", "package.module:function"),
    ],
)
def test_frozen_command(target: str | os.PathLike[str], text: str) -> None:
    """A frozen program is started again, and told by its first arguments what to run."""
    assert frozen_command(target, ["a"], "app") == ["app", FORK_MARKER, text, "a"]
    again = read_target(text)
    assert again[1:] == read_target(target)[1:]
    assert (again.file is None) == (read_target(target).file is None)


def test_frozen_command_of_no_target() -> None:
    """It is refused as ever."""
    with pytest.raises(ValueError, match="is no target"):
        frozen_command("a b", [], "app")
