"""FlashInfer's private entry point: the parameters of a module and its loading. No other file touches it.

It compiles one for each set of dtypes and sizes, with nvcc and in 25 to 70 s, and keeps it on disk.
"""

import ast
import functools
import importlib.metadata
import importlib.util
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ssu_bridge.errors import BackendNotAvailableError
from ssu_bridge.progress import compiling

_OLDEST, _KNOWN = (0, 6, 11), "0.6.11 to 0.7.4"
# The first version whose stochastic rounding in software is right for subnormal numbers, infinities and NaN.
_ROUNDS_SUBNORMALS = (0, 7, 4)
# The first that compiles only the kernels that fit a headdim. Those before drop rows of headdims above 128.
_FITS_HEADDIMS = (0, 7, 4)
_INSTALL = "pip install 'flashinfer-python>=0.6.11'"
_SOURCE = "mamba/selective_state_update.py"


class Module(NamedTuple):
    """The parameters that FlashInfer compiles a module for, under its names; dtypes by Torch's names."""

    state_dtype: str
    input_dtype: str
    weight_dtype: str
    matrixA_dtype: str
    stateIndex_dtype: str
    dim: int
    dstate: int
    ntokens_mtp: int
    cu_seqlens_dtype: str
    num_accepted_tokens_dtype: str
    sm_major: int
    state_scale_dtype: str | None
    philox_rounds: int

    def __str__(self) -> str:
        return ",".join("-" if value is None else str(value) for value in self)


# The arguments of a module's function, in their order.
ARGUMENTS = (
    "state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, dst_state_batch_indices, pad_slot_id, "
    "state_scale, output, disable_state_update, intermediate_states_buffer, intermediate_state_indices, "
    "intermediate_state_scales, rand_seed, cache_steps, cu_seqlens, num_accepted_tokens, algorithm"
)


# The same by our names, as the native adapter takes them.
_RENAMED = {"output": "out", "intermediate_states_buffer": "intermediate_states"}
PARAMETERS = tuple(_RENAMED.get(name, name) for name in ARGUMENTS.split(", "))


def missing() -> str | None:
    """Return why FlashInfer cannot be called, and the remedy; or None. This does not import FlashInfer."""
    spec = importlib.util.find_spec("flashinfer")
    if spec is None or not spec.submodule_search_locations:
        return f"FlashInfer is not installed: {_INSTALL}"
    version = _version()
    if version and _numbers(version) < _OLDEST:
        return f"FlashInfer {version} is too old, known are {_KNOWN}: {_INSTALL}"
    if _signature(Path(spec.submodule_search_locations[0]) / _SOURCE) != (Module._fields, ARGUMENTS):
        return f"FlashInfer {version} calls its kernels in another way than those known, {_KNOWN}: {_INSTALL}"
    if not _has_compiler() and importlib.util.find_spec("flashinfer_jit_cache") is None:
        return (
            "FlashInfer compiles its kernels with nvcc, which was not found: install NVIDIA's CUDA toolkit, or set "
            'CUDA_HOME to where it is; backend="triton" needs none'
        )
    return None


def rounds_subnormals() -> bool:
    """Return whether the installed version rounds stochastically to subnormal numbers too."""
    return _numbers(_version()) >= _ROUNDS_SUBNORMALS


def headdims() -> Sequence[int]:
    """Return the headdims that the installed version computes right."""
    return range(32, 257, 16) if _numbers(_version()) >= _FITS_HEADDIMS else (64, 128)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def _version() -> str:
    """Return FlashInfer's version, "" for sources that were not installed as a package."""
    try:
        return importlib.metadata.version("flashinfer-python")
    except importlib.metadata.PackageNotFoundError:
        return ""


def load(module: Module) -> Any:
    """Return the TVM-FFI function of a module, which FlashInfer compiles if it has not yet.

    Raises:
        BackendNotAvailableError: FlashInfer could not be imported, or could not compile the module.
    """
    try:
        # By its name in full: FlashInfer has a function of that name in this module's place.
        source = importlib.import_module("flashinfer.mamba.selective_state_update")
        import torch

        values = (getattr(torch, str(v)) if n.endswith("dtype") and v else v for n, v in module._asdict().items())
        with compiling("FlashInfer's kernels with nvcc", "25 to 70 s; they are kept on disk"):
            return source._get_module(*values).selective_state_update
    except Exception as error:
        raise BackendNotAvailableError(
            f"backend flashinfer: FlashInfer could not compile or load its kernels ({type(error).__name__}: {error}); "
            'backend="triton" needs no compiler'
        ) from error


# Unbounded: there is one file, that of the FlashInfer that is installed.
@functools.cache
def _signature(source: Path) -> tuple[tuple[str, ...], str]:
    """Read from FlashInfer's source what its entry takes, and what that passes to a module's function."""
    entry: tuple[str, ...] = ()
    call = ""
    for node in ast.walk(ast.parse(source.read_text())) if source.exists() else ():
        if isinstance(node, ast.FunctionDef) and node.name == "_get_module":
            entry = tuple(argument.arg for argument in node.args.args)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "selective_state_update":
            call = ", ".join(map(ast.unparse, (*node.args, *node.keywords)))
    return entry, call


def _has_compiler() -> bool:
    """Return whether nvcc is where FlashInfer looks for it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    homes = [home] if home else ["/usr/local/cuda"]
    found = [os.environ.get("FLASHINFER_NVCC"), *(f"{home}/bin/nvcc" for home in homes)]
    return any(map(shutil.which, filter(None, found))) or (home is None and shutil.which("nvcc") is not None)
