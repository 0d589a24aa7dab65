"""The tile of the state that a program of the Triton kernel updates, from the table in tiles.toml.

Every tile for one set of sizes and dtypes must lie in the threads' registers in the same way along dstate, or the sum
over it would have another order and the result's bits would depend on the tile, and so on the batch. It does if each
thread has at least one full vector, and rows are split between the warps always or never.
"""

import math
from typing import NamedTuple

import numpy as np

from ssu_bridge.backends.measured import measured
from ssu_bridge.core.arguments import VECTOR_BYTES
from ssu_bridge.core.problem import Problem

_THREADS = 32
# Of a program whose rows are longer than what a warp's threads hold in one vector each.
_WARPS_FOR_LONG_ROWS = 4
# From this compute capability on, and from so many bytes of state in a call on (but for the matrix form), programs have
# later tiles brought from memory to the second-level cache: those that begin so many bytes later. Twice as many are too
# many for it.
_PREFETCHING = (9, 0)
_LEAST_BYTES = 20 << 20
_BYTES_AHEAD = 4 << 20


class Segments(NamedTuple):
    """How a long sequence is split into segments that run side by side."""

    # The most segments of a sequence; 1: it is not split.
    most: int = 1
    # The fewest tokens of a segment, but for the last one, and what their number is a multiple of.
    least: int = 1
    unit: int = 1


class Tile(NamedTuple):
    """What a program updates, rows (headdim) x columns (dstate, up to a power of two), and with how many warps."""

    rows: int
    columns: int
    warps: int
    # Of the matrix form: how many tokens a chunk has, and whether no sequence has more. Of the loop: 0.
    chunk: int = 0
    one_chunk: bool = False
    # Of a replay step: how many heads a program does.
    heads: int = 1
    segments: Segments = Segments()
    # Of the matrix form: whether another kernel has computed the decays.
    decays: bool = False
    # How many programs later the tile is that a program has brought to the cache; 0: none.
    ahead: int = 0
    # Of how many tiles that is done before the kernels ahead of this one are done, each by the program that updates it.
    early: int = 0

    def __str__(self) -> str:
        form = f"matrix form, {self.chunk} tokens at a time, " if self.chunk else ""
        if self.segments.most > 1:
            form += f"in up to {self.segments.most} segments of at least {self.segments.least} tokens, "
        ahead = f", prefetched {self.ahead} programs ahead" if self.ahead else ""
        return f"{form}tile of {self.rows} x {self.columns}, {self.warps} warp{'s' * (self.warps > 1)}{ahead}"


def tile(problem: Problem) -> Tile:
    """Return the configured tile, or else the table's.

    Raises:
        ValueError: the configured tile is impossible for this problem.
    """
    columns = power_of_two(problem.dstate)
    requested = problem.options.config.triton_tile
    if requested is not None:
        least = least_rows(problem, requested[1])
        if not least or requested[0] < least:
            can = f"at least {least} rows" if least else f"{_WARPS_FOR_LONG_ROWS} warps"
            raise ValueError(f"triton_tile: expected {can} for this problem, got (rows, warps) = {requested}")
        return _with_prefetches(problem, Tile(requested[0], columns, requested[1]))
    return fitted(problem, *_table_entry(problem))


def fitted(problem: Problem, elements: int, warps: int) -> Tile:
    """Return the tile of so many elements and warps, or the nearest that is possible for a problem."""
    columns = power_of_two(problem.dstate)
    if not least_rows(problem, warps):
        warps = _WARPS_FOR_LONG_ROWS
    rows = max(1, min(elements // columns, power_of_two(problem.headdim)))
    while warps > 1 and least_rows(problem, warps // 2) and least_rows(problem, warps) > rows:
        warps //= 2
    rows = max(rows, least_rows(problem, warps))
    return _with_prefetches(problem, Tile(rows, columns, warps))


def _with_prefetches(problem: Problem, tile: Tile) -> Tile:
    early_tiles = early(problem, tile.rows) if is_plain(problem) else 0
    return tile._replace(ahead=ahead(problem, tile.rows), early=early_tiles)


def is_plain(problem: Problem) -> bool:
    """Return whether a problem is one token for each sequence and nothing more, for which there is a kernel."""
    more = {"intermediate_states", "parent_tokens", "has_initial_state"}.intersection(problem.names)
    return problem.layout == "single" and not (problem.tables or more or problem.options.disable_state_update)


def least_rows(problem: Problem, warps: int) -> int:
    """Return how many rows a program of so many warps has at least; 0 if it must have another number of warps."""
    columns, vector = power_of_two(problem.dstate), _vector(problem)
    if columns > _THREADS * vector and warps != _WARPS_FOR_LONG_ROWS:
        return 0
    return max(1, warps * _THREADS * vector // columns)


def _vector(problem: Problem) -> int:
    """Return how many elements of a row a thread holds side by side: what it loads at once of the state or of A."""
    names = [name for name in ("state", "A") if name not in problem.tied]
    sizes = {name: np.dtype(dtype).itemsize for name, dtype in problem.dtypes if name in names}
    return max(
        1 if name in problem.unaligned else math.gcd(VECTOR_BYTES // size, problem.dstate)
        for name, size in sizes.items()
    )


def ahead(problem: Problem, rows: int, least_bytes: int = _LEAST_BYTES) -> int:
    """Return how many programs later the tile is that a program has brought to the cache, where states are so large."""
    size = _prefetched_bytes(problem, rows)
    # Of a symbolic number of JAX nothing is known.
    is_large = isinstance(problem.sequences, int) and _work(problem) * _itemsize(problem) >= least_bytes
    return _BYTES_AHEAD // size if size and is_large else 0


def early(problem: Problem, rows: int) -> int:
    """Return how many tiles are brought to the cache early: as many as others are brought ahead."""
    size = _prefetched_bytes(problem, rows)
    return _BYTES_AHEAD // size if size else 0


def _prefetched_bytes(problem: Problem, rows: int) -> int:
    """Return the bytes of a tile, 0 where it is not prefetched."""
    assert problem.capability is not None
    # A state that is read from a table's column, or not at all, is not found so simply.
    elsewhere = "state_batch_indices" in problem.tables or "has_initial_state" in problem.names
    # Stochastic rounding takes longer than memory does.
    if elsewhere or problem.stochastic_rounding or problem.capability < _PREFETCHING:
        return 0
    size = rows * problem.dstate * _itemsize(problem)
    is_whole = problem.headdim % rows == 0 and size % VECTOR_BYTES == 0 and "state" not in problem.unaligned
    return size if is_whole else 0


def _itemsize(problem: Problem) -> int:
    return np.dtype(dict(problem.dtypes)["state"]).itemsize


def _work(problem: Problem) -> int:
    return problem.sequences * problem.nheads * problem.headdim * problem.dstate


def _table_entry(problem: Problem) -> tuple[int, int]:
    work, state = _work(problem), dict(problem.dtypes)["state"]
    plain = is_plain(problem)
    stored = "int16" if plain and state == "int16" else f"bytes{np.dtype(state).itemsize}"
    if problem.stochastic_rounding:
        each_token = "intermediate_states" in problem.names or "dst_state_batch_indices" in problem.tables
        stored = "stochastic_steps" if each_token else "stochastic"
    rows = measured("triton/tiles", problem.capability, *(() if plain else ("many_tokens",)), stored)
    return next((elements, warps) for most, elements, warps in rows if work <= most)


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
