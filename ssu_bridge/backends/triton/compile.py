"""From a specialisation to a compiled kernel: the constants and options of Triton's compiler."""

import importlib
import re
from typing import Any, NamedTuple

import numpy as np

from ssu_bridge.backends.triton import replay
from ssu_bridge.backends.triton.launch import (
    TOKENS_OF_DECAYS,
    Kind,
    dense_strides,
    launch_of,
    record_floats,
    runtime_arguments,
)
from ssu_bridge.backends.triton.specialisation import TOKEN_ROWS, Specialisation
from ssu_bridge.backends.triton.triton_cache import with_files
from ssu_bridge.core.arguments import BOOLS, FLOATS, SEED_BYTES, TIED_AXES, VECTOR_BYTES

# From this compute capability on, GPUs convert float8 numbers themselves.
_WITH_FLOAT8 = (8, 9)


class Compiled(NamedTuple):
    """What Triton makes of a specialisation."""

    cubin: bytes
    name: str
    shared_bytes: int
    warps: int
    # The kernel's run-time arguments in order, by their names in ``runtime_arguments``.
    passed: tuple[str, ...]
    scratch_pointers: int
    # The stages on the way, by Triton's names for them: "ttgir", "ptx".
    text: dict[str, str]


def compile_step(specialisation: Specialisation) -> Compiled:
    """Compile the kernel, or take it from Triton's cache on disk. This needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = kernel_of(specialisation)
    arguments, constants = runtime_arguments(specialisation), constant_arguments(specialisation)
    passed = tuple(name for name in kernel.arg_names if name in arguments)
    dtypes = specialisation.tensors
    signature, fixed, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name not in arguments:
            signature[name], fixed[position,] = "constexpr", constants.get(name)
            continue
        signature[name] = _pointer(name, dtypes.get(name, "float32")) if arguments[name].kind is Kind.ADDRESS else "i64"
        if arguments[name].divisor > 1:
            attributes[position,] = [["tt.divisibility", arguments[name].divisor]]
    major, minor = specialisation.capability
    compiled = with_files(
        lambda: triton.compile(
            ASTSource(kernel, signature, fixed, attributes),
            target=GPUTarget("cuda", 10 * major + minor, 32),
            # Fusion is written where it is wanted: left to the compiler, a tile's bits could differ from another's.
            options={"num_warps": specialisation.tile.warps, "enable_fp_fusion": False, **_options(specialisation)},
        )
    )
    return Compiled(
        cubin=compiled.asm["cubin"],
        name=compiled.metadata.name,
        shared_bytes=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        passed=passed,
        scratch_pointers=_scratch_pointers(compiled, len(passed)),
        text={stage: compiled.asm[stage] for stage in ("ttgir", "ptx")},
    )


def _pointer(name: str, dtype: str) -> str:
    """Return Triton's type for the address of an array. A float8 state is handled as bytes."""
    bits = 8 * (SEED_BYTES if name == "rand_seed" else np.dtype(dtype).itemsize)
    kind = "bf" if dtype == "bfloat16" else "fp" if dtype in FLOATS else "u" if dtype in BOOLS else "i"
    return f"*{kind}{bits}"


def identity(s: Specialisation) -> str:
    """Return all that a kernel's code and the order of its arguments depend on, besides source files and Triton."""
    constants, arguments = sorted(constant_arguments(s).items()), sorted(runtime_arguments(s).items())
    return repr((s, constants, arguments, launch_of(s), _options(s)))


def kernel_of(specialisation: Specialisation) -> Any:
    """Return the Triton function of a specialisation."""
    module = importlib.import_module(f"ssu_bridge.backends.triton.kernels.{specialisation.kernel}")
    return getattr(module, specialisation.kernel)


def constant_arguments(s: Specialisation) -> dict[str, Any]:
    """Return what is compiled in, by the names of the kernels' arguments."""
    tied = {f"TIED_{name.upper()}": name in s.tied for name in TIED_AXES}
    blocks = {"BLOCK_P": s.tile.rows, "BLOCK_N": s.tile.columns}
    flags = {"SOFTPLUS": s.dt_softplus, "PAD": s.pad_slot_id, "OVERLAP": s.overlaps}
    state = {"STORED": _stored(s), "STORE_STATE": "state" in s.results, "ROUNDS": s.philox_rounds}
    state |= {"ROUND_EACH": s.rounds_each_token, "AHEAD": s.tile.ahead, "EARLY": s.tile.early}
    steps = {"INTERMEDIATE_STRIDE": s.intermediate_stride}
    matrix = replay.constants(s, _PARTS) if s.window else _matrix_constants(s) if s.tile.chunk else {}
    return {**s.sizes, **tied, **blocks, **flags, **state, **steps, **matrix, **_compiled_strides(s)}


def _compiled_strides(s: Specialisation) -> dict[str, int]:
    """Return the strides from token to token that are compiled in; of single tokens there is but the first."""
    if s.layout == "single":
        return {f"{name}_token_stride": 0 for name in TOKEN_ROWS}
    return {f"{name}_token_stride": stride for name, _, stride in dense_strides(s)}


def _stored(s: Specialisation) -> str:
    """Return what the kernels call the dtype of the state's elements: Triton's name of float8 where GPUs have it."""
    dtype = dict(s.dtypes)["state"]
    return "float8e4nv" if dtype == "float8_e4m3fn" and s.capability >= _WITH_FLOAT8 else dtype


_CHUNK_OF_SEGMENT_STATES = 64
_STAGES_OF_SEGMENT_STATES = 2
# Of both kernels where no decays have to be summed up in the loop over chunks.
_STAGES_WITH_DECAYS = 3
# In how many bfloat16 parts a number goes into a product without an error.
_PARTS = {"bfloat16": 1, "float16": 2, "float32": 3}
# What a thread holds side by side of a row of the state is read at once, and four threads hold the columns of a group.
_THREADS_OF_A_GROUP = 4


def _matrix_constants(s: Specialisation) -> dict[str, Any]:
    """Return what only the kernel of the matrix form has."""
    dtypes = dict(s.dtypes)
    as_it_is = s.tile.one_chunk and dtypes["state"] == "bfloat16"
    group = _THREADS_OF_A_GROUP * VECTOR_BYTES // np.dtype(dtypes["state"]).itemsize
    return {
        "WARPS": s.tile.warps,
        "W": min(group, s.tile.columns),
        "Q": _CHUNK_OF_SEGMENT_STATES if s.kernel == "segment_states" else s.tile.chunk,
        "BLOCK": TOKENS_OF_DECAYS if s.tile.decays else 0,
        "ONE": s.tile.one_chunk,
        "SEGMENTS": s.tile.segments.most,
        "LEAST": s.tile.segments.least,
        "UNIT": s.tile.segments.unit,
        "RECORD": record_floats(s),
        "STAGES": _stages(s),
        "S_PARTS": 1 if as_it_is else 3,
        **{f"{name.upper()}_PARTS": _PARTS[dtypes[name]] for name in ("x", "B", "C")},
    }


def _stages(s: Specialisation) -> int:
    """Return in how many stages the loop over a segment's chunks reads ahead."""
    if s.tile.decays:
        return _STAGES_WITH_DECAYS
    return _STAGES_OF_SEGMENT_STATES if s.kernel == "segment_states" else 1


def _options(s: Specialisation) -> dict[str, int]:
    """Return Triton's options for products and loops that read ahead; with few registers where that was measured."""
    if s.kernel == "single_token":
        return _single_token_options(s)
    dtypes = dict(s.dtypes)
    inputs = {dtypes[name] for name in ("x", "B", "C")}
    fits = s.capability[0] == 9 and s.tile.columns <= 128 and "rand_seed" not in dtypes and inputs == {"bfloat16"}
    if s.window:
        registers = replay.most_registers(s) if fits else None
        return {"num_stages": 3} | ({"maxnreg": registers} if registers else {})
    if not s.tile.chunk:
        return {}
    few = fits and s.tile.chunk == 16 and _matrix_constants(s)["S_PARTS"] == 1
    return {"num_stages": 1} | ({"maxnreg": 128} if few else {})


def _single_token_options(s: Specialisation) -> dict[str, int]:
    """Return, for 64 elements of 8 bits in a thread, so few registers that five programs of four warps fit."""
    dtypes = dict(s.dtypes)
    fits = s.capability[0] == 9 and s.tile.columns <= 128 and "rand_seed" not in dtypes
    few = np.dtype(dtypes["state"]).itemsize == 1 and s.tile.rows * s.tile.columns == 64 * 32 * s.tile.warps
    return {"maxnreg": 96} if fits and few and "A" in s.tied else {}


def _scratch_pointers(compiled: Any, passed: int) -> int:
    """Return how many pointers to scratch memory Triton added at the end; the kernel uses none of it."""
    entry = re.search(r"\.entry\s+\w+\s*\((.*?)\)", compiled.asm["ptx"], re.DOTALL)
    added = entry[1].count(".param") - passed if entry else -1
    if added not in (0, 1, 2) or compiled.metadata.global_scratch_size or compiled.metadata.profile_scratch_size:
        raise RuntimeError(f"this version of Triton compiled a kernel with {added} arguments more than were expected")
    return added
