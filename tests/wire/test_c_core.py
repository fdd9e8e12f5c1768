"""The C core on its own: compiled with its test program, plainly and under sanitizers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
PROGRAM = ROOT / "tests" / "csrc" / "test_hipc.c"
SOURCES = [PROGRAM, *sorted(CSRC.glob("hipc_*.c"))]
STRICT = ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-g", "-O1", f"-I{CSRC}"]
# The program plays the kernel where the kernel would rarely do what is to be tested.
WRAP = ["-Wl,--wrap=recvmsg,--wrap=sendmsg"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

COMPILER = shutil.which("gcc") or shutil.which("cc")
DEFINED = re.findall(r"^static void (test_\w+)\(void\)", PROGRAM.read_text(), re.MULTILINE)
LISTED = re.findall(r"^    TEST\((\w+)\),", PROGRAM.read_text(), re.MULTILINE)

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


def build(directory: Path, options: list[str]) -> Path:
    """Compile the test program and return its path."""
    binary = directory / "test_hipc"
    command = [COMPILER, *STRICT, *WRAP, *options, *map(str, SOURCES), "-o", str(binary)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return binary


# What a C library and a compiler other than those of most tests say to the core: musl's control
# message macros compare signed with unsigned, and clang minds it.
MUSL_HEADERS = Path(f"/usr/include/{os.uname().machine}-linux-musl")
OTHERS = {
    "clang": ["clang"],
    "musl-gcc": ["musl-gcc"],
    "clang with musl": ["clang", "-nostdlibinc", "-isystem", str(MUSL_HEADERS)],
}


@pytest.mark.parametrize("other", OTHERS)
def test_core_compiles_without_warnings_elsewhere(other: str, tmp_path: Path) -> None:
    """No compiler and no C library finds anything to warn about."""
    command = OTHERS[other]
    if shutil.which(command[0]) is None or ("musl" in other and not MUSL_HEADERS.exists()):
        pytest.skip(f"no {other}")
    for source in sorted(CSRC.glob("hipc_*.c")):
        done = subprocess.run(
            [*command, *STRICT, "-c", str(source), "-o", str(tmp_path / "object")],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test program without sanitizers."""
    return build(tmp_path_factory.mktemp("plain"), [])


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test program under AddressSanitizer and UndefinedBehaviorSanitizer."""
    return build(tmp_path_factory.mktemp("sanitized"), SANITIZE)


def run(binary: Path, *names: str) -> None:
    """Run the program, or one of its tests; what it prints explains a failure."""
    environment = {**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run(
        [binary, *names],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def test_list_of_c_tests() -> None:
    """Every test that the C program defines is run by it."""
    assert sorted(DEFINED) == sorted(LISTED)
    assert len(set(LISTED)) == len(LISTED)


@needs_compiler
@pytest.mark.parametrize("name", LISTED)
def test_c(plain: Path, name: str) -> None:
    """Each test of the C program passes."""
    run(plain, name)


@needs_compiler
@pytest.mark.parametrize("name", LISTED)
def test_c_under_sanitizers(sanitized: Path, name: str) -> None:
    """Each test of the C program passes, and touches no memory it should not."""
    run(sanitized, name)


@needs_compiler
def test_c_with_every_test_in_one_process(sanitized: Path) -> None:
    """The tests of the C program pass one after the other in one process, and leave nothing."""
    run(sanitized)


@needs_compiler
def test_c_with_unknown_name(plain: Path) -> None:
    """The program fails if it is asked for a test that it does not have."""
    with pytest.raises(AssertionError):
        run(plain, "test_nothing")


def test_every_function_of_the_api_has_a_comment() -> None:
    """Each function declared in hipc_api.h stands directly below its contract."""
    lines = (CSRC / "hipc_api.h").read_text().splitlines()
    declared = [i for i, line in enumerate(lines) if re.match(r"\w[\w ]* \*?hipc_\w+\(", line)]
    assert len(declared) >= 5
    for i in declared:
        assert lines[i - 1].strip() == "*/", lines[i]


def test_every_outcome_of_the_api_has_a_comment() -> None:
    """Each constant of hipc_api.h has a comment beside it, or stands in a group that has one."""
    text = (CSRC / "hipc_api.h").read_text()
    for group in re.findall(r"(?:^#define .*\n)+", text, re.MULTILINE):
        above = text[: text.index(group)].rstrip("\n").rsplit("\n", 1)[-1]
        beside = [line for line in group.splitlines() if "/*" in line]
        assert above.endswith("*/") or len(beside) == len(group.splitlines()), group
