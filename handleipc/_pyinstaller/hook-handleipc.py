"""What a frozen program needs that PyInstaller cannot see: it reads imports of Python, not of C.

The modules that are loaded by name come with the first name of the package that is used.
"""

import handleipc

__all__ = ["hiddenimports"]

hiddenimports = ["_cffi_backend", *(f"handleipc.{name}" for name in handleipc._LATER)]
