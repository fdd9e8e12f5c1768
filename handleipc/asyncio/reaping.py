"""A process that was started here, and how it ended.

``subprocess.Popen`` starts it and nothing more: it takes an exit that somebody else has seen for
success (0), where this says that it is unknown. Knows no event loop: what it tells can be waited
for in any of them.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal as signals
import subprocess
import threading
import time
from collections.abc import Callable
from typing import IO

from handleipc.asyncio.logs import log
from handleipc.system import close_quietly

__all__ = ["Process"]

# linux/sched.h: the process is being shut down.
PF_EXITING = 0x4


class Process:
    """A started process: signals to it, and its end, which is taken from the kernel once.

    Args:
        popen: the process, of which nobody else asks for the exit.

    Attributes:
        pid: its number, which stays its own until its end was seen.
        end: done when it has ended; the result is the exit code, minus the signal's number if a
            signal ended it, None if the exit was not seen.
    """

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self._popen = popen
        self.pid: int = popen.pid
        self.pipes: list[IO[bytes]] = [
            pipe for pipe in (popen.stdin, popen.stdout, popen.stderr) if pipe is not None
        ]
        """The piped stdio that nothing else owns yet."""
        self.end: concurrent.futures.Future[int | None] = concurrent.futures.Future()
        self.end.set_running_or_notify_cancel()  # who waits for it may be cancelled; it may not
        self._lock = threading.Lock()

    @property
    def stdin(self) -> IO[bytes] | None:
        """The pipe to its stdin, if there is one; likewise the other two."""
        return self._popen.stdin

    @property
    def stdout(self) -> IO[bytes] | None:
        """The pipe from its stdout."""
        return self._popen.stdout

    @property
    def stderr(self) -> IO[bytes] | None:
        """The pipe from its stderr."""
        return self._popen.stderr

    @property
    def ended(self) -> bool:
        """Whether its end was seen."""
        return self.end.done()

    def is_ending(self) -> bool | None:
        """Say whether it has begun to end, or has: its exit status will follow, in any case.

        None where the system does not say.

        The kernel closes what a process has open before it lets anybody know how it ended. Linux
        tells by PF_EXITING among the flags in /proc/PID/stat (proc(5), field 9); elsewhere a
        moment is waited for a child that closes its channel.
        """
        if self.ended:
            return False
        try:
            with open(f"/proc/{self.pid}/stat", "rb") as file:
                state, *fields = file.read().rpartition(b") ")[2].split()
        except OSError:
            return None
        return state in b"ZX" or bool(int(fields[5]) & PF_EXITING)

    def reap(self, pidfd: int = -1) -> bool:
        """Take its exit status if it has ended. Returns whether it has.

        Args:
            pidfd: of this process, if there is one. It names no other process, even if somebody
                else has reaped this one and its number is in use again.
        """
        with self._lock:
            if self.ended:
                return True
            try:
                code = self._status(pidfd)
            except ChildProcessError:
                self._ended(None)
            else:
                if code is None:
                    return False
                self._ended(code)
        return True

    def _status(self, pidfd: int) -> int | None:
        if pidfd >= 0:
            try:
                told = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
            except ChildProcessError:
                raise
            except OSError:
                pass  # Linux 5.3 has pidfds, and cannot wait for them
            else:
                if told is None:
                    return None
                return told.si_status if told.si_code == os.CLD_EXITED else -told.si_status
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def _ended(self, code: int | None) -> None:
        # Popen is told something in any case: it would ask the kernel when it is collected.
        self._popen.returncode = 0 if code is None else code
        self.end.set_result(code)
        if code is None:
            log.warning(
                "the exit status of child process %d is unknown: SIGCHLD is ignored in this"
                " process, or other code in it waited for the child",
                self.pid,
            )

    def send_signal(self, number: int, pidfd: int = -1) -> None:
        """Send it a signal; nothing happens once it has ended.

        Raises:
            PermissionError: it runs as somebody else.
        """
        with self._lock, contextlib.suppress(ProcessLookupError):
            if self.ended:
                return
            if pidfd >= 0:
                signals.pidfd_send_signal(pidfd, number)
            else:
                os.kill(self.pid, number)

    def reap_in_thread(self, then: Callable[[], object] | None = None) -> None:
        """Have a thread wait for its end; ``then`` is called there.

        Raises:
            RuntimeError: no thread can be started.
        """

        def wait() -> None:
            self.wait()
            if then is not None:
                then()

        threading.Thread(target=wait, name="handleipc-reaper", daemon=True).start()

    def wait(self) -> None:
        """Block until it has ended."""
        with contextlib.suppress(ChildProcessError):
            if hasattr(os, "waitid"):
                # Left to be reaped under the lock: until then the number is its own.
                os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            else:  # macOS before Python 3.13
                while not self.reap():
                    time.sleep(0.05)
        self.reap()

    def give_up(self) -> None:
        """End a process that nobody will hear of: kill it, reap it, close its piped stdio."""
        self.close_pipes()
        self.send_signal(signals.SIGKILL)
        try:
            self.reap_in_thread()
        except RuntimeError:
            self.wait()  # it was killed: this is no long wait

    def forget(self) -> None:
        """Have a forked copy, whose child it is not, ask for nothing when it drops this."""
        # Else Popen would wait for it, and warn that it still runs.
        self._popen.returncode = 0

    def close_pipes(self) -> None:
        """Close the piped stdio that nothing else owns."""
        while self.pipes:
            close_quietly(self.pipes.pop())
