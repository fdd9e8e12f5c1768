"""Build the C core. Everything else about the package is in pyproject.toml."""

import sysconfig

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

# Free-threaded interpreters have no limited API before 3.15: they get a wheel of their own.
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")


class BuildCore(build_ext):
    """Says what is missing where the C core cannot be compiled."""

    def run(self) -> None:
        """Compile it."""
        try:
            super().run()
        except (CCompilerError, ExecError, PlatformError) as error:
            raise SystemExit(
                f"handleipc has a C core, which could not be compiled ({error}): install a C"
                " compiler and this Python's headers (Debian: apt install gcc python3-dev), or"
                " install a wheel"
            ) from None


setup(
    cffi_modules=["csrc/build_ffi.py:ffibuilder"],
    cmdclass={"build_ext": BuildCore},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if LIMITED else {},
)
