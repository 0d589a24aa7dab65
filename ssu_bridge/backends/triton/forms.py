"""In which form several tokens are computed: one after the other (loop), or in chunks by matrix products (matrix)."""

from typing import Any

import numpy as np

from ssu_bridge.backends.measured import measured
from ssu_bridge.backends.triton import replay, tiles
from ssu_bridge.backends.triton.tiles import Segments, Tile
from ssu_bridge.core.arguments import MOST_TOKENS_OF_A_TREE
from ssu_bridge.core.problem import Problem

# The sides of a tensor core's tile. A chunk, a warp's rows and what is summed over have at least so many elements.
_LEAST = 16
_MOST_ROWS = 64
# More tokens at a time take more registers than there are.
_MOST_CHUNK = 32
# The compute capability on which it was measured to compute decays by another kernel.
_WITH_DECAYS = 9
# What the lengths of segments are multiples of then: the chunk of the kernel for the states before segments.
_UNIT_WITH_DECAYS = 64
# From so many bytes of state in a call on, tiles are prefetched.
_LEAST_BYTES_AHEAD = 40 << 20
# The most columns with which a program's state leaves registers for the rest.
_MOST_COLUMNS = 128


def refusal(problem: Problem) -> str | None:
    """Return why the matrix form, where it is selected, cannot run a problem; or None. The loop runs all."""
    if problem.replays:
        return replay.refusal(problem)
    if problem.options.config.algorithm == "matrix" and not _is_one_token(problem):
        return _matrix_refusal(problem)
    return None


def tile(problem: Problem) -> Tile:
    """Return the tile of a program, in the form that is selected or was measured to be faster."""
    if problem.replays:
        return replay.tile(problem)
    is_loop = _is_one_token(problem) or _loop_reason(problem)
    return tiles.tile(problem) if is_loop else _matrix_tile(problem)


def settings(problem: Problem) -> str:
    """Return the form of several tokens, with the reason for a loop, and the tile of a program, in words."""
    if problem.replays:
        return str(tile(problem))
    reason = None if _is_one_token(problem) else _loop_reason(problem)
    return f"loop over the tokens, {reason}; {tile(problem)}" if reason else str(tile(problem))


def _loop_reason(problem: Problem) -> str | None:
    """Return why several tokens are computed one after the other; None where they are not."""
    selected = problem.options.config.algorithm
    if selected == "loop":
        return "as requested"
    if lacking := _matrix_refusal(problem):
        return f"not in the matrix form: {lacking}"
    return None if selected == "matrix" else _slower_as_matrix(problem)


def _matrix_refusal(problem: Problem) -> str | None:
    """Return what the matrix form lacks for a problem, or None."""
    if untied := [name for name in ("A", "dt", "dt_bias") if name in problem.names and name not in problem.tied]:
        return f"it requires parameters that are tied to the head, and {' and '.join(untied)} is not"
    if problem.rounds_each_token:
        return "it does not round the state after each token (round_each_token)"
    stores_each = "dst_state_batch_indices" in problem.tables
    stores_some = "intermediate_states" in problem.names
    if stores_each or (stores_some and problem.options.intermediate_stride < _LEAST):
        return (
            f"it has no state after every token, but only after every k-th, with an intermediate_stride k >= {_LEAST}"
        )
    if stores_some and "parent_tokens" in problem.names:
        return "it stores no states of a tree"
    return None


def _is_one_token(problem: Problem) -> bool:
    # A symbolic number of tokens is not one.
    return problem.layout == "single" or (problem.layout == "multi" and problem.tokens in (0, 1))


def _slower_as_matrix(problem: Problem) -> str | None:
    """Return for what the loop is faster; None where it was measured not to be. Sequences of a call have one form."""
    dtypes = dict(problem.dtypes)
    if {np.dtype(dtypes[name]).itemsize for name in ("x", "B", "C")} != {2}:
        return "which is faster unless x, B and C have 16 bits"
    if problem.dstate > _MOST_COLUMNS:
        return f"which is faster for a dstate above {_MOST_COLUMNS}"
    table = measured("triton/forms", problem.capability)
    least = table["least_tokens"][dtypes["state"]]
    if problem.layout == "multi" and isinstance(problem.tokens, int) and problem.tokens < least:
        return f"which is faster for fewer than {least} tokens"
    least = table["least_packed_tokens"]
    if problem.layout == "packed" and _is_known_below(problem.tokens, problem.sequences, least):
        return f"which is faster for fewer than {least} packed rows a sequence"
    return None


def _is_known_below(rows: Any, sequences: Any, least: int) -> bool:
    """Return whether there are fewer rows a sequence; of symbolic numbers of JAX nothing is known."""
    return isinstance(rows, int) and isinstance(sequences, int) and rows < least * sequences


def _matrix_tile(problem: Problem) -> Tile:
    """Return the tile: only how far it reads ahead depends on the number of sequences, and no bits do on that."""
    rows = min(max(tiles.power_of_two(problem.headdim), _LEAST), _MOST_ROWS)
    columns = max(tiles.power_of_two(problem.dstate), _LEAST)
    is_tree, stores_some = "parent_tokens" in problem.names, "intermediate_states" in problem.names
    most = MOST_TOKENS_OF_A_TREE if is_tree else _MOST_CHUNK
    if not is_tree and _takes_registers(problem, stores_some):
        most = _LEAST
    if stores_some:
        most = min(most, tiles.power_of_two(problem.options.intermediate_stride + 1) // 2)
    is_known = problem.layout == "multi" and isinstance(problem.tokens, int)
    if is_known and problem.tokens <= (most if is_tree else _LEAST):
        chunk, one = max(tiles.power_of_two(problem.tokens), _LEAST), not stores_some
    else:
        chunk, one = most, is_tree
    ahead = tiles.ahead(problem, rows, _LEAST_BYTES_AHEAD) if one else 0
    decays = not one and chunk == _MOST_CHUNK and _is_prompt(problem, rows, columns)
    tile = Tile(rows, columns, rows // _LEAST, chunk, one, ahead=ahead, decays=decays)
    return tile if one or is_tree else tile._replace(segments=_segments(problem, tile))


def _is_prompt(problem: Problem, rows: int, columns: int) -> bool:
    """Return whether sequences are long and all of one length, on a GPU where another kernel's decays were measured."""
    assert problem.capability is not None
    measured_there = problem.capability[0] == _WITH_DECAYS and rows == _MOST_ROWS and columns == _MOST_COLUMNS
    if not measured_there or problem.layout != "multi" or "intermediate_states" in problem.names:
        return False
    least: int = measured("triton/forms", problem.capability)["least_tokens_of_a_prompt"]
    return isinstance(problem.tokens, int) and problem.tokens >= least


def _takes_registers(problem: Problem, stores_some: bool) -> bool:
    """Return whether chunks of 32 tokens spill registers: inputs in parts do it, or scales of states on the way."""
    dtypes = dict(problem.dtypes)
    in_parts = {dtypes[name] for name in ("x", "B", "C")} != {"bfloat16"}
    return in_parts or (stores_some and "state_scale" in dtypes)


def _segments(problem: Problem, tile: Tile) -> Segments:
    """Return how sequences are split: into so many segments that the programs of one sequence fill a GPU.

    It depends on sizes alone, and not on the number of sequences, as the bits do on it.
    """
    table = measured("triton/forms", problem.capability)["segments"]
    most = min(table["programs"] // (problem.nheads * -(-problem.headdim // tile.rows)), table["most"])
    # A symbolic number of tokens leaves open whether there are any.
    is_long = isinstance(problem.tokens, int) and problem.tokens >= 2 * table["least"]
    if most < 2 or not is_long:
        return Segments()
    stores_some = "intermediate_states" in problem.names
    unit = problem.options.intermediate_stride if stores_some else _UNIT_WITH_DECAYS if tile.decays else tile.chunk
    return Segments(most, table["least"], unit)
