"""Types of the compiled core, so that ``Any`` stops here. The contracts are in csrc/hipc_api.h."""

from collections.abc import Callable
from typing import Any

class CData:
    """A value owned by cffi."""

    def __getattr__(self, name: str) -> Any: ...
    def __setattr__(self, name: str, value: Any) -> None: ...
    def __add__(self, offset: int) -> CData: ...

class FFI:
    def new(self, cdecl: str, init: object = None) -> CData: ...
    def new_allocator(self, *, should_clear_after_alloc: bool) -> Callable[..., CData]: ...
    def from_buffer(self, cdecl: str, python_buffer: object) -> CData: ...
    def release(self, cdata: CData) -> None: ...
    def buffer(self, cdata: CData) -> Any: ...

class Lib:
    HIPC_MAX_FDS: int
    HIPC_READ_FDS: int
    HIPC_SET_FIELDS: int
    HIPC_ADDRESS_SIZE: int
    HIPC_DRAINED: int
    HIPC_MORE: int
    HIPC_FULL: int
    HIPC_EOF: int
    HIPC_TOO_DEEP: int
    HIPC_TOO_MANY: int
    HIPC_KIND_SOCKET: int
    HIPC_KIND_LISTENING: int
    HIPC_KIND_FIFO: int
    HIPC_KIND_OTHER: int

    @staticmethod
    def hipc_receive(fd: int, reader: CData, budget: int) -> int: ...
    @staticmethod
    def hipc_feed(reader: CData, data: bytes, length: int) -> int: ...
    @staticmethod
    def hipc_shape(text: bytes | CData, length: int, max_depth: int, max_values: int) -> int: ...
    @staticmethod
    def hipc_send(
        fd: int, data: bytes, offset: int, length: int, fds: list[int], n_fds: int
    ) -> int: ...
    @staticmethod
    def hipc_send_parts(
        fd: int,
        head: bytes,
        head_length: int,
        body: bytes,
        body_length: int,
        tail: bytes,
        tail_length: int,
        offset: int,
        fds: list[int],
        n_fds: int,
    ) -> int: ...
    @staticmethod
    def hipc_accept(fd: int, max: int, fds: CData, addresses: CData, lengths: CData) -> int: ...
    @staticmethod
    def hipc_exit_with_parent(signal: int, parent: int) -> int: ...
    @staticmethod
    def hipc_close(fd: int) -> int: ...
    @staticmethod
    def hipc_end(fd: int, data: bytes, length: int) -> int: ...
    @staticmethod
    def hipc_signals_inherited() -> int: ...
    @staticmethod
    def hipc_reset_signals() -> None: ...
    @staticmethod
    def hipc_kind(fd: int) -> int: ...
    @staticmethod
    def hipc_adopt(fd: int) -> int: ...

ffi: FFI
lib: Lib
