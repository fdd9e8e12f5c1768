"""Every bound of a channel in one place, each with its default, unit and reason."""

from __future__ import annotations

import dataclasses
import resource

__all__ = ["Invitation", "Limits", "Shape", "descriptor_limit"]

KIB = 1024
MIB = 1024 * KIB


def descriptor_limit() -> int:
    """Return this process's soft RLIMIT_NOFILE (a large number if it has none)."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft != resource.RLIM_INFINITY else 1 << 20


def _default_window() -> int:
    return max(4, min(256, descriptor_limit() // 8))


def _default_in_flight() -> int:
    return descriptor_limit() // 2


def _default_high_water() -> int:
    return max(8, min(1024, descriptor_limit() // 4))


def _default_low_water() -> int:
    return _default_high_water() // 4


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """What the JSON of a message may look like; the fields are those of ``Limits``."""

    depth: int
    values: int
    slow_line: int
    line: int = 1024 * MIB
    short: int = dataclasses.field(init=False)
    """Bytes up to which no text can exceed the others: such a one need not be looked at."""

    def __post_init__(self) -> None:
        # The most that a byte can count: 64, for an exponent (HIPC_FAR_EXPONENT).
        object.__setattr__(self, "short", min(self.depth, self.values // 64))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """The bounds of one channel. Times are seconds, sizes bytes unless said otherwise.

    What is said to count handles counts their descriptors, of which one handle may have up to 253:
    descriptors are what a process runs out of. A peer can pin max(window, 253) + max(ready, 253).

    Raises:
        ValueError: a limit is negative, or a low-water mark lies above its high-water mark.
    """

    window: int = dataclasses.field(default_factory=_default_window)
    """Unacknowledged descriptors granted to a native peer, and taken from a node-dialect peer
    before its ACK waits for the application: min(256, RLIMIT_NOFILE / 8), at least 4. One slow peer
    takes an eighth of the table; 256 covers a 1 ms round trip at 250,000 a second. A single handle
    with more descriptors than this passes alone."""

    ready: int = 32
    """Acknowledged descriptors that may wait until the application takes them, in the native
    dialect: the most that a kill can swallow. Acknowledging ahead is earned by reading, from 1 up
    to this. A single handle with more passes alone."""

    set_size: int = 64
    """Descriptors per ``sendmsg``, at most 253: 90 % of the gain of 253, and a loss costs less."""

    bytes: int = 1 * MIB
    """Bytes of lines granted to a native peer beyond what the application took: one round trip at
    1 GB/s. Held memory is this and one line at most."""

    line: int = 128 * MIB
    """Longest line, both ways. A longer one ends the channel. A line with many
    short messages of a native peer may have 8 KiB in any case."""

    depth: int = 128
    """Deepest nesting of a message, both ways."""

    values: int = 8_000_000
    """Values in one message, both ways: commas and opening brackets, outside of strings. A number
    that takes long to read counts for more: one with an exponent of three digits 64, one of n times
    64 digits n * n. Bounds the memory that few bytes become when they are read, beside that of the
    text itself. Measured at the bound: 61 MiB of ``1``, 275 MiB of ``[]`` or ``{}``, 430 MiB of
    ``"a"``, and at worst 1,070 MiB of objects with one key each, all different. More ends the
    channel."""

    slow_line: int = 16 * MIB
    """Bytes, each value counting as 64 of them, of a message with half a surrogate pair in it: only
    the slow reader of the standard library reads that. At the bound it takes a third of a second at
    most, measured; 64 MiB of arrays took four. JavaScript cuts long texts anywhere, so text alone
    may be as long as this. More ends the channel."""

    queued_bytes: int = 64 * MIB
    """Bytes of messages, and of what describes their handles, waiting to be written; above,
    ``send_nowait`` raises ``ChannelFull``. One larger than this is taken when nothing else is
    queued."""

    queued_handles: int = 131_072
    """Descriptors waiting to be acknowledged; above, ``ChannelFull``. 100,000 at once must fit."""

    high_water_bytes: int = 128 * KIB
    """Queued bytes from which ``send_nowait`` returns False (Node's own mark)."""

    low_water_bytes: int = 32 * KIB
    """Queued bytes at which ``drain()`` returns."""

    high_water_handles: int = dataclasses.field(default_factory=_default_high_water)
    """Descriptors not yet acknowledged from which ``send_nowait`` returns False:
    min(1024, RLIMIT_NOFILE / 4), two windows or more. Each is open here until its acknowledgement,
    so the table must not be full before ``drain()`` waits."""

    low_water_handles: int = dataclasses.field(default_factory=_default_low_water)
    """Descriptors not yet acknowledged at which ``drain()`` returns: a quarter of the high mark."""

    held_messages: int = 16_384
    """Messages held while nobody reads; above, reading from a node-dialect peer pauses, and a
    native one is granted nothing more."""

    held_bytes: int = 1 * MIB
    """Bytes of messages held while nobody reads; above, reading from a node-dialect peer pauses."""

    held_hard: int = 64 * MIB
    """Bytes held at most while a local send, flush or disconnect waits, or an internal message is
    listened for; then the waiter gets ``ChannelBusy``. Each message counts for 256 bytes more than
    its line, which is about what it takes in memory. Two ends that both send before they read meet
    here, not in a deadlock."""

    node_hard: int = 64 * MIB
    """Bytes held at most while a handle of ours is unanswered, since the answer may be behind
    them; and bytes held at most behind an answer of ours that cannot leave. Counted likewise."""

    node_replies: int = 64
    """Replies a node-dialect peer may owe its attention to before it breaks the protocol: Node
    itself never has more than one handle in flight."""

    node_retries: int = 3
    """Times a handle is sent again after a NACK, as Node does."""

    asks: int = 64
    """Times a peer may ask for the descriptors of one handle again."""

    in_flight: int = dataclasses.field(default_factory=_default_in_flight)
    """Unacknowledged descriptors of all channels of this process up to which this one may add to
    them: RLIMIT_NOFILE / 2. The kernel counts per user; this leaves half to others."""

    ask_delay: float = 0.001
    """First pause before asking again for lost descriptors, doubling up to ``ask_delay_max``."""

    ask_delay_max: float = 0.25
    """Longest such pause."""

    retry_time: float = 5.0
    """How long a shortage is waited out: no free slot for the descriptors of a handle (EMFILE is
    short, or an outage; all handles lost in one outage share this time), no memory for a write or
    a read, or a local wait for a peer that waits for us to take its handles."""

    in_flight_delay: float = 0.001
    """First pause after ETOOMANYREFS, doubling up to ``in_flight_delay_max``: poll cannot tell."""

    in_flight_delay_max: float = 0.1
    """Longest such pause."""

    incomplete_timeout: float = 30.0
    """How long descriptors of a native peer whose line or set is unfinished may wait for another
    byte; they wait ten times this in all, whatever comes. A Node peer may take any time."""

    hello_timeout: float = 10.0
    """How long a handle that only handleipc can receive waits for the peer's first line."""

    disconnect_timeout: float = 30.0
    """How long ``disconnect()`` flushes before it aborts."""

    @property
    def shape(self) -> Shape:
        """The limits of one message. None is larger than the longest line, so that C can count."""
        return Shape(
            min(self.depth, self.line),
            min(self.values, self.line),
            min(self.slow_line, self.line),
            self.line,
        )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int | float):
                raise TypeError(f"Limits.{field.name}={value!r}: give a number")
            if value < 0:
                raise ValueError(f"Limits.{field.name} must not be negative")
        if not 1 <= self.set_size <= 253:
            raise ValueError("Limits.set_size must lie in 1..253, the kernel's maximum")
        if self.window < 1:
            raise ValueError("Limits.window must be at least 1")
        # One more than a full buffer must fit into the 32-bit offsets of the C core.
        if not 1 <= self.line <= 1024 * MIB:
            raise ValueError("Limits.line must lie in 1..1 GiB")
        for what in ("bytes", "handles"):
            if getattr(self, f"low_water_{what}") > getattr(self, f"high_water_{what}"):
                raise ValueError(f"Limits.low_water_{what} lies above high_water_{what}")


@dataclasses.dataclass(frozen=True, slots=True)
class Invitation:
    """What a parent tells its child about the native dialect before it starts."""

    descriptors: int
    bytes: int
