"""FlashInfer's private entry points: the parameters of their modules and their loading. No other file touches them.

It compiles a module for each set of dtypes and sizes, with nvcc and in 25 to 70 s, and keeps it on disk.
"""

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
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
_STEP, _REPLAY = "selective_state_update", "checkpointing_ssu"
# Where an entry is, where its C++ function is declared, and what computes the outputs that this leaves alone.
_ENTRIES = "mamba/{}.py"
_REPLAY_BINDING = "data/csrc/checkpointing_ssu_jit_binding.cu"
_PADS = Path(__file__).with_name("pads.cu")


# The arguments of a module's function, in their order, as FlashInfer's Python code calls it.
ARGUMENTS = (
    "state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, dst_state_batch_indices, pad_slot_id, "
    "state_scale, output, disable_state_update, intermediate_states_buffer, intermediate_state_indices, "
    "intermediate_state_scales, rand_seed, cache_steps, cu_seqlens, num_accepted_tokens, algorithm"
)
# Those of checkpointing_ssu, as its C++ code declares it.
REPLAY_ARGUMENTS = (
    "state, x, dt, A, B, C, output, x_cache, B_cache, dt_cache, ring_start, prev_num_accepted, D, z, dt_bias, "
    "dt_softplus, state_batch_indices, pad_slot_id, state_scale, rand_seed, d_split, cu_seqlens, cb_scaled, "
    "cumAdt_vec, cb_old, precompute_heads_per_cta, main_pipeline_stages, main_ctas_per_sm"
)
_RENAMED = {
    "output": "out",
    "intermediate_states_buffer": "intermediate_states",
    "x_cache": "replay_x",
    "B_cache": "replay_B",
    "dt_cache": "replay_dt",
    "ring_start": "replay_start",
    "prev_num_accepted": "replay_pending",
}


PARAMETERS, REPLAY_PARAMETERS = (
    tuple(_RENAMED.get(name, name) for name in arguments.split(", ")) for arguments in (ARGUMENTS, REPLAY_ARGUMENTS)
)


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

    @property
    def function(self) -> str:
        """The module's one function."""
        return _STEP

    @property
    def parameters(self) -> tuple[str, ...]:
        """Those of the function by our names, as the native adapter takes them."""
        return PARAMETERS

    def __str__(self) -> str:
        return _spelt(self)


class ReplayModule(NamedTuple):
    """The same for checkpointing_ssu."""

    state_dtype: str
    input_dtype: str
    dt_dtype: str
    weight_dtype: str
    matrixA_dtype: str
    stateIndex_dtype: str
    state_scale_dtype: str | None
    dim: int
    dstate: int
    npredicted: int
    max_window: int
    heads_per_group: int
    num_groups: int
    philox_rounds: int
    enable_pdl: bool

    @property
    def function(self) -> str:
        """The module's one function."""
        return _REPLAY

    @property
    def parameters(self) -> tuple[str, ...]:
        """Those of the function by our names, as the native adapter takes them."""
        return REPLAY_PARAMETERS

    def __str__(self) -> str:
        return _spelt(self)


def _spelt(module: tuple[object, ...]) -> str:
    return ",".join("-" if value is None else str(value) for value in module)


def missing() -> str | None:
    """Return why FlashInfer cannot be called, and the remedy; or None. This does not import FlashInfer."""
    if (package := _package()) is None:
        return f"FlashInfer is not installed: {_INSTALL}"
    version = _version()
    if version and _numbers(version) < _OLDEST:
        return f"FlashInfer {version} is too old, known are {_KNOWN}: {_INSTALL}"
    source = package / _ENTRIES.format(_STEP)
    if _signature(source, _STEP) != (Module._fields, ARGUMENTS):
        return f"FlashInfer {version} calls its kernels in another way than those known, {_KNOWN}: {_INSTALL}"
    if not _has_compiler() and importlib.util.find_spec("flashinfer_jit_cache") is None:
        return (
            "FlashInfer compiles its kernels with nvcc, which was not found: install NVIDIA's CUDA toolkit, or set "
            'CUDA_HOME to where it is; backend="triton" needs none'
        )
    return None


def lacks_replay() -> str | None:
    """Return why the FlashInfer that is installed is not called for a ReplayState, or None."""
    if (package := _package()) is None:
        return None
    fields, _ = _signature(package / _ENTRIES.format(_REPLAY), _REPLAY)
    if (fields, _declared(package / _REPLAY_BINDING)) == (ReplayModule._fields, REPLAY_ARGUMENTS):
        return None
    return (
        f"FlashInfer {_version()} has no function for a checkpoint with the tokens since, or another one than 0.7.4, "
        "whose checkpointing_ssu is known: pip install flashinfer-python==0.7.4"
    )


def _package() -> Path | None:
    """Return FlashInfer's folder; None where it is not installed: a folder of that name with no code is not it."""
    spec = importlib.util.find_spec("flashinfer")
    if spec is None or spec.origin is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


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


def load(module: Module | ReplayModule) -> Any:
    """Return the TVM-FFI function of a module, which FlashInfer compiles if it has not yet.

    Raises:
        BackendNotAvailableError: FlashInfer could not be imported, or could not compile the module.
    """

    def compiled() -> Any:
        # By its name in full: FlashInfer has a function of that name in this module's place.
        source = _imported(f"flashinfer.mamba.{module.function}")
        import torch

        values = (getattr(torch, str(v)) if n.endswith("dtype") and v else v for n, v in module._asdict().items())
        return source._get_module(*values)

    return getattr(_compiled(compiled), module.function)


# There is one, for all dtypes and sizes.
@functools.cache
def load_pads() -> Any:
    """Return what computes the outputs of padding indices, a function with the arguments of checkpointing_ssu.

    Raises:
        BackendNotAvailableError: FlashInfer could not be imported, or could not compile it.
    """

    def compiled() -> Any:
        core = _imported("flashinfer.jit.core")
        name = f"ssu_bridge_pads_{hashlib.sha256(_PADS.read_bytes()).hexdigest()[:16]}"
        return core.gen_jit_spec(name, [_PADS], use_fast_math=False).build_and_load()

    return _compiled(compiled).fill_pads


def _imported(name: str) -> Any:
    """Import a module of a package, which is imported first.

    Python locks a module before it imports the package; a thread in the package that comes to the module then waits for
    this one, which waits for the package: an error.
    """
    package = name.rpartition(".")[0]
    if package and name not in sys.modules:
        _imported(package)
    return importlib.import_module(name)


def _compiled(compile_module: Callable[[], Any]) -> Any:
    """Return a module that FlashInfer compiles, and tell of it while it does."""
    try:
        with compiling("FlashInfer's kernels with nvcc", "25 to 70 s; they are kept on disk"):
            return compile_module()
    except Exception as error:
        raise BackendNotAvailableError(
            f"backend flashinfer: FlashInfer could not compile or load its kernels ({type(error).__name__}: {error}); "
            'backend="triton" needs no compiler'
        ) from error


# Unbounded: there is one file for each entry, that of the FlashInfer that is installed.
@functools.cache
def _signature(source: Path, function: str) -> tuple[tuple[str, ...], str]:
    """Read from FlashInfer's source what its entry takes, and what that passes to a module's function."""
    entry: tuple[str, ...] = ()
    call = ""
    for node in ast.walk(ast.parse(source.read_text())) if source.exists() else ():
        if isinstance(node, ast.FunctionDef) and node.name == "_get_module":
            entry = tuple(argument.arg for argument in node.args.args)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) == function:
            call = ", ".join(map(ast.unparse, (*node.args, *node.keywords)))
    return entry, call


# Unbounded: there is one file.
@functools.cache
def _declared(source: Path) -> str:
    """Read from FlashInfer's C++ source which arguments checkpointing_ssu has."""
    text = re.sub(r"//[^\n]*", "", source.read_text()) if source.exists() else ""
    declared = re.search(r"void checkpointing_ssu\(([^)]*)\)", text)
    return ", ".join(argument.split()[-1] for argument in declared[1].split(",")) if declared else ""


def _has_compiler() -> bool:
    """Return whether nvcc is where FlashInfer looks for it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    homes = [home] if home else ["/usr/local/cuda"]
    found = [os.environ.get("FLASHINFER_NVCC"), *(f"{home}/bin/nvcc" for home in homes)]
    return any(map(shutil.which, filter(None, found))) or (home is None and shutil.which("nvcc") is not None)
