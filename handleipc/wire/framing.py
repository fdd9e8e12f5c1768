"""Bytes in, complete lines out: a typed skin over the C framer.

Owns the receive buffer. Does not read sockets (``syscalls`` does, into the same buffer) and does
not know what a line means, but for how deep it is nested and how many values it holds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import mmap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from handleipc._core import ffi, lib
from handleipc.exceptions import LineTooLong, LocalProtocolError

if TYPE_CHECKING:
    from handleipc._core import CData

__all__ = [
    "MAX_ENDS",
    "TOO_DEEP",
    "TOO_MANY",
    "Batch",
    "DescriptorSet",
    "LineFramer",
    "LongLine",
    "shape_of",
]

TOO_DEEP: int = lib.HIPC_TOO_DEEP
TOO_MANY: int = lib.HIPC_TOO_MANY

_hipc_shape = lib.hipc_shape

# Lines and sets of one report: a 64 KiB read of the shortest useful lines (`[0,1]`) makes 11,000
# ends, and a report that is full only costs one more call.
MAX_ENDS = 4096
MAX_SETS = 64
# Four times the largest set: what one report may hold before anybody looks whether it was allowed.
MAX_FDS = 4 * lib.HIPC_READ_FDS
INITIAL_CAPACITY = 256 * 1024
# Not cleared: only what the core has reported is read, and an idle channel touches none of the
# 26 KiB of its report.
_new = ffi.new_allocator(should_clear_after_alloc=False)
# After a large message the buffer goes back to its usual size.
SHRINK_ABOVE = 4 * 1024 * 1024


@dataclasses.dataclass(slots=True)
class DescriptorSet:
    """The descriptors of one read, owned by whoever holds the set.

    ``start`` and ``end`` are the stream offsets of the read that brought them; ``truncated`` says
    that the kernel dropped some, of which only the flag MSG_CTRUNC told.
    """

    fds: list[int]
    start: int
    end: int
    truncated: bool


@dataclasses.dataclass(slots=True)
class Batch:
    """The complete lines of one receive, with the descriptor sets that came along.

    ``view`` is the framer's own buffer: valid until the next receive. Line ``i`` is
    ``view[start:ends[0] - 1]`` for the first, ``view[ends[i - 1]:ends[i] - 1]`` for others.
    ``offset`` is the stream offset of ``view[0]``, ``tail`` how many bytes follow. ``is_all`` says
    that no whole line is among those; if not, the sets may belong to lines of the next report.
    """

    view: memoryview
    start: int
    ends: list[int]
    offset: int
    sets: Sequence[DescriptorSet]
    tail: int
    is_all: bool

    def start_of(self, index: int) -> int:
        """Return where line ``index`` begins, or what follows the last one."""
        return self.ends[index - 1] if index else self.start


@dataclasses.dataclass(frozen=True, slots=True)
class LongLine:
    """Bytes to be written in a row that are not worth joining, for one of them is long."""

    head: bytes
    body: bytes
    tail: bytes

    def __len__(self) -> int:
        return len(self.head) + len(self.body) + len(self.tail)

    def __bytes__(self) -> bytes:
        return self.head + self.body + self.tail


class LineFramer:
    """A receive buffer that finds newlines without looking at a byte twice.

    Args:
        line_limit: longest line in bytes, newline included.
    """

    def __init__(self, line_limit: int) -> None:
        self._limit = line_limit
        sizes = [MAX_ENDS, MAX_SETS * lib.HIPC_SET_FIELDS, MAX_FDS]
        # One block: the allocator's notes between three would touch a page each.
        self._report = _new("int32_t[]", sum(sizes))
        whole = memoryview(ffi.buffer(self._report)).cast("i")
        *starts, _ = itertools.accumulate(sizes, initial=0)
        views = [whole[start : start + size] for start, size in zip(starts, sizes, strict=True)]
        self._ends_view, self._sets_view, self._fds_view = views
        self.reader: CData = ffi.new("hipc_reader *")
        reader = self.reader
        reader.ends, reader.sets, reader.fds = (self._report + at for at in starts)
        self.reader.max_ends = MAX_ENDS
        self.reader.max_sets = MAX_SETS
        self.reader.max_fds = MAX_FDS
        self._view = memoryview(b"")
        self._data: CData | None = None
        self.is_large: bool = False
        """Whether ``shrink`` may give memory back."""
        self._buffer: mmap.mmap | None = None
        self._resize(min(INITIAL_CAPACITY, line_limit))

    def feed(self, data: bytes) -> list[Batch]:
        """Take bytes as if they had been received, and return the lines they complete.

        Raises:
            LineTooLong: a line exceeds the limit; the framer must not be used any more.
        """
        batches = []
        while True:
            taken = lib.hipc_feed(self.reader, data, len(data))
            data = data[taken:]
            batch = self.take_batch()
            batches.append(
                dataclasses.replace(batch, view=memoryview(bytes(batch.view[: self.reader.filled])))
            )
            if not data and self.reader.scanned == self.reader.filled:
                return batches
            if not batch.ends:
                self.grow()

    def take_batch(self) -> Batch:
        """Return what the last call into C reported, and count it as consumed.

        From here on the caller owns the descriptors.
        """
        reader = self.reader
        n_ends = reader.n_ends
        ends = self._ends_view[:n_ends].tolist()
        sets = self.take_sets() if reader.n_sets else ()
        start = reader.consumed
        if n_ends:
            reader.consumed = ends[-1]
            reader.n_ends = 0
        tail = reader.filled - reader.consumed
        is_all = reader.scanned == reader.filled
        return Batch(self._view, start, ends, reader.position, sets, tail, is_all)

    def take_sets(self) -> list[DescriptorSet]:
        """Return the descriptor sets of the last report; the caller owns them."""
        reader = self.reader
        n_sets = reader.n_sets
        flat = self._sets_view[: n_sets * lib.HIPC_SET_FIELDS].tolist()
        fds = self._fds_view[: reader.n_fds].tolist()
        reader.n_sets = reader.n_fds = 0
        sets, at, position = [], 0, reader.position
        for i in range(0, len(flat), lib.HIPC_SET_FIELDS):
            start, end, count, truncated = flat[i : i + lib.HIPC_SET_FIELDS]
            stop = at + count
            sets.append(
                DescriptorSet(fds[at:stop], position + start, position + end, bool(truncated))
            )
            at = stop
        return sets

    def grow(self) -> None:
        """Make room for a line that fills the whole buffer.

        Raises:
            LineTooLong: the buffer has the size of the longest allowed line already.
            LocalProtocolError: there is no memory for a larger one.
        """
        capacity = self.reader.capacity
        if capacity >= self._limit:
            raise LineTooLong(self._limit)
        size = min(2 * capacity, self._limit)
        try:
            self._resize(size)
        except OSError as error:
            raise LocalProtocolError(
                f"no memory for a line of more than {capacity} bytes: {error.strerror}"
            ) from error

    def shrink(self) -> None:
        """Give the memory of a large message back, if the buffer is empty now."""
        reader = self.reader
        if self.is_large and reader.consumed == reader.filled:
            reader.position += reader.consumed
            reader.consumed = reader.scanned = reader.filled = 0
            with contextlib.suppress(OSError):  # no memory even for less: this one still serves
                self._resize(min(INITIAL_CAPACITY, self._limit))

    def _resize(self, capacity: int) -> None:
        # Pages of its own, since the kernel moves those without a copy: growing to 8 MiB by
        # copying took a third of the time of receiving a message of that size.
        grown = self._grow_in_place(capacity)
        if grown is None:
            grown = mmap.mmap(-1, capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            filled = self.reader.filled
            if filled:
                grown[:filled] = bytes(self._view[:filled])
        self._buffer = grown
        self._view = memoryview(grown)
        self._data = ffi.from_buffer("char[]", grown)
        self.reader.data = self._data
        self.reader.capacity = capacity
        self.is_large = capacity > SHRINK_ABOVE

    def _grow_in_place(self, capacity: int) -> mmap.mmap | None:
        buffer = self._buffer
        if buffer is None or self._data is None:
            return None
        ffi.release(self._data)
        self._data = None
        try:
            self._view.release()
            buffer.resize(capacity)
        except (BufferError, SystemError, ValueError, OSError):
            # Somebody still looks at a line, or this system cannot: then by copying.
            self._view = memoryview(buffer)
            return None
        return buffer


def shape_of(text: bytes | memoryview, depth: int, values: int) -> int:
    """Return how deep arrays and objects in this JSON text are nested, or what is wrong with it.

    Exact for valid JSON; for anything else some answer, and the parser will refuse it.

    Args:
        text: one JSON text.
        depth: deepest nesting allowed.
        values: most values allowed, counted as ``hipc_shape`` of csrc/hipc_api.h does.

    Returns:
        The depth; or ``TOO_DEEP`` or ``TOO_MANY``, which are larger.
    """
    if isinstance(text, bytes):
        return _hipc_shape(text, len(text), depth, values)
    return _hipc_shape(ffi.from_buffer("char[]", text), len(text), depth, values)
