"""Lines out of bytes: the framer fed directly, without a socket."""

from __future__ import annotations

import errno
import mmap
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handleipc.exceptions import LineTooLong, LocalProtocolError
from handleipc.wire import framing
from handleipc.wire.framing import Batch, LineFramer


def lines_of(batch: Batch) -> list[bytes]:
    """Return the lines of a batch, as its documentation says where they are."""
    starts = [batch.start, *batch.ends]
    return [bytes(batch.view[s : e - 1]) for s, e in zip(starts, batch.ends, strict=False)]


def fed(framer: LineFramer, data: bytes) -> list[bytes]:
    """Feed bytes and return the lines they complete."""
    return [line for batch in framer.feed(data) for line in lines_of(batch)]


def test_feed_of_complete_lines() -> None:
    """Each newline ends a line, empty ones too, and the newline is no part of it."""
    assert fed(LineFramer(100), b"a\n\nbc\n") == [b"a", b"", b"bc"]


def test_feed_of_unfinished_line() -> None:
    """Half a line is kept, counted as the tail, until its newline comes."""
    framer = LineFramer(100)
    (batch,) = framer.feed(b"a\nhal")
    assert batch.tail == 3
    (batch,) = framer.feed(b"f\n")
    assert (lines_of(batch), batch.tail, batch.offset) == ([b"half"], 0, 2)


def test_feed_of_nothing() -> None:
    """No bytes make one batch without lines."""
    (batch,) = LineFramer(100).feed(b"")
    assert (batch.ends, batch.tail, list(batch.sets)) == ([], 0, [])


def test_feed_of_every_split() -> None:
    """The lines do not depend on how the stream was cut."""
    stream = b"one\n\nthree\n\n\nsix is longer\ntail"
    for cut in range(len(stream) + 1):
        framer = LineFramer(20)
        lines = fed(framer, stream[:cut]) + fed(framer, stream[cut:])
        assert lines == stream.split(b"\n")[:-1]


@given(st.lists(st.binary(max_size=30).map(lambda b: b.replace(b"\n", b""))), st.integers(31, 64))
def test_feed_of_any_lines(lines: list[bytes], limit: int) -> None:
    """Whatever the lines hold, they come out as they went in."""
    assert fed(LineFramer(limit), b"".join(line + b"\n" for line in lines)) == lines


def test_feed_of_more_lines_than_one_report_holds() -> None:
    """When the array of ends is full, the rest follows in further batches, in order."""
    count = 2 * framing.MAX_ENDS + 5
    stream = b"".join(b"%d\n" % i for i in range(count))
    batches = LineFramer(1000 * 1000).feed(stream)
    assert len(batches) > 2
    assert [line for batch in batches for line in lines_of(batch)] == stream.split(b"\n")[:-1]


def test_feed_of_batches_that_outlive_the_next_feed() -> None:
    """What feed returns is a copy: the framer may go on."""
    framer = LineFramer(100)
    (batch,) = framer.feed(b"kept\n")
    framer.feed(b"over\n" * 10)
    assert lines_of(batch) == [b"kept"]


@pytest.mark.parametrize("limit", [1, 2, 7, 1000])
def test_feed_of_line_as_long_as_the_limit(limit: int) -> None:
    """A line may have as many bytes as the limit says, its newline included."""
    line = b"x" * (limit - 1)
    framer = LineFramer(limit)
    assert fed(framer, line + b"\n") == [line]
    assert fed(framer, line + b"\n") == [line]


@pytest.mark.parametrize("limit", [1, 2, 7, 1000])
def test_feed_of_line_longer_than_the_limit(limit: int) -> None:
    """One byte more ends the channel, whether the newline has come or not; the limit is named."""
    for stream in (b"x" * limit + b"\n", b"x" * (limit + 1), b"ok\n"[limit > 2 :] + b"x" * limit):
        with pytest.raises(LineTooLong) as caught:
            LineFramer(limit).feed(stream + b"x\n")
        assert caught.value.limit == limit


def test_feed_of_line_longer_than_the_limit_with_forged_line_behind() -> None:
    """The tail of a line that is too long never becomes a line of its own."""
    with pytest.raises(LineTooLong):
        LineFramer(10).feed(b"x" * 11 + b'\n{"cmd":"NODE_HANDLE_ACK"}\n')


def test_feed_of_line_longer_than_the_first_buffer() -> None:
    """The buffer grows up to the limit."""
    size = 5 * framing.INITIAL_CAPACITY
    framer = LineFramer(size + 1)
    assert framer.reader.capacity == framing.INITIAL_CAPACITY
    line = os.urandom(size // 2).hex().encode()
    assert fed(framer, line + b"\nnext\n") == [line, b"next"]
    assert framer.reader.capacity <= size + 1


def test_grow_keeps_unfinished_line() -> None:
    """Growing copies what is there, and knows what was searched already."""
    framer = LineFramer(1024 * 1024)
    framer.feed(b"begun ")
    before = framer.reader.capacity
    framer.grow()
    assert framer.reader.capacity == 2 * before
    assert framer.reader.scanned == 6
    assert fed(framer, b"and ended\n") == [b"begun and ended"]


def test_grow_stops_at_the_limit() -> None:
    """A buffer of the longest line grows no more."""
    framer = LineFramer(framing.INITIAL_CAPACITY + 1)
    framer.grow()
    assert framer.reader.capacity == framing.INITIAL_CAPACITY + 1
    with pytest.raises(LineTooLong):
        framer.grow()


def test_shrink_after_large_line() -> None:
    """An empty large buffer goes back to its usual size, and offsets go on."""
    size = framing.SHRINK_ABOVE + 1
    framer = LineFramer(2 * size)
    framer.feed(b"x" * size + b"\n")
    assert framer.reader.capacity > framing.SHRINK_ABOVE
    framer.shrink()
    assert framer.reader.capacity == framing.INITIAL_CAPACITY
    (batch,) = framer.feed(b"next\n")
    assert (lines_of(batch), batch.offset) == ([b"next"], size + 1)


def test_shrink_with_unfinished_line() -> None:
    """A large buffer that still holds something stays."""
    size = framing.SHRINK_ABOVE + 1
    framer = LineFramer(2 * size)
    framer.feed(b"x" * size + b"\nhal")
    capacity = framer.reader.capacity
    framer.shrink()
    assert framer.reader.capacity == capacity
    assert fed(framer, b"f\n") == [b"half"]


def test_shrink_of_small_buffer() -> None:
    """A buffer of usual size is left alone."""
    framer = LineFramer(1024 * 1024)
    framer.feed(b"a\n")
    framer.shrink()
    assert framer.reader.capacity == framing.INITIAL_CAPACITY
    assert fed(framer, b"b\n") == [b"b"]


def test_take_sets_of_a_report() -> None:
    """Sets carry their own descriptors, and offsets of the stream."""
    framer = LineFramer(100)
    framer.feed(b"before\n")
    framer.feed(b"")
    reader = framer.reader
    assert reader.position == 7
    for i, number in enumerate((0, 4, 2, 0, 4, 9, 1, 1)):
        reader.sets[i] = number
    for i in range(3):
        reader.fds[i] = 100 + i
    reader.n_sets, reader.n_fds = 2, 3
    first, second = framer.take_sets()
    assert first.fds == [100, 101]
    assert (first.start, first.end, first.truncated) == (7, 11, False)
    assert (second.fds, second.truncated) == ([102], True)
    assert (second.start, second.end) == (11, 16)
    assert framer.take_sets() == []


def test_grow_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an error of this end that says so; shrinking without memory is none."""
    framer = LineFramer(10_000_000)
    assert fed(framer, b"x" * 5_000_000 + b"\n") == [b"x" * 5_000_000]

    def no_memory(capacity: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(framer, "_resize", no_memory)
    framer.shrink()
    assert fed(framer, b"still\n") == [b"still"]
    with pytest.raises(LocalProtocolError, match="no memory for a line of more than"):
        framer.grow()


def test_grow_while_somebody_looks() -> None:
    """A buffer of which a part is in use is not moved: what is looked at stays where it is."""
    framer = LineFramer(1 << 20)
    taken = framing.lib.hipc_feed(framer.reader, b"line\nrest", 9)
    batch = framer.take_batch()
    assert taken == 9
    line = batch.view[: batch.ends[0]]
    framer.grow()
    assert line == b"line\n"
    assert fed(framer, b" of it\n") == [b"rest of it"]
    line.release()
    framer.grow()


def test_grow_where_mappings_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without mremap the bytes are copied."""

    class Fixed(mmap.mmap):
        def resize(self, size: int) -> None:
            raise SystemError("mmap: resizing not available--no mremap()")

    monkeypatch.setattr(mmap, "mmap", Fixed)
    framer = LineFramer(1 << 22)
    assert fed(framer, b"x" * 1_000_000 + b"\n") == [b"x" * 1_000_000]
