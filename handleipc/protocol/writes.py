"""What becomes of each write: what the kernel has with it, and what it refuses.

Two refusals pass by themselves, while the socket stays writable: too many descriptors in flight,
which all processes of a user share, and no memory.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from handleipc.exceptions import LocalProtocolError
from handleipc.limits import Limits
from handleipc.protocol.front import Hooks
from handleipc.protocol.incoming import Incoming
from handleipc.protocol.outgoing import Outgoing
from handleipc.protocol.stages import Entry
from handleipc.protocol.timers import Timer, Timers
from handleipc.system import System
from handleipc.wire.syscalls import Refused

__all__ = ["Writes"]


class Writes:
    """The writes of one channel.

    Args:
        limits: pauses, and how long to wait for memory.
        system: the clock.
        timers: where to note when to try again.
        incoming, outgoing: the halves of the channel, which learn what the kernel has.
        hooks: are told when there may be room again.
        give_up: has the front end the channel, for the reason given.
    """

    def __init__(
        self,
        limits: Limits,
        system: System,
        timers: Timers,
        incoming: Incoming,
        outgoing: Outgoing,
        *,
        hooks: Hooks,
        give_up: Callable[[str], None],
    ) -> None:
        self._limits = limits
        self._system = system
        self._timers = timers
        self._incoming = incoming
        self._outgoing = outgoing
        self._hooks = hooks
        self._give_up = give_up
        self._retry_delay = 0.0
        self._no_memory_since: float | None = None
        self.are_dead: bool = False
        """Whether nothing more can be written."""

    def wrote(self, outcome: int | Refused | OSError) -> OSError | None:
        """Take what became of the write of the current stage.

        Args:
            outcome: how many more bytes the kernel took; or why it took none, while the socket is
                writable.

        Returns:
            The error if nothing more can be said: the front is to end the channel, once it has read
            what the peer said.
        """
        if not isinstance(outcome, int):
            return self._refused(outcome)
        outgoing = self._outgoing
        stage = outgoing.stage
        assert stage is not None
        if not stage.offset:
            outgoing.begun(stage)
            self._retry_delay = 0.0
        self._no_memory_since = None
        stage.offset += outcome
        while stage.marks and stage.marks[0][0] <= stage.offset:
            what = stage.marks.popleft()[1]
            if isinstance(what, Entry):
                outgoing.written(what)
            else:
                self._incoming.deliveries.control_passed(what)
        if stage.offset == len(stage.data):
            outgoing.stage = None
        if stage.is_control and self._incoming.held:
            self._incoming.pump()
        return None

    def _refused(self, why: Refused | OSError) -> OSError | None:
        if why is Refused.IN_FLIGHT:  # ETOOMANYREFS
            self._write_later()
            return None
        if isinstance(why, Refused):
            if not self._lacks_memory():
                return None
            why = OSError(errno.ENOMEM, "no memory to write")
        stage = self._outgoing.stage
        if stage is None or not stage.fds or stage.offset or isinstance(why, ConnectionError):
            self.are_dead = True
            return why
        # EPERM: the peer has SO_PASSRIGHTS off. EBADF, EINVAL: not a descriptor that travels.
        self._give_handles_back(f"the kernel does not pass it on: {why.strerror}")
        return None

    def _write_later(self) -> None:
        """Try again after a pause, or when another handle of this process was acknowledged."""
        limits = self._limits
        self._outgoing.park()
        self._retry_delay = min(
            max(limits.in_flight_delay, 2 * self._retry_delay), limits.in_flight_delay_max
        )
        self._timers.start(Timer.RETRY, self._retry_delay)
        self._outgoing.in_flight.wait(self._retry)

    def _lacks_memory(self) -> bool:
        """Wait for memory (ENOBUFS, ENOMEM), or split the stage; returns False if either is done.

        After ``Limits.retry_time`` it is taken for a set that never fits (musl before 1.2.4 has no
        room for 253 descriptors, for one): a handle that does not fit alone comes back.
        """
        now = self._system.clock()
        if self._no_memory_since is None:
            self._no_memory_since = now
        if now - self._no_memory_since < self._limits.retry_time:
            self._write_later()
            return False
        stage = self._outgoing.stage
        if stage is None or stage.offset or not stage.fds:
            return True
        self._give_handles_back("the kernel has no memory for so many descriptors at once")
        return False

    def _retry(self) -> None:
        """Some handle in this process was acknowledged: there may be room."""
        if self._timers.stop(Timer.RETRY):
            self._hooks.wake()

    def _give_handles_back(self, reason: str) -> None:
        """The kernel will never carry the descriptors of this stage: its handles come back."""
        try:
            self._outgoing.refuse_stage(reason)
        except LocalProtocolError as error:
            self._give_up(str(error))

    def close(self) -> None:
        """Wait for no room any more: the channel has ended."""
        self._outgoing.in_flight.forget(self._retry)
