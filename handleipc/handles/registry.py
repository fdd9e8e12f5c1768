"""Which object travels under which tag, and back: the conversion registry.

Knows kinds of handle and nothing of channels. Node's five kinds and ``FileDescriptor`` are there
from the start, a front adds its own objects, an application what it likes (native dialect only).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from handleipc.exceptions import HandleNotDelivered, UnsupportedHandle
from handleipc.handles.fds import FileDescriptor
from handleipc.handles.kinds import FD, is_expected, received_kind
from handleipc.handles.pending import Held, PendingHandle
from handleipc.handles.refusal import Refusal
from handleipc.limits import Shape
from handleipc.texts import quoted
from handleipc.typing import JSON, Options
from handleipc.wire import codec
from handleipc.wire.syscalls import discard

__all__ = ["Builder", "Conversion", "Fallback", "Preparer", "Registry"]

T = TypeVar("T")
Preparer = Callable[[Any, bool], PendingHandle]
Builder = Callable[[int, int, Options | None], object]
Fallback = Callable[[Any, bool], PendingHandle | None]

# What describes an object of the application's own; every peer has room for it beside a message
# (envelope.ENVELOPE_VALUES).
DETAILS = Shape(depth=64, values=65_536, slow_line=1024 * 1024)


class Conversion(Protocol[T]):
    """How objects of one type travel.

    Attributes:
        tag: the name on the wire; both ends register a conversion of the same tag.
    """

    tag: str

    def to_wire(self, obj: T) -> tuple[JSON, list[int]]:
        """Return what describes ``obj``, as a JSON value, and its descriptors (1 to 253).

        The descriptors stay the object's: they are borrowed, and asked for again at each write.
        """
        ...

    def from_wire(self, details: JSON, fds: list[FileDescriptor]) -> T:
        """Make the object from what describes it and from its descriptors, which are its own now.

        An exception refuses the handle: descriptors not detached by then are closed, and the
        sender gets its object back.
        """
        ...


CONVERSION = ("tag", "to_wire", "from_wire")


class Registry:
    """Handles to tags and tags to handles."""

    def __init__(self) -> None:
        self._preparers: dict[type, Preparer] = {}
        self._builders: dict[str, Builder] = {}
        self._custom: dict[str, Conversion[Any]] = {}
        self._found: dict[type, Preparer | None] = {}
        self._fallbacks: list[Fallback] = []
        self._plain_builders: dict[str, Callable[[int], object]] = {}

    def add_fallback(self, fallback: Fallback) -> None:
        """Ask ``fallback`` about objects of types nobody has named; None means it knows neither."""
        self._fallbacks.append(fallback)

    def add_preparer(self, python_type: type, preparer: Preparer) -> None:
        """Send objects of this type, and of its subclasses, as ``preparer`` prepares them."""
        self._preparers[python_type] = preparer
        self._found.clear()

    def add_builder(
        self,
        tag: str,
        builder: Builder,
        plain: Callable[[int], object] | None = None,
    ) -> None:
        """Make what arrives under a built-in tag with ``builder``, which owns the descriptor.

        Args:
            tag: the tag.
            builder: called with the descriptor, its kind and the options. One that raises does
                not own the descriptor.
            plain: called instead with the descriptor alone, where there are no options and nobody
                looks at each. It raises nothing, and its object looks what it is when it is used.
        """
        self._builders[tag] = builder
        if plain is not None:
            self._plain_builders[tag] = plain
        else:
            self._plain_builders.pop(tag, None)

    def register(self, python_type: type[T], conversion: Conversion[T]) -> None:
        """Send objects of this type, and of its subclasses, by ``conversion``. Native dialect only.

        Registering the same type again replaces its conversion, and its tag: the old one is
        accepted no longer, unless another type was registered with it.

        Raises:
            ValueError: the tag is empty, or a built-in one.
            TypeError: this is no conversion.
        """
        if isinstance(conversion, type) or not all(hasattr(conversion, n) for n in CONVERSION):
            raise TypeError(
                f"{conversion!r} is no conversion: give an object with tag, to_wire() and"
                " from_wire(), not a class"
            )
        tag = conversion.tag
        if not isinstance(tag, str) or not tag:
            raise ValueError("a conversion needs a tag: a name that both ends agree on")
        if tag in self._builders:
            raise ValueError(f"the tag {tag!r} is built in: choose another name")
        replaced = self._preparers.get(python_type)
        self._custom[tag] = conversion
        self.add_preparer(python_type, _Custom(tag, conversion))
        if isinstance(replaced, _Custom) and replaced.tag != tag:
            self._forget(replaced.tag)

    def _forget(self, tag: str) -> None:
        """A type has this tag no longer: only if another has it, it is still accepted."""
        del self._custom[tag]
        for preparer in self._preparers.values():
            if isinstance(preparer, _Custom) and preparer.tag == tag:
                self._custom[tag] = preparer.conversion

    def prepare(self, handle: object, keep_open: bool) -> PendingHandle:
        """Prepare ``handle`` to be sent.

        Raises:
            UnsupportedHandle: nothing is known about objects of its type, or this one is closed,
                unconnected or otherwise not to be sent.
            HandleNotDelivered: its client is gone, or the system refused what is asked of it.
        """
        python_type = type(handle)
        preparer = self._found.get(python_type) or self._preparer(python_type)
        try:
            if preparer is not None:
                return preparer(handle, keep_open)
            for fallback in self._fallbacks:
                pending = fallback(handle, keep_open)
                if pending is not None:
                    return pending
        except OSError as error:
            if isinstance(preparer, _Custom):
                raise  # the application's own
            reason = f"the system refused what is asked of it before it is sent: {error.strerror}"
            raise HandleNotDelivered(handle, reason) from error
        raise UnsupportedHandle(f"a {python_type.__name__} is no handle: {_advice(handle)}")

    def _preparer(self, python_type: type) -> Preparer | None:
        try:
            return self._found[python_type]
        except KeyError:
            pass
        for base in python_type.__mro__:
            if base in self._preparers:
                break
        preparer = self._found[python_type] = self._preparers.get(base)
        return preparer

    def convert(self, tag: str, options: Options | None, fds: list[int]) -> object:
        """Make a handle of descriptors that were received; owns them whatever happens.

        Raises:
            Refusal: unknown tag, wrong kind of descriptor, or a conversion that failed.
        """
        builder = self._builders.get(tag)
        if builder is None:
            return self._convert_custom(tag, options, fds)
        try:
            kind = received_kind(fds[0]) if len(fds) == 1 else 0
            if len(fds) == 1 and (tag == FD or is_expected(tag, kind, options)):
                return builder(fds[0], kind, options)
        except BaseException as error:
            discard(*fds)
            if not isinstance(error, Exception):
                raise  # a signal handler's
            # Of the system; or no event loop runs, at an end without one.
            text = f"what a {tag} of the peer needs could not be made: {error!s:.100}"
            raise Refusal("kind", text) from error
        discard(*fds)
        raise Refusal("kind", f"the peer sent a {tag} with a descriptor of another kind")

    def maker(self, tag: str) -> Callable[[int], object] | None:
        """Return what makes handles of this tag that come without options.

        It raises nothing. None if each is to be converted.
        """
        return self._plain_builders.get(tag)

    def check(self, tag: str, count: int) -> Refusal | None:
        """Return why a handle of this tag and number of descriptors can never be converted.

        None if perhaps it can: that is seen when its turn comes.
        """
        if tag in self._builders:
            if count == 1:
                return None
            return Refusal("kind", f"the peer sent a {tag} with {count} descriptors")
        return None if tag in self._custom else _unknown(tag)

    def refuse_all(self, tag: str, count: int) -> Refusal:
        """As ``check``, for a channel that accepts none."""
        return _against_policy(tag)

    def refuse(self, tag: str, options: Options | None, fds: list[int]) -> object:
        """Refuse any handle, for a channel that accepts none.

        Raises:
            Refusal: always.
        """
        discard(*fds)
        raise _against_policy(tag)

    def _convert_custom(self, tag: str, options: Options | None, fds: list[int]) -> object:
        conversion = self._custom.get(tag)
        if conversion is None:
            discard(*fds)
            raise _unknown(tag)
        owned = [FileDescriptor(fd) for fd in fds]
        try:
            for fd in fds:
                received_kind(fd)
            return conversion.from_wire((options or {}).get("details"), owned)
        except BaseException as error:
            discard(*(one.detach() for one in owned if not one.closed))
            if not isinstance(error, Exception):
                raise
            refusal = Refusal("kind", f"the conversion of a {tag!r} failed: {error!r}")
            raise refusal from error

    def copy(self) -> Registry:
        """Return a registry that starts with what this one knows."""
        other = Registry()
        other._preparers.update(self._preparers)
        other._builders.update(self._builders)
        other._plain_builders.update(self._plain_builders)
        other._custom.update(self._custom)
        other._fallbacks.extend(self._fallbacks)
        return other


class _Custom:
    """Prepares what the application registered."""

    __slots__ = ("conversion", "tag")

    def __init__(self, tag: str, conversion: Conversion[Any]) -> None:
        self.tag = tag
        self.conversion = conversion

    def __call__(self, obj: object, keep_open: bool) -> PendingHandle:
        return _prepare_custom(obj, self.conversion, keep_open)


def _advice(handle: object) -> str:
    """Say what to send instead of what is no handle."""
    if isinstance(handle, int):
        return "if it is the number of a descriptor, send a FileDescriptor, which owns it"
    if isinstance(handle, (tuple, list)):
        return "send one handle with each message, and of two streams the writer"
    advice = "send a Connection, Server, socket, Native or FileDescriptor, or register() its type"
    if hasattr(handle, "fileno"):
        advice += "; FileDescriptor(os.dup(it.fileno())) sends its descriptor to a handleipc peer"
    return advice


def _prepare_custom(obj: object, conversion: Conversion[Any], keep_open: bool) -> PendingHandle:
    details, fds = conversion.to_wire(obj)
    if not 1 <= len(fds) <= 253:
        raise UnsupportedHandle(
            f"a {conversion.tag!r} came with {len(fds)} descriptors: 1 to 253 travel together"
        )
    # As they are now; what is not JSON is refused before anything leaves.
    spelled = codec.encode(details, DETAILS)
    close = getattr(obj, "close", None)
    return Held(
        obj,
        conversion.tag,
        b'{"details":%b}' % spelled if details is not None else b"",
        read=lambda: conversion.to_wire(obj)[1],
        fds_needed=len(fds),
        native_only=True,
        on_delivered=None if keep_open else close,
    )


def _unknown(tag: str) -> Refusal:
    return Refusal(
        "type",
        f"the peer sent a handle of the type {quoted(tag, 80)}, which nobody registered here:"
        " register() a conversion with that tag",
    )


def _against_policy(tag: str) -> Refusal:
    return Refusal(
        "policy", f"refused a {quoted(tag, 80)} of the peer: this channel accepts no handles"
    )
