"""From a problem to a compiled kernel: what is compiled in, what the launcher passes, and Triton's compiler."""

import dataclasses
import enum
import re
from typing import Any, NamedTuple

import numpy as np

from ssu_bridge.backends.triton_tiles import Tile
from ssu_bridge.problem import ARGUMENTS, INDICES, VECTOR_BYTES, Problem

# From this compute capability on, a kernel can start before those ahead of it are done.
_OVERLAPPING = (9, 0)
_POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int32": "*i32", "int64": "*i64"}


@dataclasses.dataclass(frozen=True, slots=True)
class Specialisation:
    """All that is compiled into a kernel. The number of sequences and slots and the strides are not."""

    capability: tuple[int, int]
    nheads: int
    headdim: int
    dstate: int
    ngroups: int
    dtypes: tuple[tuple[str, str], ...]
    tied: tuple[str, ...]
    dt_softplus: bool
    pad_slot_id: int
    unaligned: tuple[str, ...]
    tile: Tile

    @property
    def target(self) -> str:
        """The specialisation spelt out."""
        sizes = f"H{self.nheads},P{self.headdim},N{self.dstate},G{self.ngroups}"
        arrays = ",".join(
            f"{name}:{dtype}{'/head' if name in self.tied else ''}" for name, dtype in self.dtypes if name != "out"
        )
        flags = f"softplus={self.dt_softplus:d};pad={self.pad_slot_id};unaligned={','.join(self.unaligned)}"
        tile = f"{self.tile.rows}x{self.tile.warps}"
        return f"ssu_bridge.triton(sm{self.capability[0]}{self.capability[1]};{sizes};{arrays};{flags};tile={tile})"


def specialise(problem: Problem, tile: Tile) -> Specialisation:
    """Return what has to be compiled for a problem that runs on CUDA."""
    assert problem.capability is not None
    return Specialisation(
        capability=problem.capability,
        nheads=problem.nheads,
        headdim=problem.headdim,
        dstate=problem.dstate,
        ngroups=problem.ngroups,
        dtypes=tuple((name, dtype) for name, dtype in problem.dtypes if name != "out"),
        tied=problem.tied,
        dt_softplus=problem.options.dt_softplus,
        pad_slot_id=problem.options.pad_slot_id,
        unaligned=tuple(sorted(problem.unaligned)),
        tile=tile,
    )


class Kind(enum.IntEnum):
    """What the launcher passes of a tensor, by its numbers."""

    ADDRESS = 0
    STRIDE = 1
    SIZE = 2


class Argument(NamedTuple):
    """An argument of the kernel: what of which tensor, and of what it is promised to be a multiple."""

    kind: Kind
    tensor: int
    divisor: int


class Compiled(NamedTuple):
    """A compiled kernel, and what it takes to launch it."""

    cubin: bytes
    name: str
    shared_bytes: int
    warps: int
    programs: int
    arguments: tuple[Argument, ...]
    scratch_pointers: int
    # It may be launched before the kernels ahead of it are done, and waits for them itself.
    overlaps: bool
    # The stages on the way, by Triton's names for them: "ttgir", "ptx".
    text: dict[str, str]


def compile_step(specialisation: Specialisation) -> Compiled:
    """Compile the single-token kernel, or take it from Triton's cache on disk. This needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ssu_bridge.kernels.single_token import single_token

    arguments = runtime_arguments(specialisation)
    constants = _constants(specialisation)
    dtypes = _kernel_dtypes(specialisation)
    signature, fixed, attributes = {}, {}, {}
    for position, name in enumerate(single_token.arg_names):
        if name not in arguments:
            signature[name], fixed[name,] = "constexpr", constants.get(name)
            continue
        signature[name] = _POINTERS[dtypes[name]] if arguments[name].kind is Kind.ADDRESS else "i64"
        if arguments[name].divisor > 1:
            attributes[position,] = [["tt.divisibility", arguments[name].divisor]]
    fixed = {(single_token.arg_names.index(name),): value for (name,), value in fixed.items()}
    major, minor = specialisation.capability
    compiled = triton.compile(
        ASTSource(single_token, signature, fixed, attributes),
        target=GPUTarget("cuda", 10 * major + minor, 32),
        # Fusion is written where it is wanted: left to the compiler, a tile's bits could differ from another's.
        options={"num_warps": specialisation.tile.warps, "enable_fp_fusion": False},
    )
    return Compiled(
        cubin=compiled.asm["cubin"],
        name=compiled.metadata.name,
        shared_bytes=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        programs=specialisation.nheads * -(-specialisation.headdim // specialisation.tile.rows),
        arguments=tuple(arguments.values()),
        scratch_pointers=_scratch_pointers(compiled, len(arguments)),
        overlaps=constants["OVERLAP"],
        text={stage: compiled.asm[stage] for stage in ("ttgir", "ptx")},
    )


def runtime_arguments(specialisation: Specialisation) -> dict[str, Argument]:
    """Return what the launcher passes, by the names and in the order of the kernel's arguments.

    Tensors are counted as the kernel function takes them: the inputs, out, and then the new state.
    """
    dtypes = _kernel_dtypes(specialisation)
    place = {name: i for i, name in enumerate(dtypes)}
    result = {}
    for name in place:
        single = name in (*specialisation.tied, *specialisation.unaligned) or ARGUMENTS[name].dtypes == INDICES
        result[name] = Argument(Kind.ADDRESS, place[name], 1 if single else VECTOR_BYTES)
    result["slots"] = Argument(Kind.SIZE, place["state"], 1)
    for name, dtype in dtypes.items():
        if ARGUMENTS[name].free:
            elements = max(1, result[name].divisor // np.dtype(dtype).itemsize)
            result[f"{name}_stride"] = Argument(Kind.STRIDE, place[name], elements)
    return result


def _kernel_dtypes(specialisation: Specialisation) -> dict[str, str]:
    dtypes = dict(specialisation.dtypes)
    return {**dtypes, "out": dtypes["x"]}


def _constants(s: Specialisation) -> dict[str, Any]:
    tied = {f"TIED_{name.upper()}": name in s.tied for name in ("dt", "A", "D", "dt_bias")}
    sizes = {"H": s.nheads, "P": s.headdim, "N": s.dstate, "G": s.ngroups}
    blocks = {"BLOCK_P": s.tile.rows, "BLOCK_N": s.tile.columns}
    flags = {"SOFTPLUS": s.dt_softplus, "PAD": s.pad_slot_id, "OVERLAP": s.capability >= _OVERLAPPING}
    return {**sizes, **tied, **blocks, **flags}


def _scratch_pointers(compiled: Any, passed: int) -> int:
    """Return how many pointers to scratch memory Triton added at the end; the kernel uses none of it."""
    entry = re.search(r"\.entry\s+\w+\s*\((.*?)\)", compiled.asm["ptx"], re.DOTALL)
    added = entry[1].count(".param") - passed if entry else -1
    if added not in (0, 1, 2) or compiled.metadata.global_scratch_size or compiled.metadata.profile_scratch_size:
        raise RuntimeError(f"this version of Triton compiled a kernel with {added} arguments more than were expected")
    return added
