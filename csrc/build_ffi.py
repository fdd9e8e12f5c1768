"""The cffi builder: compiles the C core into ``handleipc._core``.

The only Python that knows compiler flags. Outside the package, so it never ships in a wheel.
"""

import os
import pathlib
import sys
import sysconfig

from cffi import FFI

if sys.platform == "win32":
    raise SystemExit(
        "handleipc hands over POSIX descriptors between processes: Windows is not supported"
    )

HERE = pathlib.Path(__file__).parent

ffibuilder = FFI()
ffibuilder.cdef((HERE / "hipc_api.h").read_text())
ffibuilder.set_source(
    "handleipc._core",
    '#include "hipc.h"',
    sources=["csrc/hipc_framer.c", "csrc/hipc_process.c", "csrc/hipc_socket.c"],
    include_dirs=["csrc"],
    depends=["csrc/hipc.h", "csrc/hipc_api.h"],
    # HANDLEIPC_CFLAGS lets CI add -Werror or a sanitizer without a second build recipe.
    extra_compile_args=[
        *("-std=c11", "-O2", "-Wall", "-Wextra"),
        *os.environ.get("HANDLEIPC_CFLAGS", "").split(),
    ],
    extra_link_args=os.environ.get("HANDLEIPC_LDFLAGS", "").split(),
    # Free-threaded interpreters have no limited API before 3.15.
    py_limited_api=not sysconfig.get_config_var("Py_GIL_DISABLED"),
)
