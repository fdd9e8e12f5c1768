"""Why a channel has ended, as the exception that everybody gets who asks or waits."""

from __future__ import annotations

from handleipc.exceptions import ChannelBroken, ChannelClosed, HandleIPCError, WorkerExited
from handleipc.protocol.channel import ChannelProtocol, State

__all__ = ["Aborted", "why_closed"]


class Aborted(HandleIPCError):
    """The reason of an ``abort()``; never raised."""

    def __str__(self) -> str:
        return "this end aborted the channel"


def why_closed(protocol: ChannelProtocol) -> ChannelClosed:
    """Return the exception of a channel that has ended, or is ending: one for each who gets it."""
    error = protocol.error
    if isinstance(error, Aborted):
        return ChannelClosed("this end has aborted the channel")
    if protocol.state is State.CLOSING or (error is None and protocol.ended_here):
        return ChannelClosed("this end has disconnected: nothing more can be sent")
    exited = error if isinstance(error, WorkerExited) else None
    broken = ChannelBroken(
        f"the channel has ended: {error or 'the peer closed it'}",
        exit_code=exited.code if exited else None,
        signal=exited.signal if exited else None,
        opened=protocol.was_opened,
    )
    broken.__cause__ = error
    return broken
