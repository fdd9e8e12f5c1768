"""What a bug report needs to know of this machine, and what would hold a busy program back here."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from handleipc import __version__
from handleipc.asyncio.listening import BACKLOG
from handleipc.asyncio.starting import SO_PASSRIGHTS
from handleipc.environment import PREFIXES, SO_COOKIE, found
from handleipc.limits import Limits, descriptor_limit
from handleipc.wire.syscalls import KIND_SOCKET, descriptor_kind

__all__ = ["Machine", "advise", "facts"]

# Below so many descriptors a server with a few thousand clients meets the limit.
FEW_DESCRIPTORS = 8192


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """What ``advise`` looks at."""

    soft: int
    """RLIMIT_NOFILE; so many descriptors a process may have."""
    hard: int
    """Up to which it may be raised without privileges."""
    somaxconn: int | None
    """The longest backlog of a listener; None where it is not known."""
    is_root: bool
    has_passrights: bool
    """Whether the kernel can refuse descriptors."""
    has_pidfd: bool

    @classmethod
    def here(cls) -> Machine:
        """Return what is true of this process and its kernel."""
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            somaxconn = int(Path("/proc/sys/net/core/somaxconn").read_text())
        except (OSError, ValueError):
            somaxconn = None
        return cls(
            soft=descriptor_limit(),
            hard=descriptor_limit() if hard == resource.RLIM_INFINITY else hard,
            somaxconn=somaxconn,
            is_root=os.geteuid() == 0,
            has_passrights=_option(SO_PASSRIGHTS) == "yes",
            has_pidfd=_pidfd() == "yes",
        )


def advise(machine: Machine) -> list[str]:
    """Return one line for each thing that will hold back a busy program: what, and what to do."""
    lines = []
    if machine.soft < FEW_DESCRIPTORS:
        more = (
            f"raise it to {machine.hard} with `ulimit -n {machine.hard}`"
            if machine.hard > machine.soft
            else "have the administrator raise it (limits.conf, or LimitNOFILE= of systemd)"
        )
        lines.append(
            f"a process may have {machine.soft} descriptors (RLIMIT_NOFILE), and each connection is"
            f" one: {more}"
        )
        if not machine.is_root:
            lines.append(
                f"all processes of this user together may have {machine.soft} descriptors on their"
                " way (unix(7)), and what is beyond waits: the same limit raises this one"
            )
    if machine.somaxconn is not None and machine.somaxconn < BACKLOG:
        lines.append(
            f"net.core.somaxconn cuts a backlog of {BACKLOG} down to {machine.somaxconn}, so the"
            f" clients of a burst wait for a second try: `sysctl net.core.somaxconn={BACKLOG}`"
        )
    if not machine.has_passrights:
        lines.append(
            "this kernel cannot refuse descriptors (Linux 6.16 can), so accept_handles=False closes"
            " them when they have come: nothing to do, unless a child may be hostile"
        )
    if not machine.has_pidfd:
        lines.append(
            "there is no pidfd here (Linux 5.3), so a thread waits for each child: nothing to do,"
            " unless there are many"
        )
    return lines


def facts() -> dict[str, str]:
    """Return what a bug report needs: platform, kernel, limits, C core, channel, Node.js."""
    return {
        "handleipc": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "executable": sys.executable,
        "platform": platform.platform(),
        "libraries": ", ".join(_version(n) for n in ("cffi", "msgspec", "orjson", "uvloop")),
        "C core": _core(),
        "descriptors": f"RLIMIT_NOFILE {descriptor_limit()}, window {Limits().window}",
        "user": "root: in-flight limit is not enforced" if os.geteuid() == 0 else "unprivileged",
        "SO_PASSRIGHTS": _option(SO_PASSRIGHTS),
        "SO_COOKIE": _option(SO_COOKIE),
        "pidfd": _pidfd(),
        "channel": _channel(),
        "node": _node(),
    }


def _option(number: int) -> str:
    """Say whether this kernel has a socket option."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        try:
            ours.getsockopt(socket.SOL_SOCKET, number, 8)
        except OSError as error:
            return f"no ({error.strerror})"
    return "yes"


def _pidfd() -> str:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return "no: a thread waits for each child"
    return "yes"


def _version(name: str) -> str:
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{name} not installed"


def _core() -> str:
    from handleipc import _core as core  # noqa: PLC0415  # only to say where it is

    built = Path(str(core.__file__)).name
    with socket.socket() as probe:
        works = descriptor_kind(probe.fileno()) & KIND_SOCKET
    return f"{built}, {core.lib.HIPC_MAX_FDS} descriptors per message, {'works' if works else '?'}"


def _channel() -> str:
    if found:
        return "found at import: " + ", ".join(f"{k}={v}" for k, v in found.items())
    named = {k: v for k, v in os.environ.items() if k.startswith(PREFIXES)}
    if named:
        return "none, but stale variables: " + ", ".join(f"{k}={v}" for k, v in named.items())
    return "none in the environment"


def _node() -> str:
    program = shutil.which("node")
    if program is None:
        return "not found in PATH"
    version = subprocess.run(
        [program, "--version"], capture_output=True, text=True, check=False, timeout=10
    )
    return f"{version.stdout.strip()} at {program}"
