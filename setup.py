"""Build the C core. Everything else about the package is in pyproject.toml."""

import sysconfig

from setuptools import setup

# Free-threaded interpreters have no limited API before 3.15: they get a wheel of their own.
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    cffi_modules=["csrc/build_ffi.py:ffibuilder"],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if LIMITED else {},
)
