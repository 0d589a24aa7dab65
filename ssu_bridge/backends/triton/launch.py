"""How the kernels of a specialisation are launched: their arguments at run time, and their grids."""

import enum
import math
from typing import Any, NamedTuple

import numpy as np

from ssu_bridge.backends.triton.specialisation import TOKEN_ROWS, Specialisation, launches
from ssu_bridge.core.arguments import ARGUMENTS, ELEMENTWISE, SEED_BYTES, VECTOR_BYTES

# How many numbers a token has for its decays, and the tokens of a program that computes them.
_NUMBERS_OF_DECAYS = 5
TOKENS_OF_DECAYS = 512
_ANY = 2**31 - 1

FLOAT_BYTES = 4
# So that records begin where lines of the cache do.
_FLOATS_IN_A_LINE = 32

_TOKEN_AXIS = {"multi": 1, "packed": 0}


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


def launch_of(specialisation: Specialisation) -> Launch:
    """Return how the kernels of a specialisation are launched."""
    names = list(specialisation.tensors)
    return Launch(
        grids=tuple(map(grid_of, launches(specialisation))),
        in_place=tuple(names.index(name) for name in specialisation.results if name != "out"),
        tensors=_count_tensors(specialisation),
        scratch=tuple(FLOAT_BYTES * _scratch_floats(one) for one in launches(specialisation)),
        overlaps=specialisation.overlaps,
    )


def grid_of(specialisation: Specialisation) -> Grid:
    """Return the grid of a kernel: a program for each sequence or segment, head and block of rows."""
    s, names = specialisation, list(specialisation.tensors)
    programs = s.nheads // s.tile.heads * -(-s.headdim // s.tile.rows)
    packed = s.layout == "packed"
    whole = Grid(programs, names.index("cu_seqlens" if packed else "x"), less=packed)
    if s.kernel == "decays":
        return whole._replace(programs=s.nheads, most=_ANY, least=TOKENS_OF_DECAYS, tokens=names.index("x"), axis=1)
    if s.tile.segments.most == 1:
        return whole
    return whole._replace(
        whole=s.kernel != "segment_states",
        most=s.tile.segments.most - 1,
        least=s.tile.segments.least,
        tokens=names.index("x"),
        axis=_TOKEN_AXIS[s.layout],
    )


def _count_tensors(s: Specialisation) -> int:
    return len(s.dtypes) + len(s.results)


def _scratch_floats(s: Specialisation) -> int:
    """Return how many float32 a program of a kernel leaves to the kernels after it."""
    if s.kernel == "decays":
        return _NUMBERS_OF_DECAYS * TOKENS_OF_DECAYS
    return record_floats(s) if s.kernel == "segment_states" else 0


def record_floats(s: Specialisation) -> int:
    """Return how many float32 the record of a segment has: two tiles and a decay."""
    return 2 * s.tile.rows * s.tile.columns + _FLOATS_IN_A_LINE


def runtime_arguments(specialisation: Specialisation) -> dict[str, Argument]:
    """Return what the launcher can pass, by the names of the kernels' arguments.

    Tensors are counted as the kernel function takes them: the inputs, out, what is updated in place, scratch memory.
    """
    place = {name: i for i, name in enumerate(specialisation.tensors)}
    result = {}
    for name in place:
        divisor = _divisor(specialisation, name)
        result[name] = Argument(Kind.ADDRESS, place[name], divisor=divisor)
        for axis, stride in enumerate(_strides(specialisation, name)):
            if not (specialisation.dense and stride == "token_stride" and name in TOKEN_ROWS):
                result[f"{name}_{stride}"] = Argument(Kind.STRIDE, place[name], axis, _elements(specialisation, name))
    if any(map(_scratch_floats, launches(specialisation))):
        result["scratch"] = Argument(Kind.ADDRESS, _count_tensors(specialisation), divisor=VECTOR_BYTES)
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
    return max(1, _divisor(specialisation, name) // np.dtype(specialisation.tensors[name]).itemsize)


def dense_strides(s: Specialisation) -> list[tuple[str, Argument, int]]:
    """Return the arrays whose strides from token to token are compiled in, each stride's place, and what it is."""
    if not s.dense:
        return []
    sizes, axis = s.sizes, _TOKEN_AXIS[s.layout]
    return [
        (name, Argument(Kind.STRIDE, place, axis), math.prod(sizes[symbol] for symbol in _row(s, name)))
        for place, name in enumerate(s.tensors)
        if name in TOKEN_ROWS
    ]


def _row(s: Specialisation, name: str) -> str:
    """Return the axes of a token's row of an array, in symbols."""
    return ARGUMENTS[name].shapes[name in s.tied].removeprefix("*")
