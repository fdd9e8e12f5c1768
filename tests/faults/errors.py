"""What each system call may answer, by its man page, and what may come of it."""

from __future__ import annotations

import enum
import errno

__all__ = ["ERRORS", "SHORT", "TRUNCATED", "Effect", "name_of", "number_of"]

# In the place of an errno (shim.c): success with a single byte; success without the descriptors.
SHORT, TRUNCATED = 1001, 1002
_PSEUDO = {SHORT: "one byte", TRUNCATED: "descriptors lost"}


class Effect(enum.Enum):
    """The most that a fault may change."""

    NONE = "nothing changes, and nobody is told"
    KEPT = "nothing is lost; who called is told"
    TOLD = "what is lost is told"


NONE, KEPT, TOLD = Effect.NONE, Effect.KEPT, Effect.TOLD


def _all(effect: Effect, *names: str) -> dict[str, Effect]:
    return dict.fromkeys(names, effect)


# A single fault of these; one that goes on for ever may always be told.
ERRORS: dict[str, dict[str, Effect]] = {
    "sendmsg": {
        **_all(NONE, "EINTR", "EAGAIN", "ENOBUFS", "ENOMEM", "ETOOMANYREFS", "one byte"),
        **_all(TOLD, "ECONNRESET", "EPIPE", "EBADF", "EPERM", "EMSGSIZE", "EINVAL"),
    },
    "recvmsg": {
        **_all(NONE, "EINTR", "EAGAIN", "ENOBUFS", "ENOMEM", "one byte", "descriptors lost"),
        **_all(TOLD, "ECONNRESET", "EBADF", "EPERM", "EIO"),
    },
    "send": {
        **_all(NONE, "EINTR", "EAGAIN", "one byte"),
        **_all(TOLD, "ENOBUFS", "ECONNRESET", "EPIPE"),
    },
    "recv": {**_all(NONE, "EINTR", "EAGAIN"), **_all(TOLD, "ECONNRESET", "ENOMEM")},
    "accept4": {
        **_all(KEPT, "EINTR", "EAGAIN", "ECONNABORTED", "EPERM", "EMFILE", "ENFILE"),
        **_all(KEPT, "ENOBUFS", "ENOMEM"),
        **_all(TOLD, "EBADF", "EINVAL"),
    },
    "getsockopt": _all(TOLD, "ENOBUFS", "ENOMEM", "ENOPROTOOPT", "EBADF"),
    "setsockopt": _all(TOLD, "ENOMEM", "ENOPROTOOPT", "EPERM"),
    "getsockname": _all(TOLD, "ENOBUFS", "ENOMEM"),
    "getpeername": _all(TOLD, "ENOBUFS", "ENOTCONN", "EBADF"),
    "shutdown": _all(TOLD, "ENOTCONN", "ENOBUFS", "EBADF"),
    "close": _all(KEPT, "EINTR", "EIO", "ENOSPC"),
    "fcntl": _all(TOLD, "EBADF", "EMFILE", "EPERM"),
    "ioctl": _all(TOLD, "EBADF", "ENOMEM"),
    "fstat": _all(TOLD, "EBADF", "ENOMEM"),
    "dup": _all(TOLD, "EMFILE", "EBADF"),
    "open": _all(TOLD, "EMFILE", "ENFILE", "EACCES", "ENOENT"),
    "socketpair": _all(TOLD, "EMFILE", "ENFILE", "ENOMEM"),
    "socket": _all(TOLD, "EMFILE", "ENFILE", "ENOBUFS", "EAFNOSUPPORT"),
    "bind": _all(TOLD, "EADDRINUSE", "EACCES", "EADDRNOTAVAIL"),
    "listen": _all(TOLD, "EADDRINUSE"),
    "pipe2": _all(TOLD, "EMFILE", "ENFILE"),
    "epoll_create1": _all(TOLD, "EMFILE", "ENFILE", "ENOMEM"),
    "epoll_ctl": _all(TOLD, "ENOMEM", "ENOSPC", "EPERM"),
    "poll": {**_all(NONE, "EINTR"), **_all(TOLD, "ENOMEM")},
    # A thread waits where there is no pidfd.
    "pidfd_open": _all(NONE, "ENOSYS", "EMFILE", "ENFILE", "ENOMEM", "EPERM"),
    "fork": _all(TOLD, "EAGAIN", "ENOMEM"),
    "execve": _all(TOLD, "ENOENT", "EACCES", "E2BIG", "ENOMEM"),
    "waitpid": {**_all(NONE, "EINTR"), **_all(TOLD, "ECHILD")},
    "kill": _all(TOLD, "EPERM", "ESRCH"),
    "unlink": _all(TOLD, "EACCES", "ENOENT"),
    "stat": _all(TOLD, "EACCES", "ENOENT", "ENOMEM"),
    "mmap": _all(TOLD, "ENOMEM"),
}


def number_of(name: str) -> int:
    """Return the number of an errno, or what stands in its place."""
    return next((n for n, text in _PSEUDO.items() if text == name), 0) or int(getattr(errno, name))


def name_of(number: int) -> str:
    return _PSEUDO.get(number) or errno.errorcode[number]
