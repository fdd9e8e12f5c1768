"""What a refusal of the peer means, in words."""

from __future__ import annotations

import pytest

from handleipc.handles.refusal import refusal_in_words


@pytest.mark.parametrize("code", ["descriptors", "denied", "type", "kind", "closing", "policy"])
def test_codes_of_the_wire(code: str) -> None:
    """Each code of docs/wire.md keeps its name, and says what is the matter."""
    assert refusal_in_words(code).startswith(f"{code}: ")
    assert len(refusal_in_words(code)) > len(code) + 10


def test_codes_to_come() -> None:
    """Another code is repeated, cut."""
    assert refusal_in_words("new") == "new"
    assert len(refusal_in_words("x" * 1000)) < 60
