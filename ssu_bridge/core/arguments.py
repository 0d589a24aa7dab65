"""The table of the array arguments: order, shapes, dtypes, and which of them are written."""

from typing import NamedTuple

from ssu_bridge.core.rounding import LARGEST

FLOATS = ("float32", "bfloat16", "float16")
INDICES = ("int32", "int64")
BOOLS = ("bool",)
QUANTIZED = tuple(LARGEST)
# A state of one of these can be rounded stochastically; float32 holds the result as it is, int16 all but so.
ROUNDABLE = ("float16", "bfloat16", "int8", "float8_e4m3fn")
# The key of stochastic rounding, whatever dtype and shape it has.
SEED_BYTES = 8
# The most that a thread of a GPU loads at once, and from multiples of it only.
VECTOR_BYTES = 16


class Argument(NamedTuple):
    """What an array argument must look like.

    ``shapes`` spells each allowed shape in the symbols of semantics: S slots, H nheads, P headdim, N dstate, G ngroups,
    b sequences, W table columns, E and K entries and steps of the intermediate buffer, R rows of a ring of replay,
    Q = b + 1; * stands for the token axes (b; b T; or L packed rows). ``free`` of its leading axes (all of the token
    axes for *) may be strided.
    """

    shapes: tuple[str, ...]
    dtypes: tuple[str, ...]
    free: str = ""
    written: bool = False


# In the order in which kernels take them. A shape that lacks H or G stands for one that repeats along P, or for G = 1.
ARGUMENTS: dict[str, Argument] = {
    "state": Argument(("SHPN",), FLOATS + QUANTIZED, "S", written=True),
    "x": Argument(("*HP",), FLOATS, "*"),
    "dt": Argument(("*HP", "*H"), FLOATS, "*"),
    "A": Argument(("HPN", "H"), FLOATS),
    "B": Argument(("*GN", "*N"), FLOATS, "*"),
    "C": Argument(("*GN", "*N"), FLOATS, "*"),
    "D": Argument(("HP", "H"), FLOATS),
    "z": Argument(("*HP",), FLOATS, "*"),
    "dt_bias": Argument(("HP", "H"), FLOATS),
    "state_batch_indices": Argument(("b", "bW"), INDICES, "bW"),
    "dst_state_batch_indices": Argument(("b", "bV"), INDICES, "bV"),
    "num_accepted_tokens": Argument(("b",), INDICES, "b"),
    "cu_seqlens": Argument(("Q",), INDICES, "Q"),
    "intermediate_states": Argument(("EKHPN",), FLOATS + QUANTIZED, "E", written=True),
    "intermediate_state_indices": Argument(("b",), INDICES, "b"),
    "parent_tokens": Argument(("*",), INDICES, "*"),
    "has_initial_state": Argument(("b",), BOOLS, "b"),
    "state_scale": Argument(("SHP",), ("float32",), "S", written=True),
    "intermediate_state_scales": Argument(("EKHP",), ("float32",), "E", written=True),
    "rand_seed": Argument(("", "1", "2"), ("int64", "uint32")),
    "replay_x": Argument(("SHRP",), FLOATS, "S", written=True),
    "replay_B": Argument(("SGRN",), FLOATS, "S", written=True),
    "replay_dt": Argument(("SHR",), ("float32",), "S", written=True),
    "replay_start": Argument(("S",), ("int32",), "S"),
    "replay_pending": Argument(("S",), ("int32",), "S"),
    "out": Argument(("*HP",), FLOATS, "*", written=True),
}
# What may have any float dtype.
FLOAT_ARRAYS = tuple(name for name, argument in ARGUMENTS.items() if argument.dtypes[: len(FLOATS)] == FLOATS)
DTYPES = frozenset(dtype for argument in ARGUMENTS.values() for dtype in argument.dtypes)
REQUIRED = ("state", "x", "dt", "A", "B", "C")
# What says where each sequence or token reads and stores, in numbers or bools.
TABLES = tuple(name for name, argument in ARGUMENTS.items() if argument.dtypes in (INDICES, BOOLS))
# The most tokens of a sequence that parent_tokens makes a tree of.
MOST_TOKENS_OF_A_TREE = 64
# The tables that name slots, of one axis or with a column for each token.
SLOT_TABLES = ("state_batch_indices", "dst_state_batch_indices")
# What a call can write in place.
WRITTEN = tuple(name for name, argument in ARGUMENTS.items() if argument.written and name != "out")
# What has a row for each token, besides out.
TOKENWISE = tuple(name for name, argument in ARGUMENTS.items() if argument.free == "*" and not argument.written)
# What a ReplayState has besides its checkpoint, and where its cursor is in each slot.
RINGS = ("replay_x", "replay_B", "replay_dt")
CURSOR = ("replay_start", "replay_pending")
# What a kernel loads one element at a time of.
ELEMENTWISE = (*TABLES, *CURSOR, "replay_dt")
# What disable_state_update leaves alone.
STATE = ("state", "state_scale")
# These say tied by leaving an axis out, or by a stride of 0 along the axes that this names.
TIED_AXES = {"dt": 1, "A": 2, "D": 1, "dt_bias": 1}
# The names of the sizes that the symbols stand for.
SIZES = {"S": "slots", "H": "nheads", "P": "headdim", "N": "dstate", "G": "ngroups", "b": "sequences", "T": "tokens"}
SIZES |= {"R": "length"}

TOKEN_AXES = {"single": "b", "multi": "bT", "packed": "L"}


def patterns(name: str, layout: str, heads_axis: bool) -> tuple[str, ...]:
    """Return the shapes that an array may have in a call, in symbols."""
    shapes = [shape.replace("*", TOKEN_AXES[layout]) for shape in ARGUMENTS[name].shapes]
    if not heads_axis:
        # Without heads nothing can be tied to one; the shapes without H need no duplicates.
        shapes = [shape.replace("H", "") for shape in shapes if not shape.endswith("H")]
    return tuple(shapes)


def pattern_of(name: str, layout: str, heads_axis: bool, count: int) -> str:
    """Return the one of them that has so many axes."""
    return next(pattern for pattern in patterns(name, layout, heads_axis) if len(pattern) == count)
