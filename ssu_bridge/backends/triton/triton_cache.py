"""Where Triton keeps its files while it compiles: a folder in the user's home, or a temporary one where that fails."""

import logging
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

_log = logging.getLogger("ssu_bridge")
# Triton has one setting for the process.
_lock = threading.Lock()
# What says where Triton's files are, which nothing that is compiled depends on.
PLACES = ("TRITON_CACHE_DIR", "TRITON_HOME", "TRITON_DUMP_DIR", "TRITON_OVERRIDE_DIR")


def with_files(compile_it: Callable[[], Any]) -> Any:
    """Return what ``compile_it`` does with Triton, which writes files: a home can be read-only or full, or none.

    Raises:
        OSError: no files can be written in a temporary folder either.
    """
    from triton import knobs

    # Of a user without a home Triton would make a folder of this name.
    if Path(knobs.cache.dir).parts[:1] != ("~",):
        try:
            return compile_it()
        except OSError as error:
            _log.warning("Triton compiles in a temporary folder, because it cannot write its own: %s", error)
    with _lock, tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        return compile_it()
