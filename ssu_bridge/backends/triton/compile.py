"""From a problem to a compiled kernel: what is compiled in, what the launcher passes, and Triton's compiler."""

import dataclasses
import enum
import importlib
import math
import re
from typing import Any, NamedTuple

import numpy as np

from ssu_bridge.backends.triton import replay
from ssu_bridge.backends.triton.tiles import Tile, is_plain
from ssu_bridge.backends.triton.triton_cache import with_files
from ssu_bridge.core.arguments import (
    ARGUMENTS,
    BOOLS,
    ELEMENTWISE,
    FLOATS,
    SEED_BYTES,
    TIED_AXES,
    TOKENWISE,
    VECTOR_BYTES,
)
from ssu_bridge.core.problem import Problem

# From this compute capability on, a kernel can start before those ahead of it are done.
_OVERLAPPING = (9, 0)

# From this one on, GPUs convert float8 numbers themselves.
_WITH_FLOAT8 = (8, 9)


@dataclasses.dataclass(frozen=True, slots=True)
class Specialisation:
    """Everything that is compiled into a kernel. Numbers of sequences, slots and tokens, and strides, are not."""

    kernel: str
    capability: tuple[int, int]
    nheads: int
    headdim: int
    dstate: int
    ngroups: int
    layout: str
    dtypes: tuple[tuple[str, str], ...]
    results: tuple[str, ...]
    tied: tuple[str, ...]
    tables: tuple[str, ...]
    dt_softplus: bool
    pad_slot_id: int
    intermediate_stride: int
    philox_rounds: int
    rounds_each_token: bool
    window: int
    most_tokens: int
    unaligned: tuple[str, ...]
    # Whether rows of several tokens have no gaps between them, and so strides that are compiled in.
    dense: bool
    tile: Tile

    @property
    def target(self) -> str:
        """The specialisation spelt out."""
        sizes = f"H{self.nheads},P{self.headdim},N{self.dstate},G{self.ngroups}"
        arrays = ",".join(
            f"{name}:{dtype}{'/head' if name in self.tied else ''}{'/token' if name in self.tables else ''}"
            for name, dtype in self.dtypes
        )
        flags = f"softplus={self.dt_softplus:d};pad={self.pad_slot_id};unaligned={','.join(self.unaligned)}"
        if "rand_seed" in dict(self.dtypes):
            flags += f";rounds={self.philox_rounds}"
        if self.intermediate_stride > 1:
            flags += f";stride={self.intermediate_stride}"
        if self.rounds_each_token:
            flags += ";each=1"
        if self.dense:
            flags += ";dense=1"
        if self.window:
            flags += f";replay={self.window}+{self.most_tokens}"
        ahead = f"+{self.tile.ahead}" if self.tile.ahead else ""
        chunk = f"x{self.tile.chunk}{'' if self.tile.one_chunk else '+'}" if self.tile.chunk else ""
        chunk += "/d" if self.tile.decays else ""
        heads = f"*{self.tile.heads}" if self.tile.heads > 1 else ""
        if self.tile.segments.most > 1:
            chunk += f";segments={self.tile.segments.most}x{self.tile.segments.least}"
        return (
            f"ssu_bridge.triton(sm{self.capability[0]}{self.capability[1]};{self.layout};{sizes};{arrays}->"
            f"{','.join(self.results)};{flags};tile={self.tile.rows}x{self.tile.warps}{chunk}{heads}{ahead})"
        )


def specialise(problem: Problem, tile: Tile) -> Specialisation:
    """Return what has to be compiled for a problem that runs on CUDA."""
    assert problem.capability is not None
    return Specialisation(
        kernel=_kernel_name(problem, tile),
        capability=problem.capability,
        nheads=problem.nheads,
        headdim=problem.headdim,
        dstate=problem.dstate,
        ngroups=problem.ngroups,
        layout=problem.layout,
        dtypes=tuple((name, dtype) for name, dtype in problem.dtypes if name != "out"),
        results=problem.results,
        tied=problem.tied,
        tables=tuple(sorted(problem.tables)),
        dt_softplus=problem.options.dt_softplus,
        pad_slot_id=problem.options.pad_slot_id,
        intermediate_stride=problem.options.intermediate_stride,
        philox_rounds=problem.options.config.philox_rounds if "rand_seed" in problem.names else 0,
        rounds_each_token=problem.rounds_each_token,
        window=problem.options.replay_window,
        most_tokens=problem.options.replay_tokens,
        unaligned=tuple(sorted(problem.unaligned)),
        dense=_is_dense(problem),
        tile=tile,
    )


def _is_dense(problem: Problem) -> bool:
    """Return whether rows of tokens have no gaps between them, of calls that were measured to be faster for it."""
    is_measured = problem.layout != "single" and not (problem.replays or problem.rounds_each_token)
    return is_measured and not {*_TOKENWISE}.intersection(problem.strided)


def _kernel_name(problem: Problem, tile: Tile) -> str:
    if problem.replays:
        return "replay_tokens" if tile.chunk else "replay_token"
    return "matrix_form" if tile.chunk else "single_token" if is_plain(problem) else "many_tokens"


def launches(specialisation: Specialisation) -> tuple[Specialisation, ...]:
    """Return the specialisations of the kernels that a call launches, one after the other."""
    tile = specialisation.tile
    before = ["decays"] * tile.decays + ["segment_states"] * (tile.segments.most > 1)
    return (*(dataclasses.replace(specialisation, kernel=kernel) for kernel in before), specialisation)


class Kind(enum.IntEnum):
    """The properties of a tensor that the launcher can pass, by their numbers in native code."""

    ADDRESS = 0
    STRIDE = 1
    SIZE = 2


class Argument(NamedTuple):
    """An argument of the kernel: the property, the tensor, the axis, and a divisor of the value."""

    kind: Kind
    tensor: int
    axis: int = 0
    divisor: int = 1


class Grid(NamedTuple):
    """The number of programs: ``programs`` for each sequence, of each segment but a sequence's last one, or of both.

    The number of sequences is the length of the first axis of ``tensor``, less ``less``.
    """

    programs: int
    tensor: int
    less: int
    # Whether there are programs for each sequence; the most segments of one that have programs of their own, and the
    # fewest tokens of such; the tensor and the axis that tell how many tokens there are, of each sequence or packed.
    whole: bool = True
    most: int = 0
    least: int = 1
    tokens: int = 0
    axis: int = 0

    def blocks(self, sequences: Any, tokens: Any) -> Any:
        """Return the number of programs. Either number can be a symbolic one of JAX, and then it may be more."""
        segments = 0
        if self.most and self.axis:
            segments = sequences * min(self.most, tokens // self.least)
        elif self.most:
            segments = tokens // self.least
            segments = min(sequences * self.most, segments) if isinstance(sequences, int) else segments
        return self.programs * (self.whole * sequences + segments)


class Launch(NamedTuple):
    """The launch parameters of a call's kernels. They follow from the specialisation and are never stored."""

    grids: tuple[Grid, ...]
    # The inputs that the results after out are, by their numbers.
    in_place: tuple[int, ...]
    tensors: int
    # Bytes of scratch memory for each program of each kernel; all of it together is one tensor more.
    scratch: tuple[int, ...]
    # It may be launched before the kernels ahead of it are done, and waits for them itself.
    overlaps: bool


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
    dtypes = _kernel_dtypes(specialisation)
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


def identity(specialisation: Specialisation) -> str:
    """Return all that a kernel's code and the order of its arguments depend on, besides source files and Triton."""
    constants, arguments = constant_arguments(specialisation), runtime_arguments(specialisation)
    return repr((specialisation, sorted(constants.items()), sorted(arguments.items()), launch_of(specialisation)))


def kernel_of(specialisation: Specialisation) -> Any:
    """Return the Triton function of a specialisation."""
    module = importlib.import_module(f"ssu_bridge.backends.triton.kernels.{specialisation.kernel}")
    return getattr(module, specialisation.kernel)


def launch_of(specialisation: Specialisation) -> Launch:
    """Return how the kernels of a specialisation are launched."""
    names = list(_kernel_dtypes(specialisation))
    return Launch(
        grids=tuple(map(grid_of, launches(specialisation))),
        in_place=tuple(names.index(name) for name in specialisation.results if name != "out"),
        tensors=_tensors(specialisation),
        scratch=tuple(FLOAT_BYTES * _scratch_floats(one) for one in launches(specialisation)),
        overlaps=specialisation.capability >= _OVERLAPPING,
    )


def grid_of(specialisation: Specialisation) -> Grid:
    """Return the grid of a kernel: a program for each sequence or segment, head and block of rows."""
    s, names = specialisation, list(_kernel_dtypes(specialisation))
    programs = s.nheads // s.tile.heads * -(-s.headdim // s.tile.rows)
    packed = s.layout == "packed"
    whole = Grid(programs, names.index("cu_seqlens" if packed else "x"), less=packed)
    if s.kernel == "decays":
        return whole._replace(programs=s.nheads, most=_ANY, least=_TOKENS_OF_DECAYS, tokens=names.index("x"), axis=1)
    if s.tile.segments.most == 1:
        return whole
    return whole._replace(
        whole=s.kernel != "segment_states",
        most=s.tile.segments.most - 1,
        least=s.tile.segments.least,
        tokens=names.index("x"),
        axis=_TOKEN_AXIS[s.layout],
    )


def _tensors(s: Specialisation) -> int:
    return len(s.dtypes) + len(s.results)


FLOAT_BYTES = 4
# So that records begin where lines of the cache do.
_FLOATS_IN_A_LINE = 32


def _scratch_floats(s: Specialisation) -> int:
    """Return how many float32 a program of a kernel leaves to the kernels after it."""
    if s.kernel == "decays":
        return _NUMBERS_OF_DECAYS * _TOKENS_OF_DECAYS
    return _record(s) if s.kernel == "segment_states" else 0


def _record(s: Specialisation) -> int:
    """Return how many float32 the record of a segment has: two tiles and a decay."""
    return 2 * s.tile.rows * s.tile.columns + _FLOATS_IN_A_LINE


# How many numbers a token has for its decays, and the tokens of a program that computes them.
_NUMBERS_OF_DECAYS = 5
_TOKENS_OF_DECAYS = 512
_ANY = 2**31 - 1

# What has a row for each token.
_TOKENWISE = (*TOKENWISE, "out")
_TOKEN_AXIS = {"multi": 1, "packed": 0}


def runtime_arguments(specialisation: Specialisation) -> dict[str, Argument]:
    """Return what the launcher can pass, by the names of the kernels' arguments.

    Tensors are counted as the kernel function takes them: the inputs, out, what is updated in place, scratch memory.
    """
    place = {name: i for i, name in enumerate(_kernel_dtypes(specialisation))}
    result = {}
    for name in place:
        divisor = _divisor(specialisation, name)
        result[name] = Argument(Kind.ADDRESS, place[name], divisor=divisor)
        for axis, stride in enumerate(_strides(specialisation, name)):
            if not (specialisation.dense and stride == "token_stride" and name in _TOKENWISE):
                result[f"{name}_{stride}"] = Argument(Kind.STRIDE, place[name], axis, _elements(specialisation, name))
    if any(map(_scratch_floats, launches(specialisation))):
        result["scratch"] = Argument(Kind.ADDRESS, _tensors(specialisation), divisor=VECTOR_BYTES)
    sequences = ("cu_seqlens" if specialisation.layout == "packed" else "x", 0)
    sizes = {
        "sequences": sequences,
        "slots": ("state", 0),
        "entries": ("intermediate_states", 0),
        "steps": ("intermediate_states", 1),
    }
    sizes |= {"tokens": ("x", _TOKEN_AXIS[specialisation.layout])} if specialisation.layout in _TOKEN_AXIS else {}
    columns = {"state_batch_indices": "source_columns", "dst_state_batch_indices": "target_columns"}
    sizes |= {columns[name]: (name, 1) for name in specialisation.tables}
    for size, (name, axis) in sizes.items():
        if name in place:
            result[size] = Argument(Kind.SIZE, place[name], axis)
    return result


def _strides(specialisation: Specialisation, name: str) -> tuple[str, ...]:
    """Return what the strides of an array's free axes are called in the kernels."""
    free = ARGUMENTS[name].free
    if free == "*":
        by_layout = {"single": ("stride",), "multi": ("stride", "token_stride"), "packed": ("token_stride",)}
        return by_layout[specialisation.layout]
    return ("stride", "token_stride")[: 2 if name in specialisation.tables else min(len(free), 1)]


def _divisor(specialisation: Specialisation, name: str) -> int:
    """Return of how many bytes an array's address is a multiple."""
    if name == "rand_seed":
        return SEED_BYTES
    single = name in (*specialisation.tied, *specialisation.unaligned) or name in ELEMENTWISE
    return 1 if single else VECTOR_BYTES


def _elements(specialisation: Specialisation, name: str) -> int:
    """Return of how many elements an array's strides are multiples."""
    return max(1, _divisor(specialisation, name) // np.dtype(_kernel_dtypes(specialisation)[name]).itemsize)


def _kernel_dtypes(specialisation: Specialisation) -> dict[str, str]:
    dtypes = dict(specialisation.dtypes)
    return {**dtypes, "out": dtypes["x"]}


def constant_arguments(s: Specialisation) -> dict[str, Any]:
    """Return what is compiled in, by the names of the kernels' arguments."""
    tied = {f"TIED_{name.upper()}": name in s.tied for name in TIED_AXES}
    blocks = {"BLOCK_P": s.tile.rows, "BLOCK_N": s.tile.columns}
    flags = {"SOFTPLUS": s.dt_softplus, "PAD": s.pad_slot_id, "OVERLAP": s.capability >= _OVERLAPPING}
    state = {"STORED": _stored(s), "STORE_STATE": "state" in s.results, "ROUNDS": s.philox_rounds}
    state |= {"ROUND_EACH": s.rounds_each_token, "AHEAD": s.tile.ahead, "EARLY": s.tile.early}
    steps = {"INTERMEDIATE_STRIDE": s.intermediate_stride}
    matrix = replay.constants(s, _PARTS) if s.window else _matrix_constants(s) if s.tile.chunk else {}
    return {**_sizes(s), **tied, **blocks, **flags, **state, **steps, **matrix, **_compiled_strides(s)}


def _compiled_strides(s: Specialisation) -> dict[str, int]:
    """Return the strides from token to token that are compiled in; of single tokens there is but the first."""
    if s.layout == "single":
        return {f"{name}_token_stride": 0 for name in _TOKENWISE}
    return {f"{name}_token_stride": stride for name, _, stride in dense_strides(s)}


def dense_strides(s: Specialisation) -> list[tuple[str, Argument, int]]:
    """Return the arrays whose strides from token to token are compiled in, each stride's place, and what it is."""
    if not s.dense:
        return []
    sizes, axis = _sizes(s), _TOKEN_AXIS[s.layout]
    return [
        (name, Argument(Kind.STRIDE, place, axis), math.prod(sizes[symbol] for symbol in _row(s, name)))
        for place, name in enumerate(_kernel_dtypes(s))
        if name in _TOKENWISE
    ]


def _row(s: Specialisation, name: str) -> str:
    """Return the axes of a token's row of an array, in symbols."""
    return ARGUMENTS[name].shapes[name in s.tied].removeprefix("*")


def _sizes(s: Specialisation) -> dict[str, int]:
    return {"H": s.nheads, "P": s.headdim, "N": s.dstate, "G": s.ngroups}


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
        "BLOCK": _TOKENS_OF_DECAYS if s.tile.decays else 0,
        "ONE": s.tile.one_chunk,
        "SEGMENTS": s.tile.segments.most,
        "LEAST": s.tile.segments.least,
        "UNIT": s.tile.segments.unit,
        "RECORD": _record(s),
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
