"""The bounds of a channel: defaults, and what they refuse to be."""

from __future__ import annotations

import dataclasses
import inspect
import resource
from collections.abc import Callable

import pytest

from handleipc.limits import MIB, Limits, descriptor_limit

NAMES = [field.name for field in dataclasses.fields(Limits)]


@pytest.fixture
def descriptor_limit_to(
    request: pytest.FixtureRequest,
) -> Callable[[int], None]:
    """The fixture ``descriptor_limit``, under a name that the function does not have."""
    return request.getfixturevalue("descriptor_limit")  # type: ignore[no-any-return]


def test_descriptor_limit(descriptor_limit_to: Callable[[int], None]) -> None:
    """The limit is the soft one, as it is now."""
    descriptor_limit_to(123)
    assert descriptor_limit() == 123


def test_descriptor_limit_of_a_process_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """No limit is a large number, since one is needed to divide."""
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda _: unlimited)
    assert descriptor_limit() == 1 << 20
    assert Limits().window == 256


@pytest.mark.parametrize(("slots", "window"), [(31, 4), (64, 8), (800, 100), (2048, 256)])
def test_window_follows_the_descriptor_limit(
    descriptor_limit_to: Callable[[int], None], slots: int, window: int
) -> None:
    """An eighth of the table, at least 4, at most 256, read when the limits are made."""
    descriptor_limit_to(slots)
    assert Limits().window == window


@pytest.mark.parametrize(("slots", "most"), [(64, 32), (1000, 500)])
def test_budget_follows_the_descriptor_limit(
    descriptor_limit_to: Callable[[int], None], slots: int, most: int
) -> None:
    """Half of the table may be in flight: the kernel counts per user, and others send too."""
    descriptor_limit_to(slots)
    assert Limits().in_flight == most


@pytest.mark.parametrize(("slots", "high", "low"), [(31, 8, 2), (800, 200, 50), (4096, 1024, 256)])
def test_water_marks_follow_the_descriptor_limit(
    descriptor_limit_to: Callable[[int], None], slots: int, high: int, low: int
) -> None:
    """A quarter of the table, two windows or more: it is not full before ``drain()`` waits."""
    descriptor_limit_to(slots)
    limits = Limits()
    assert (limits.high_water_handles, limits.low_water_handles) == (high, low)
    assert limits.high_water_handles >= 2 * limits.window


def test_window_of_large_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large table does not make the window larger than 256."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 19, 1 << 19))
    assert Limits().window == 256


@pytest.mark.parametrize("name", NAMES)
def test_negative_limit(name: str) -> None:
    """No limit is negative, and the message names the one that is."""
    with pytest.raises(ValueError, match=f"Limits.{name} must not be negative"):
        Limits(**{name: -1})


@pytest.mark.parametrize(
    ("name", "low", "high"), [("set_size", 1, 253), ("line", 1, 1024 * MIB), ("window", 1, 10**6)]
)
def test_limit_at_its_bounds(name: str, low: int, high: int) -> None:
    """Bounded limits take both bounds."""
    assert getattr(Limits(**{name: low}), name) == low
    assert getattr(Limits(**{name: high}), name) == high


@pytest.mark.parametrize(
    ("name", "value"), [("set_size", 0), ("set_size", 254), ("window", 0), ("line", 0)]
)
def test_limit_out_of_its_bounds(name: str, value: int) -> None:
    """And refuse what lies beyond, by name."""
    with pytest.raises(ValueError, match=f"Limits.{name} must"):
        Limits(**{name: value})


def test_line_beyond_the_offsets_of_the_core() -> None:
    """Offsets in C have 32 bits, and a full buffer plus one must fit."""
    with pytest.raises(ValueError, match="1..1 GiB"):
        Limits(line=1024 * MIB + 1)


@pytest.mark.parametrize("what", ["bytes", "handles"])
def test_low_water_above_high_water(what: str) -> None:
    """A low-water mark lies at or below its high-water mark."""
    Limits(**{f"low_water_{what}": 10, f"high_water_{what}": 10})
    with pytest.raises(ValueError, match=f"low_water_{what} lies above high_water_{what}"):
        Limits(**{f"low_water_{what}": 11, f"high_water_{what}": 10})


def test_limits_cannot_be_changed() -> None:
    """Limits are agreed upon at the start: they are frozen, and given by name only."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Limits().window = 7  # type: ignore[misc]
    with pytest.raises(TypeError):
        Limits(7)  # type: ignore[misc]
    assert dataclasses.replace(Limits(), ready=1).ready == 1


def test_shape_of_a_message() -> None:
    """The bounds of one message, none of which the C core cannot count."""
    shape = Limits(depth=7, values=1000, slow_line=300).shape
    assert (shape.depth, shape.values, shape.slow_line, shape.short) == (7, 1000, 300, 7)
    assert Limits(depth=7, values=100).shape.short == 1
    shape = Limits(depth=10**30, values=10**30, slow_line=10**30, line=1000).shape
    assert (shape.depth, shape.values, shape.slow_line) == (1000, 1000, 1000)


def test_every_limit_has_a_reason() -> None:
    """Each limit stands in the source with a sentence of its own."""
    source = inspect.getsource(Limits)
    for name in NAMES:
        field = source.index(f"    {name}: ")
        assert source[field:].split("\n", 1)[1].lstrip().startswith('"""'), name


def test_a_limit_that_is_no_number() -> None:
    """A limit given as text is named, with what it is."""
    with pytest.raises(TypeError, match="Limits.window='x': give a number"):
        Limits(window="x")  # type: ignore[arg-type]
