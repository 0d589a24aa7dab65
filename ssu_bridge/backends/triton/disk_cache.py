"""Compiled kernels on disk, so that a process finds them without Triton.

Triton has a cache of its own. But to look into it, a process imports Triton and hashes the 400 MB of its library, which
takes longer than everything else that the first use of a kernel does.

A file here is launched as GPU code, so it is trusted only if it is the user's own, whole, and of the kernel that is
wanted: its name is a hash of all that the kernel depends on, and its content begins with a digest of the rest. How a
kernel is launched is not stored but derived anew.
"""

import base64
import functools
import hashlib
import json
import logging
import os
import stat
import tempfile
from collections.abc import Callable
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from ssu_bridge.backends.triton.compile import Compiled, identity
from ssu_bridge.backends.triton.launch import runtime_arguments
from ssu_bridge.backends.triton.specialisation import Specialisation
from ssu_bridge.backends.triton.triton_cache import PLACES

_log = logging.getLogger("ssu_bridge")


def cached(specialisation: Specialisation, compile_it: Callable[[], Compiled]) -> Compiled:
    """Return the kernel that the cache has for a specialisation, else compile it and keep it, without its stages' text.

    Args:
        specialisation: what is compiled into the kernel.
        compile_it: compiles it.
    """
    try:
        folder = directory()
    except RuntimeError as error:  # this user has no home directory
        _log.warning("kernels are not kept, so each process compiles them; set SSU_BRIDGE_CACHE_DIR: %s", error)
        return compile_it()
    path = folder / f"{_key(specialisation)}.json"
    try:
        _require_own(folder)
        return _read(path, specialisation)
    except FileNotFoundError:
        pass
    except PermissionError as error:
        _log.warning("kernels are not kept, so each process compiles them: %s", error)
        return compile_it()
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        _log.warning("the cached kernel %s cannot be read and is compiled anew: %r", path, error)
    compiled = compile_it()
    try:
        _write(path, compiled)
    except OSError as error:
        _log.warning("the kernel cannot be kept in %s, so the next process compiles it too: %s", folder, error)
    return compiled


def directory() -> Path:
    """Return where kernels are kept: SSU_BRIDGE_CACHE_DIR, or else ssu_bridge in the user's cache directory.

    Raises:
        RuntimeError: the user has no home directory.
    """
    if own := os.environ.get("SSU_BRIDGE_CACHE_DIR"):
        return Path(own).expanduser().absolute()
    # The XDG specification has relative paths ignored.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "ssu_bridge"


def _require_own(folder: Path) -> None:
    """Raise PermissionError if another user could have put files into a folder."""
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"{folder}: expected a folder of this user's own that nobody else can write, got owner {found.st_uid} and "
            f"mode {stat.filemode(found.st_mode)}; chmod go-w it, or set SSU_BRIDGE_CACHE_DIR"
        )


def _key(specialisation: Specialisation) -> str:
    """Hash all that a kernel depends on: the specialisation, our source, Triton and what the user tells Triton."""
    told = sorted(item for item in os.environ.items() if item[0].startswith("TRITON_") and item[0] not in PLACES)
    return hashlib.sha256(repr((identity(specialisation), _source_hash(), told)).encode()).hexdigest()


# Unbounded: it has no arguments, and so holds one hash.
@functools.cache
def _source_hash() -> str:
    package = resources.files("ssu_bridge.backends.triton")
    table = resources.files("ssu_bridge.core").joinpath("arguments.py")  # whose constants are compiled in
    files = [*package.joinpath("kernels").iterdir(), package.joinpath("compile.py"), table]
    sources = sorted((file.name, file.read_bytes()) for file in files if file.name.endswith(".py"))
    return hashlib.sha256(repr((sources, metadata.version("triton"))).encode()).hexdigest()


# A kernel's fields in a file, with their types. A list in the file is a tuple of names in the kernel.
_FIELDS = {"cubin": str, "name": str, "shared_bytes": int, "warps": int, "passed": list, "scratch_pointers": int}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path, specialisation: Specialisation) -> Compiled:
    """Return the kernel of a file.

    Raises:
        OSError: the file cannot be read.
        ValueError, KeyError, TypeError, RecursionError: it is not as :func:`_write` left it, or no kernel of this
            specialisation.
    """
    digest, _, text = path.read_text().partition("\n")
    if digest != _digest(text):
        raise ValueError("its digest differs")
    fields: Any = json.loads(text)
    if type(fields) is not dict or {name: type(value) for name, value in fields.items()} != _FIELDS:
        raise ValueError("its fields differ")
    cubin = base64.b64decode(fields.pop("cubin"), validate=True)
    passed = tuple(fields.pop("passed"))
    if not cubin.startswith(b"\x7fELF") or not {*passed} <= {*runtime_arguments(specialisation)}:
        raise ValueError("it is not the kernel of this call")
    return Compiled(cubin=cubin, passed=passed, text={}, **fields)


def _write(path: Path, compiled: Compiled) -> None:
    """Write a file whole or not at all: other processes may read and write it at the same time."""
    fields = {**compiled._asdict(), "cubin": base64.b64encode(compiled.cubin).decode()}
    text = json.dumps({name: fields[name] for name in _FIELDS})
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_own(path.parent)
    descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{_digest(text)}\n{text}")
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)  # Ctrl-C may come when it was put in its place already
        raise
