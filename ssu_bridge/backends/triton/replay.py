"""The kernels of a replay state: which one a problem takes, its tile, and what is compiled in."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ssu_bridge.backends.base import lacks_form
from ssu_bridge.backends.triton.tiles import Tile, early, power_of_two
from ssu_bridge.core.arguments import VECTOR_BYTES
from ssu_bridge.core.problem import Problem

if TYPE_CHECKING:
    from ssu_bridge.backends.triton.specialisation import Specialisation

# The sides of a tensor core's tile: a program's rows, and what is summed over, have at least so many elements.
_LEAST = 16
# Columns of a checkpoint that are computed at a time, so that they fit the registers.
_MOST_COLUMNS, _FEW_COLUMNS = 128, 32
# Bytes of a row of one that several tokens take at a time, where they take few registers.
_PART_BYTES = 128
_THREADS = 32
# In how many bfloat16 parts what is stored goes into a product without an error.
_STATE_PARTS = {"bfloat16": 1, "float16": 2, "float32": 3, "int16": 2, "int8": 1, "float8_e4m3fn": 1}
# Of these threads hold a row's columns that are read at once.
_THREADS_OF_A_GROUP = 4


class _Measured(NamedTuple):
    """What was fastest for one token on an H200: rows, warps and heads of a program; stages of its loop."""

    rows: int
    warps: int
    heads: int
    stages: int
    # Where a program does several heads, there are so many programs at least, times the heads.
    programs: int


# By what a checkpoint is stored in. Heads do not change the bits, and so may depend on the number of sequences.
_MEASURED = {
    "float32": _Measured(32, 2, 2, 2, 1),
    "bfloat16": _Measured(32, 1, 2, 2, 8192),
    "float16": _Measured(32, 1, 2, 2, 1),
    "int16": _Measured(32, 1, 2, 2, 1),
    "int8": _Measured(32, 1, 4, 3, 1024),
    "float8_e4m3fn": _Measured(32, 1, 4, 3, 1024),
}
# The same for several tokens, of any checkpoint. Products of long windows, or of float32 in parts, take the registers
# of four warps.
_SEVERAL, _MANY = _Measured(32, 1, 2, 2, 1), _Measured(64, 4, 1, 1, 1)
_FLUSH_STAGES = 2
# Checkpoints that a flush of one token reads once. Others are read twice, the second time ahead, which is as fast.
_ONE_PASS = ("bfloat16", "float16")


def is_one_token(problem: Problem) -> bool:
    """Return whether no sequence has more than one token. A symbolic number of tokens is not one."""
    if problem.layout == "packed":
        return problem.longest == 1
    return problem.layout == "single" or problem.tokens in (0, 1)


def refusal(problem: Problem) -> str | None:
    """Return why a form that is selected by name cannot run a problem; or None."""
    return None if is_one_token(problem) else lacks_form(problem, "matrix")


def tile(problem: Problem) -> Tile:
    """Return the tile, which does not depend on the number of sequences, as the bits of the output do on it.

    Raises:
        ValueError: the configured tile is impossible.
    """
    one = is_one_token(problem)
    known = problem.layout == "multi" and isinstance(problem.tokens, int)
    chunk = 0 if one else max(power_of_two(problem.tokens if known else problem.longest), _LEAST)
    best = _MEASURED[dict(problem.dtypes)["state"]] if one else _several(problem, chunk)
    rows = min(max(power_of_two(problem.headdim), _LEAST), best.rows)
    warps = min(best.warps, rows // _LEAST)
    if requested := problem.options.config.triton_tile:
        rows, warps = requested
        if rows < _LEAST * warps:
            raise ValueError(
                f"triton_tile: expected at least {_LEAST} rows for each warp with a ReplayState, got (rows, warps) = "
                f"{requested}"
            )
    columns = max(power_of_two(problem.dstate), _LEAST)
    heads = _heads(problem, rows, best)
    return Tile(rows, columns, warps, chunk, not one, heads, early=early(problem, rows) if one else 0)


def _heads(problem: Problem, rows: int, best: _Measured) -> int:
    """Return how many heads of a group a program does, one after the other."""
    programs = problem.sequences * problem.nheads * -(-problem.headdim // rows)
    heads = 1
    while (
        isinstance(problem.sequences, int)  # not a symbolic number of JAX
        and 2 * heads <= best.heads
        and problem.nheads // problem.ngroups % (2 * heads) == 0
        and programs >= (2 * heads) ** 2 * best.programs
    ):
        heads *= 2
    return heads


def _several(problem: Problem, chunk: int) -> _Measured:
    dtypes = dict(problem.dtypes)
    takes_registers = "float32" in {dtypes[name] for name in ("x", "B", "C")}
    return _MANY if takes_registers or max(problem.options.replay_window, chunk) > _LEAST else _SEVERAL


def tokens_of(specialisation: "Specialisation") -> tuple[int, int]:
    """Return the fewest and the most tokens of a sequence that is not packed."""
    chunk = specialisation.tile.chunk
    return 0, min(chunk, specialisation.most_tokens) if chunk else 1


# With so few registers more programs fit, by the dtype of the checkpoint and the heads of a program: of one new token
# and of several. What is spilled for it, at most 8 bytes, costs less than it gains.
_REGISTERS = {("bfloat16", 1): 128, ("bfloat16", 2): 128, ("int8", 2): 128, ("int8", 4): 128}
_REGISTERS_OF_SEVERAL = {("bfloat16", 2): 168, ("int8", 2): 168}


def most_registers(s: "Specialisation") -> int | None:
    """Return to how many registers a thread is limited, for the sizes of which it was measured to be faster."""
    table = _REGISTERS_OF_SEVERAL if s.tile.chunk else _REGISTERS
    usual = max(s.window, s.tile.chunk) <= _LEAST and s.tile.columns == _MOST_COLUMNS
    return table.get((dict(s.dtypes)["state"], s.tile.heads)) if usual else None


def constants(s: "Specialisation", parts: dict[str, int]) -> dict[str, Any]:
    """Return what only these kernels have compiled in. ``parts`` are the bfloat16 parts of numbers by their dtype."""
    dtypes = dict(s.dtypes)
    best = _SEVERAL if s.tile.chunk else _MEASURED[dtypes["state"]]
    vector = {name: VECTOR_BYTES // np.dtype(dtypes[name]).itemsize for name in ("state", "B")}
    window = max(power_of_two(s.window), _LEAST)
    group = min(_THREADS_OF_A_GROUP * vector["state"], s.tile.columns)
    # A thread keeps C's for all columns, which take fewer registers where more threads share a row.
    columns = group if s.tile.columns <= _MOST_COLUMNS else _MOST_COLUMNS
    part = _PART_BYTES // np.dtype(dtypes["state"]).itemsize if s.tile.warps == _SEVERAL.warps else _FEW_COLUMNS
    # A ring of B lies in the registers as one of x does, so that what is summed over both has one layout.
    ring = vector["B"] * _THREADS * s.tile.warps
    ring_columns = min(s.tile.rows, s.tile.columns)
    one_pass = not s.tile.chunk and dtypes["state"] in _ONE_PASS
    return {
        "WINDOW": s.window,
        "RING": s.window + s.most_tokens,
        "K": window,
        "HEADS": s.tile.heads,
        # Nothing is read ahead of one head. A checkpoint is written in pieces, several to a head.
        "STAGES": min(best.stages, s.tile.heads),
        "FLUSH_STAGES": 1 if one_pass else _FLUSH_STAGES,
        "ONE_PASS": one_pass,
        # A flush of one head takes little longer.
        "SWAPS": s.tile.heads > 1,
        "Q": s.tile.chunk,
        "MOST": s.most_tokens,
        "W": group,
        "WARPS": s.tile.warps,
        "COLUMNS": columns,
        "RING_COLUMNS": ring_columns,
        "TOGETHER": min(s.tile.rows, s.tile.warps * _THREADS * vector["state"] // columns),
        "RING_TOGETHER": min(window, max(1, ring // ring_columns)),
        "PART": min(part, s.tile.columns),
        "S_PARTS": _STATE_PARTS[dtypes["state"]],
        **{f"{name.upper()}_PARTS": parts[dtypes[name]] for name in ("x", "B", "C")},
    }
