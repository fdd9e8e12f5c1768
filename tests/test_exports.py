"""The public names: what ``__all__`` says is there, and what is there is said."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest

import handleipc
from handleipc import exceptions

CONTRACT = """
    BoundSocket Channel ChannelBroken ChannelBusy ChannelClosed ChannelFull ChannelStats Child Connection Level
    Conversion DescriptorReleased FileDescriptor ForkedCopy HandleError HandleIPCError HandleInDoubt
    HandleNotDelivered Limits Door accepting ChannelListener connect listen_channels
    LineTooLong LocalProtocolError MalformedEnvelope MessageNotSerializable Native NoChannel
    ProtocolError RemoteProtocolError Server Socket UnsupportedHandle WorkerExited __version__ fork
    freeze_support listen listen_unix parent register spawn
""".split()


def test_public_names() -> None:
    """The package has the names of the contract, sorted, and no other."""
    assert handleipc.__all__ == sorted(CONTRACT)
    for name in CONTRACT:
        assert getattr(handleipc, name) is not None


def test_exceptions_are_at_the_top() -> None:
    """Every exception can be caught by its name at package level, and all by one base."""
    for name in exceptions.__all__:
        exception = getattr(handleipc, name)
        assert issubclass(exception, handleipc.HandleIPCError)
        assert exception.__doc__


@pytest.mark.parametrize(
    "name",
    [
        module.name
        for module in pkgutil.walk_packages(handleipc.__path__, "handleipc.")
        if not module.ispkg and module.name not in ("handleipc._core", "handleipc.__main__")
    ],
)
def test_all_is_what_is_there(name: str) -> None:
    """Each module's ``__all__`` names its public functions and classes."""
    module = importlib.import_module(name)
    assert sorted(module.__all__) == sorted(set(module.__all__))
    for public in module.__all__:
        assert hasattr(module, public), f"{name}.{public} does not exist"
    for public, value in vars(module).items():
        mine = inspect.isclass(value) or inspect.isfunction(value)
        if mine and not public.startswith("_") and value.__module__ == name:
            assert public in module.__all__ or public in UNLISTED, f"{name}.{public} is unlisted"


# Known to the command line and to tracebacks, not to importers.
UNLISTED = {"answer", "demo", "doctor"}


@pytest.mark.parametrize("name", [n for n in CONTRACT if n != "__version__"])
def test_public_things_are_documented(name: str) -> None:
    """Each public name, and each public method of it, has a docstring."""
    thing = getattr(handleipc, name)
    assert inspect.getdoc(thing)
    if inspect.isclass(thing):
        for attribute, value in vars(thing).items():
            if not attribute.startswith("_") and (callable(value) or isinstance(value, property)):
                assert inspect.getdoc(getattr(thing, attribute)), f"{name}.{attribute}"
