"""The native library, which lies in the installed package and is loaded once, when it is first needed."""

import functools
from typing import Any


# Unbounded: there is one library.
@functools.cache
def library() -> Any:
    """Return the TVM-FFI module of the project's native code.

    Importing TVM-FFI takes a second or two where Torch is installed (it imports Torch), so nothing imports it before a
    kernel is needed.

    Raises:
        RuntimeError: the native library was not built or installed with the package.
    """
    from tvm_ffi import libinfo

    return libinfo.load_lib_module("ssu-bridge", "ssu_bridge")
