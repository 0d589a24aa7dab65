"""Compiled kernels on disk, so that a process finds them without Triton.

Triton has a cache of its own. But to look into it, a process imports Triton and hashes the 400 MB of its library, which
takes longer than everything else that the first use of a kernel does.
"""

import base64
import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from importlib import metadata, resources
from pathlib import Path

from ssu_bridge.backends.triton.compile import Argument, Compiled, Grid

_log = logging.getLogger("ssu_bridge")


def cached(target: str, compile_it: Callable[[], Compiled]) -> Compiled:
    """Return the kernel that the cache has for a target, else compile it and keep it, without the text of its stages.

    Args:
        target: all that is compiled into the kernel, spelt out.
        compile_it: what makes it.
    """
    try:
        path = directory() / f"{_key(target)}.json"
    except RuntimeError as error:  # this user has no home directory
        _log.warning("kernels are not kept, so each process compiles them; set SSU_BRIDGE_CACHE_DIR: %s", error)
        return compile_it()
    try:
        return _read(path.read_text())
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("the cached kernel %s cannot be read and is compiled anew: %s", path, error)
    compiled = compile_it()
    try:
        _write(path, compiled)
    except OSError as error:
        _log.warning("the kernel cannot be kept in %s, so the next process compiles it too: %s", path.parent, error)
    return compiled


def directory() -> Path:
    """Return where kernels are kept: SSU_BRIDGE_CACHE_DIR, or else ssu_bridge in the user's cache directory."""
    own = os.environ.get("SSU_BRIDGE_CACHE_DIR")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssu_bridge"


def _key(target: str) -> str:
    """Hash all that a kernel's code depends on: its target, our source, Triton and what the user tells Triton."""
    told = sorted(item for item in os.environ.items() if item[0].startswith("TRITON_"))
    return hashlib.sha256(repr((target, _source_hash(), told)).encode()).hexdigest()


@functools.cache
def _source_hash() -> str:
    package = resources.files("ssu_bridge")
    files = [*package.joinpath("kernels").iterdir(), package.joinpath("backends/triton_compile.py")]
    sources = sorted((file.name, file.read_bytes()) for file in files if file.name.endswith(".py"))
    return hashlib.sha256(repr((sources, metadata.version("triton"))).encode()).hexdigest()


def _read(text: str) -> Compiled:
    fields = json.loads(text)
    cubin = base64.b64decode(fields.pop("cubin"), validate=True)
    arguments = tuple(Argument(*argument) for argument in fields.pop("arguments"))
    grid, in_place = Grid(*fields.pop("grid")), tuple(fields.pop("in_place"))
    return Compiled(cubin=cubin, grid=grid, in_place=in_place, arguments=arguments, text={}, **fields)


def _write(path: Path, compiled: Compiled) -> None:
    fields = compiled._asdict()
    del fields["text"]
    fields["cubin"] = base64.b64encode(compiled.cubin).decode()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: other processes may read and write it at the same time.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        try:
            json.dump(fields, file)
            file.flush()
        except BaseException:
            os.unlink(file.name)
            raise
    os.replace(file.name, path)
