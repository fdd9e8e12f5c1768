"""What came from outside, as our own texts quote it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handleipc.texts import quoted, readable


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("net.Socket", "'net.Socket'"),
        ("\ud800\n\u2028\x1b[2J", r"'\ud800\n\u2028\x1b[2J'"),
        ("caf\xe9", r"'caf\xe9'"),
        (b"\xff\n", r"b'\xff\n'"),
        (bytearray(b"a"), "b'a'"),
        (memoryview(b"abc")[1:], "b'bc'"),
        (None, "None"),
        (True, "True"),
        (-7, "-7"),
        (1.5, "1.5"),
        (1 << 300, "<integer of 301 bits>"),
        ([1, 2], "<list of 2>"),
        ({"a": [1]}, "<dict of 1>"),
        ((), "<tuple of 0>"),
        (object(), "<object>"),
    ],
)
def test_quoted(value: object, text: str) -> None:
    """Values of JSON, and bytes, are quoted as Python spells them in ASCII; large ones by size."""
    assert quoted(value) == text


@pytest.mark.parametrize("value", ["x" * 10_000, b"x" * 10_000, "\ud800" * 10_000, "\n" * 10_000])
def test_quoted_is_cut(value: str | bytes) -> None:
    """Of a long text the beginning is shown, and that it goes on; nobody spells the rest."""
    text = quoted(value)
    assert len(text) == 203
    assert text.endswith("...")
    assert len(quoted(value, 20)) == 23


def test_quoted_at_the_limit() -> None:
    """What fits is not cut."""
    assert quoted("x" * 198) == "'" + "x" * 198 + "'"
    assert quoted("x" * 199).endswith("...")


@given(st.text(st.characters(exclude_categories=())) | st.binary() | st.integers() | st.floats())
def test_quoted_can_be_printed_anywhere(value: Any) -> None:
    """Whatever it was, it is printable ASCII on one line."""
    text = quoted(value, 50)
    assert text.isascii()
    assert text.isprintable()
    assert len(text) <= 53


@pytest.mark.parametrize(
    "raised", [json.JSONDecodeError("half \ud800\n", "doc", 0), ValueError("\t")]
)
def test_readable(raised: Exception) -> None:
    """Texts of other libraries stay what they are, in ASCII on one line."""
    text = readable(str(raised))
    assert text.isascii()
    assert text.isprintable()
    assert readable("plain text") == "plain text"
    assert readable("x" * 300) == "x" * 200 + "..."
