"""Which object travels under which tag, and who closes what when it cannot."""

from __future__ import annotations

import errno
import io
import json
import os
import socket
from functools import partial
from typing import Any

import pytest

from handleipc.exceptions import HandleNotDelivered, MessageNotSerializable, UnsupportedHandle
from handleipc.handles import kinds
from handleipc.handles.fds import FileDescriptor
from handleipc.handles.pending import Held, PendingHandle
from handleipc.handles.refusal import Refusal
from handleipc.handles.registry import Registry
from handleipc.wire.syscalls import KIND_OTHER
from tests.linger import lingering, lingers


def new_fd() -> int:
    """Return a new descriptor of an empty file."""
    return os.memfd_create("file")


def is_open(fd: int) -> bool:
    """Say whether a number is a descriptor now."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


class Log:
    """An application's object with two descriptors."""

    def __init__(self, name: str = "log", count: int = 2) -> None:
        self.name = name
        self.files = [FileDescriptor(new_fd()) for _ in range(count)]

    def close(self) -> None:
        """Close both."""
        for file in self.files:
            file.close()


class NamedLog(Log):
    """A subclass, which travels as its base."""


class LogConversion:
    """How a Log travels."""

    tag = "log"

    def to_wire(self, obj: Log) -> tuple[Any, list[int]]:
        """Return the name and the descriptors."""
        return obj.name, [file.fileno() for file in obj.files]

    def from_wire(self, details: Any, fds: list[FileDescriptor]) -> Log:
        """Make a Log again."""
        log = Log(details, 0)
        log.files = fds
        return log


@pytest.fixture
def registry() -> Registry:
    """A registry that knows FileDescriptor, sockets' Native, and Log."""
    known = Registry()
    known.add_preparer(FileDescriptor, kinds.prepare_fd)
    known.add_builder(kinds.FD, kinds.build_fd)
    known.add_builder(kinds.NET_NATIVE, kinds.build_native)
    known.register(Log, LogConversion())
    return known


# -- sending -------------------------------------------------------------------------------------


@pytest.mark.parametrize("python_type", [Log, NamedLog])
def test_prepare_registered_type(registry: Registry, python_type: type[Log]) -> None:
    """An object of a registered type, or of a subclass, travels by its conversion."""
    log = python_type("name")
    pending = registry.prepare(log, False)
    assert (pending.tag, pending.options) == ("log", b'{"details":"name"}')
    assert (pending.fds_needed, pending.native_only, pending.is_given_away) == (2, True, True)
    assert pending.filenos() == [file.fileno() for file in log.files]
    pending.delivered()
    assert all(file.closed for file in log.files)


def test_prepare_with_keep_open(registry: Registry) -> None:
    """With keep_open the object is left alone."""
    log = Log()
    pending = registry.prepare(log, True)
    assert not pending.is_given_away
    pending.delivered()
    assert not any(file.closed for file in log.files)
    log.close()


def test_prepare_object_without_close(registry: Registry) -> None:
    """An object that cannot be closed stays as it is."""

    class Plain:
        pass

    class PlainConversion(LogConversion):
        tag = "plain"

        def to_wire(self, obj: Any) -> tuple[Any, list[int]]:
            return None, [fd]

    fd = new_fd()
    registry.register(Plain, PlainConversion())
    pending = registry.prepare(Plain(), False)
    assert (pending.options, pending.is_given_away) == (b"", False)
    pending.delivered()
    os.close(fd)


@pytest.mark.parametrize("details", [0, "", [], {}, False])
def test_prepare_with_empty_details(registry: Registry, details: object) -> None:
    """Only None is no details: other empty values travel."""
    log = Log()
    log.name = details  # type: ignore[assignment]
    assert json.loads(registry.prepare(log, True).options) == {"details": details}
    log.close()


@pytest.mark.parametrize("details", [b"bytes", {"when": {1}}, object()])
def test_prepare_with_details_that_are_not_json(registry: Registry, details: object) -> None:
    """Details that cannot travel are refused before anything leaves."""
    log = Log()
    log.name = details  # type: ignore[assignment]
    with pytest.raises(MessageNotSerializable):
        registry.prepare(log, False)
    assert not any(file.closed for file in log.files)
    log.close()


@pytest.mark.parametrize("count", [0, 254])
def test_prepare_with_impossible_number_of_fds(registry: Registry, count: int) -> None:
    """A conversion gives 1 to 253 descriptors: what one message can carry."""

    class Many(LogConversion):
        def to_wire(self, obj: Any) -> tuple[Any, list[int]]:
            return None, [0] * count

    registry.register(Log, Many())
    log = Log(count=0)
    with pytest.raises(UnsupportedHandle, match=f"'log' came with {count} descriptors"):
        registry.prepare(log, False)


def test_prepare_of_most_fds(registry: Registry) -> None:
    """253 do travel."""

    class Many(LogConversion):
        def to_wire(self, obj: Any) -> tuple[Any, list[int]]:
            return None, [0] * 253

    registry.register(Log, Many())
    assert registry.prepare(Log(count=0), True).fds_needed == 253


@pytest.mark.parametrize("handle", [7, "text", object(), 1.5, [], int])
def test_prepare_unknown_type(registry: Registry, handle: object) -> None:
    """What nobody registered is refused by the name of its type, each time it is tried."""
    for _ in range(2):
        with pytest.raises(UnsupportedHandle, match=f"a {type(handle).__name__} is no handle"):
            registry.prepare(handle, False)


@pytest.mark.parametrize(
    ("handle", "advice"),
    [
        (7, "send a FileDescriptor, which owns it"),
        (("reader", "writer"), "of two streams the writer"),
        (["one", "two"], "one handle with each message"),
        (io.BytesIO(), r"FileDescriptor\(os.dup\(it.fileno\(\)\)\)"),
        (object(), "or register"),
    ],
)
def test_prepare_says_what_to_send_instead(registry: Registry, handle: object, advice: str) -> None:
    """The refusal says what to do."""
    with pytest.raises(UnsupportedHandle, match=advice):
        registry.prepare(handle, False)


def test_prepare_after_unknown_type_was_registered(registry: Registry) -> None:
    """A type that was refused is known from its registration on."""

    class Late(Log):
        pass

    class Other:
        pass

    with pytest.raises(UnsupportedHandle):
        registry.prepare(Other(), False)
    registry.add_preparer(Other, lambda obj, keep: Held(obj, "other", read=list))
    assert registry.prepare(Other(), False).tag == "other"

    late = Late()
    assert registry.prepare(late, True).tag == "log"
    registry.add_preparer(Late, lambda obj, keep: Held(obj, "late", read=list))
    assert registry.prepare(late, True).tag == "late"
    late.close()


def test_prepare_uses_the_nearest_base(registry: Registry) -> None:
    """Of several registered bases the first in the method resolution order counts."""
    registry.add_preparer(NamedLog, lambda obj, keep: Held(obj, "named", read=list))

    class Deep(NamedLog):
        pass

    deep = Deep(count=0)
    assert registry.prepare(deep, True).tag == "named"


def test_prepare_by_fallback(registry: Registry) -> None:
    """Objects of types nobody named are shown to each fallback in turn, in copies too."""
    asked: list[tuple[object, bool]] = []

    def knows_none(obj: object, keep: bool) -> None:
        asked.append((obj, keep))

    def knows_text(obj: object, keep: bool) -> PendingHandle | None:
        return Held(obj, "text", read=list) if isinstance(obj, str) else None

    registry.add_fallback(knows_none)
    registry.add_fallback(knows_text)
    assert registry.prepare("text", True).tag == "text"
    assert registry.copy().prepare("text", False).tag == "text"
    with pytest.raises(UnsupportedHandle):
        registry.prepare(7, False)
    assert asked == [("text", True), ("text", False), (7, False)]
    log = Log()
    assert registry.prepare(log, True).tag == "log"
    assert len(asked) == 3
    log.close()


# -- registering ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["", None, 7, b"tag"])
def test_register_without_tag(registry: Registry, tag: object) -> None:
    """A conversion has a name, which is text."""
    conversion = LogConversion()
    conversion.tag = tag  # type: ignore[assignment]
    with pytest.raises(ValueError, match="needs a tag"):
        registry.register(Log, conversion)


@pytest.mark.parametrize("tag", [kinds.FD, kinds.NET_NATIVE])
def test_register_with_built_in_tag(registry: Registry, tag: str) -> None:
    """A built-in name is not to be had."""
    conversion = LogConversion()
    conversion.tag = tag
    with pytest.raises(ValueError, match="is built in"):
        registry.register(Log, conversion)


def test_register_again(registry: Registry) -> None:
    """Registering a type again replaces its conversion."""
    log = Log(count=1)
    assert registry.prepare(log, True).tag == "log"
    conversion = LogConversion()
    conversion.tag = "log2"
    registry.register(Log, conversion)
    assert registry.prepare(log, True).tag == "log2"
    log.close()
    with pytest.raises(Refusal, match="type 'log', which nobody registered"):
        registry.convert("log", None, [new_fd()])
    arrived = registry.convert("log2", None, [new_fd()])
    assert isinstance(arrived, Log)
    arrived.close()


def test_register_again_with_the_same_tag(registry: Registry) -> None:
    """The conversion is another, the tag is still accepted."""

    class Other(LogConversion):
        def from_wire(self, details: Any, fds: list[FileDescriptor]) -> Log:
            log = super().from_wire(details, fds)
            log.name = "other"
            return log

    registry.register(Log, Other())
    log = registry.convert("log", None, [new_fd()])
    assert isinstance(log, Log)
    assert log.name == "other"
    log.close()


def test_register_again_a_tag_that_two_types_have(registry: Registry) -> None:
    """It is accepted as long as one of them has it, and made by the conversion of that one."""

    class Special(Log):
        pass

    class SpecialConversion(LogConversion):
        def from_wire(self, details: Any, fds: list[FileDescriptor]) -> Log:
            raise AssertionError("the conversion of a type that has another tag now")

    registry.register(Special, SpecialConversion())
    renamed = SpecialConversion()
    renamed.tag = "special"
    registry.register(Special, renamed)
    log = registry.convert("log", None, [new_fd()])
    assert isinstance(log, Log)
    log.close()


def test_copy_is_independent(registry: Registry) -> None:
    """A copy knows what the original knew, and neither learns from the other."""
    other = registry.copy()

    class New(Log):
        pass

    conversion = LogConversion()
    conversion.tag = "new"
    other.register(New, conversion)
    log = New(count=1)
    assert other.prepare(log, True).tag == "new"
    assert registry.prepare(log, True).tag == "log"
    with pytest.raises(Refusal, match="type 'new', which nobody registered"):
        registry.convert("new", None, [new_fd()])
    log.close()
    fd = new_fd()
    built = other.convert("fd", None, [fd])
    assert isinstance(built, FileDescriptor)
    built.close()


# -- receiving -----------------------------------------------------------------------------------


def test_convert_built_in() -> None:
    """What arrives under a built-in tag becomes its object."""
    registry = Registry()
    registry.add_builder(kinds.NET_NATIVE, partial(kinds.build_native, kinds.NET_NATIVE))
    reading, writing = os.pipe()
    with FileDescriptor(writing):
        built = registry.convert("net.Native", None, [reading])
        assert isinstance(built, FileDescriptor)
        built.close()


def test_makers_of_runs() -> None:
    """What can raise, or is to be seen, has none."""
    registry = Registry()
    registry.add_builder("fd", lambda fd, kind, options: (fd, kind, options), lambda fd: fd)
    fd = new_fd()
    assert registry.convert("fd", {"a": 1}, [fd]) == (fd, KIND_OTHER, {"a": 1})
    assert registry.convert("fd", None, [fd]) == (fd, KIND_OTHER, None)
    assert registry.convert("fd", None, [-1]) == (-1, 0, None)
    os.close(fd)
    make = registry.maker("fd")
    assert make is not None
    assert make(6) == 6
    assert registry.copy().maker("fd") is not None
    registry.add_builder("fd", kinds.build_fd)
    assert registry.maker("fd") is None


def test_what_is_converted_does_not_block() -> None:
    """Whatever its tag: a blocking socket would freeze the event loop."""
    registry = Registry()
    registry.add_builder("fd", kinds.build_fd)
    registry.register(Log, LogConversion())
    for tag in ("fd", "log"):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            fd = theirs.detach()
            assert os.get_blocking(fd)
            made: Any = registry.convert(tag, None, [fd])
            assert not os.get_blocking(fd)
            made.close()


def test_builder_that_the_system_refuses() -> None:
    """One handle is refused, its descriptor closed, and the channel goes on."""

    def build(fd: int, kind: int, options: object) -> object:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    registry = Registry()
    registry.add_builder("fd", build)
    fd = new_fd()
    with pytest.raises(Refusal, match="could not be made: .* Cannot alloc") as caught:
        registry.convert("fd", None, [fd])
    assert caught.value.code == "kind"
    assert not is_open(fd)


def test_pender_that_the_system_refuses(registry: Registry) -> None:
    """A handle about which the system says nothing is not sent, and stays what it was.

    An error of an application's own conversion is its own.
    """

    def refuse(handle: object, keep_open: bool) -> PendingHandle:
        raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))

    class Failing(LogConversion):
        tag = "failing"
        to_wire = refuse

    other = Registry()
    other.add_preparer(Log, refuse)
    other.add_fallback(refuse)
    for handle in (log := Log(), "any other"):
        with pytest.raises(HandleNotDelivered, match="No buffer space") as caught:
            other.prepare(handle, False)
        assert caught.value.handle is handle
    other.register(Log, Failing())
    with pytest.raises(OSError, match="No buffer space"):
        other.prepare(log, False)
    log.close()


@pytest.mark.parametrize(("tag", "count"), [("net.Native", 1), ("fd", 2), ("net.Native", 2)])
def test_convert_wrong_descriptors(registry: Registry, tag: str, count: int) -> None:
    """A kind that the tag does not allow, or a wrong number, is refused and closed."""
    fds = [new_fd() for _ in range(count)]
    with pytest.raises(Refusal, match=f"{tag} with a descriptor of another kind") as caught:
        registry.convert(tag, None, fds)
    assert caught.value.code == "kind"
    assert not any(map(is_open, fds))


def test_convert_no_descriptors(registry: Registry) -> None:
    """No descriptors at all are a wrong number, too."""
    with pytest.raises(Refusal):
        registry.convert("fd", None, [])


@pytest.mark.parametrize("tag", ["unknown", "", "NODE_HANDLE", "\ud800"])
def test_convert_unknown_tag(registry: Registry, tag: str) -> None:
    """A tag that nobody registered is refused, and its descriptors are closed."""
    fds = [new_fd(), new_fd()]
    with pytest.raises(Refusal, match="which nobody registered") as caught:
        registry.convert(tag, {"details": 1}, fds)
    assert caught.value.code == "type"
    assert not any(map(is_open, fds))


def test_convert_custom(registry: Registry) -> None:
    """A registered tag becomes the object that its conversion makes, which owns the descriptors."""
    fds = [new_fd(), new_fd()]
    log = registry.convert("log", {"details": "name"}, fds)
    assert isinstance(log, Log)
    assert (log.name, [file.fileno() for file in log.files]) == ("name", fds)
    log.close()


@pytest.mark.parametrize("options", [None, {}, {"key": "k"}])
def test_convert_custom_without_details(registry: Registry, options: dict[str, str] | None) -> None:
    """No details are None."""
    log = registry.convert("log", options, [new_fd()])
    assert isinstance(log, Log)
    assert log.name is None
    log.close()


def test_convert_custom_that_fails(registry: Registry) -> None:
    """An exception of a conversion refuses the handle; what it had not detached is closed."""
    detached: list[int] = []

    class Failing(LogConversion):
        def from_wire(self, details: Any, fds: list[FileDescriptor]) -> Log:
            detached.append(fds[0].detach())
            raise LookupError(details)

    registry.register(Log, Failing())
    fds = [new_fd(), new_fd(), new_fd()]
    with pytest.raises(Refusal, match=r"conversion of a 'log' failed: LookupError\('why'\)") as got:
        registry.convert("log", {"details": "why"}, fds)
    assert got.value.code == "kind"
    assert isinstance(got.value.__cause__, LookupError)
    assert [is_open(fd) for fd in fds] == [True, False, False]
    os.close(detached[0])


@pytest.mark.parametrize(
    ("tag", "count", "code"),
    [
        ("log", 1, None),
        ("log", 7, None),  # the conversion's to say
        ("fd", 1, None),
        ("fd", 2, "kind"),
        ("net.Native", 0, "kind"),
        ("unknown", 1, "type"),
        ("", 1, "type"),
    ],
)
def test_check(registry: Registry, tag: str, count: int, code: str | None) -> None:
    """What can never be converted is known by tag and number, before any descriptor is looked at."""
    refusal = registry.check(tag, count)
    assert (refusal and refusal.code) == code


def test_check_for_a_channel_that_accepts_none(registry: Registry) -> None:
    """All are refused, known or not, with the words of ``refuse``."""
    for tag in ("fd", "unknown"):
        refusal = registry.refuse_all(tag, 1)
        assert refusal.code == "policy"
        assert "accepts no handles" in str(refusal)


def test_refuse(registry: Registry) -> None:
    """A channel that accepts no handles closes whatever comes, known or not."""
    for tag in ("fd", "unknown"):
        fds = [new_fd(), new_fd()]
        with pytest.raises(Refusal, match="accepts no handles") as caught:
            registry.refuse(tag, None, fds)
        assert caught.value.code == "policy"
        assert not any(map(is_open, fds))


def test_what_is_refused_does_not_linger(registry: Registry) -> None:
    """The sender may have set its descriptors to linger, and one may be closed already."""
    with lingering() as (fd, copy):
        gone = new_fd()
        os.close(gone)
        with pytest.raises(Refusal, match="which nobody registered"):
            registry.convert("unknown", None, [gone, fd])
        assert not is_open(fd)
        assert not lingers(copy)


@pytest.mark.parametrize("conversion", [object(), int])
def test_register_what_is_no_conversion(conversion: object) -> None:
    """A class, or an object without the three names, is refused when it is registered."""
    with pytest.raises(TypeError, match="is no conversion: give an object with tag"):
        Registry().register(int, conversion)  # type: ignore[arg-type]


# -- a signal handler that raises ------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["fd", "log"])
@pytest.mark.parametrize("at", ["adopt", "make"])
def test_an_interrupted_conversion_closes_all(
    tag: str, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The descriptors are nobody else's: the sender has its own."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    registry = Registry()
    registry.add_builder("fd", kinds.build_fd if at == "adopt" else interrupt)  # type: ignore[arg-type]
    conversion = LogConversion()
    if at == "make":
        conversion.from_wire = interrupt  # type: ignore[assignment, method-assign]
    else:
        monkeypatch.setattr("handleipc.handles.kinds.adopt", interrupt)
    registry.register(Log, conversion)
    fds = [new_fd()] if tag == "fd" else [new_fd(), new_fd(), new_fd()]
    with pytest.raises(KeyboardInterrupt):
        registry.convert(tag, None, fds)
    assert not any(map(is_open, fds))


def test_a_descriptor_of_a_run() -> None:
    """It may be anything; a socket among them does not block."""
    ours, theirs = socket.socketpair()
    with ours, kinds.adopt_fd(theirs.detach()) as owner:
        assert not os.get_blocking(owner.fileno())
    with kinds.adopt_fd(new_fd()) as owner:
        assert not owner.closed
    fd = new_fd()
    os.close(fd)
    owner = kinds.adopt_fd(fd)
    assert owner.detach() == fd
