"""The step in NumPy and float64: exact results, with the error bounds of a computation in float32."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ssu_bridge.core import rounding
from ssu_bridge.core.arguments import RINGS
from ssu_bridge.core.problem import Problem
from ssu_bridge.core.slots import routes

# Bounds are in units of 2**-24, of which a comparison allows several: this many of them are a step of a grid.
_STEP_BOUNDS = 2.0**20


class Store(NamedTuple):
    """The states that go to one array, before they are rounded to its dtype.

    Attributes:
        places: an index array for each leading axis of the array, of a ring as :func:`places_first` has it; of two
            stores to one place the later one counts.
        states: (n, H, P, N), float64; of a ring what a row has.
        bounds: the same shape, as ``out_bounds`` in :class:`Exact`.
        words: the same shape, the random words of stochastic rounding; None for rounding to nearest.
    """

    places: tuple[np.ndarray, ...]
    states: np.ndarray
    bounds: np.ndarray
    words: np.ndarray | None


class Exact(NamedTuple):
    """The exact results of a step, before rounding, and the error bounds of rounding.

    Attributes:
        out: (rows, H, P), float64; rows are the tokens of all sequences, one after another.
        out_bounds: the same shape; the sum of the absolute values that were added up, each weighted with how strongly
            it carries on the rounding of what it was computed from. A float32 computation differs from the exact one by
            a few times 2**-24 of this.
        rows: (rows,), whether the row belongs to a sequence.
        stores: what goes to each array that is stored to.
    """

    out: np.ndarray
    out_bounds: np.ndarray
    rows: np.ndarray
    stores: dict[str, Store]


def single(values: np.ndarray) -> np.ndarray:
    """Return values rounded to float32; values beyond its range become infinite."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def places_first(name: str, array: np.ndarray) -> np.ndarray:
    """Return a view of an array whose leading axes are those of a place in it: of a ring, slots and rows."""
    return np.moveaxis(array, 2, 1) if name in RINGS else array


def by_token(problem: Problem, arrays: Mapping[str, Any], step: "Step") -> Exact:
    """Compute a call token by token, with the state rounded between the tokens of a sequence.

    It is rounded to float32, or with ``round_each_token`` to what it is stored in.
    """
    b, shape = problem.sequences, (problem.nheads, problem.headdim, problem.dstate)
    plan = routes(problem, arrays)
    count = row_count(problem)
    out, out_bounds, rows = np.zeros((count, *shape[:2])), np.zeros((count, *shape[:2])), np.zeros(count, bool)
    kept: dict[str, list[Any]] = {"state": [], "intermediate_states": []}
    for sequence in range(b):
        # The states after each token, and last, where -1 finds it, the one that the sequence starts from.
        count = plan.lengths[sequence]
        after = [None] * count + [(step.initial(plan.loads[sequence]), np.zeros(shape))]
        for token in range(count):
            row = plan.starts[sequence] + token
            rows[row] = True
            state, bounds = after[plan.parents[sequence, token]]
            with np.errstate(over="ignore", invalid="ignore"):  # what overflows is infinite, as everywhere
                out[row], out_bounds[row], state, bounds = step.token(row, state, bounds)
            slot, entry = plan.slots[sequence, token], plan.entries[sequence, token]
            # Rounded after each token, a state is so once, by the random words of one slot, wherever it goes.
            words = step.words(slot if slot >= 0 else max(plan.reads[sequence], 0), token, 0)
            if slot >= 0:
                kept["state"].append(((slot,), state, bounds, words))
            if entry >= 0:
                entry_words = words if problem.rounds_each_token else step.words(entry, token, 1)
                kept["intermediate_states"].append(((entry, plan.steps[token]), state, bounds, entry_words))
            after[token] = step.rounded(state, bounds, words)
    stores = {
        name: stacked(kept[name], axes, shape)
        for name, axes in (("state", 1), ("intermediate_states", 2))
        if name in problem.results
    }
    return Exact(out, out_bounds, rows, stores)


def row_count(problem: Problem) -> int:
    """Return how many rows of tokens a call has."""
    return problem.tokens if problem.layout == "packed" else problem.sequences * problem.tokens


def stacked(kept: list[Any], axes: int, shape: tuple[int, ...]) -> Store:
    """Make a Store of what is kept: place, state of this shape, bounds and random words."""
    places = np.array([place for place, *_ in kept], np.int64).reshape(-1, axes)
    states, bounds = (np.array([k[i] for k in kept]).reshape(-1, *shape) for i in (1, 2))
    words = np.array([k[3] for k in kept]) if kept and kept[0][3] is not None else None
    return Store(tuple(places.T), states, bounds, words)


class Step:
    """The recurrence for one token of one sequence, with the arrays widened to float64 once.

    Attributes:
        x, B: those of each row, (H, P, 1) and (H, 1, N).
    """

    def __init__(self, problem: Problem, arrays: Mapping[str, Any], coarse_softplus: bool = False):
        self.problem, self.arrays = problem, arrays
        self.least_dt_bound = 1.0 if coarse_softplus and problem.options.dt_softplus else 0.0
        H, P, N = problem.nheads, problem.headdim, problem.dstate
        rows = row_count(problem)

        def rowwise(name: str, *axes: int) -> Any:
            return arrays[name].astype(np.float64).reshape(rows, *axes)

        def parameter(name: str) -> Any:
            """Return (H, P, 1), or (H, 1, 1) for one number a head."""
            return arrays[name].astype(np.float64).reshape(H, -1, 1)

        def grouped(name: str) -> Any:
            return np.repeat(rowwise(name, problem.ngroups, 1, N), H // problem.ngroups, axis=1)

        self.x = rowwise("x", H, P, 1)
        self.dt = rowwise("dt", H, P if arrays["dt"].ndim == arrays["x"].ndim else 1, 1)
        self.z = rowwise("z", H, P) if "z" in arrays else None
        self.B, self.C = grouped("B"), grouped("C")
        self.A = arrays["A"].astype(np.float64).reshape((H, P, N) if arrays["A"].size > H else (H, 1, 1))
        self.D = parameter("D") if "D" in arrays else None
        self.dt_bias = parameter("dt_bias") if "dt_bias" in arrays else None
        self.key = rounding.key_of(arrays["rand_seed"]) if problem.stochastic_rounding else None

    def initial(self, slot: int) -> np.ndarray:
        """Return the state that a sequence starts from, (H, P, N): zeros if it has no slot."""
        shape = (self.problem.nheads, self.problem.headdim, self.problem.dstate)
        if slot < 0:
            return np.zeros(shape)
        scales = self.arrays["state_scale"][slot].reshape(shape[:2]) if "state_scale" in self.arrays else None
        return rounding.widened(self.arrays["state"][slot].reshape(shape), scales).astype(np.float64)

    def token(self, row: int, old: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return the output for a row, its bounds, the new state and its bounds."""
        state, bounds = self.advanced(old, bounds, self.x[row], self.B[row], *self.step_size(row))
        C = self.C[row]
        out, out_bounds = (state * C).sum(-1), (bounds * np.abs(C)).sum(-1)
        if self.D is not None:
            skip = (self.D * self.x[row])[..., 0]
            out, out_bounds = out + skip, out_bounds + np.abs(skip)
        if self.z is not None:
            z = self.z[row]
            gate = z * np.exp(-np.logaddexp(0, -z))
            out, out_bounds = out * gate, out_bounds * np.abs(gate) * (1 + np.abs(z))
        return out, out_bounds, state, bounds

    def step_size(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return dt of a row, with bias and softplus, and its bounds."""
        dt, dt_bounds = self.dt[row], np.abs(self.dt[row])
        if self.dt_bias is not None:
            dt, dt_bounds = dt + self.dt_bias, dt_bounds + np.abs(self.dt_bias)
        if self.problem.options.dt_softplus:
            # A change of dt changes softplus by at most the sigmoid's share of it.
            dt_bounds = dt_bounds / (1 + np.exp(-dt))
            dt = np.where(dt > 20, dt, np.log1p(np.exp(np.minimum(dt, 20))))
        return dt, np.maximum(dt_bounds, np.abs(dt)) + self.least_dt_bound

    def advanced(
        self, old: np.ndarray, bounds: np.ndarray, x: Any, B: Any, dt: Any, dt_bounds: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return a state after a token, and its bounds."""
        decay = np.exp(self.A * dt)
        state = old * decay + dt * x * B
        # What the tokens before left, and what this one adds.
        bounds = bounds * decay + np.abs(old) * decay * (1 + np.abs(self.A) * dt_bounds) + dt_bounds * np.abs(x * B)
        return state, bounds

    def rounded(self, state: np.ndarray, bounds: np.ndarray, words: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Return the state that the next token continues, and its bounds."""
        if not self.problem.rounds_each_token:
            return single(state).astype(np.float64), bounds
        dtype = self.arrays["state"].dtype.name
        numbers, scales = rounding.stored(single(state), dtype, words)
        kept = rounding.widened(numbers, scales).astype(np.float64)
        # A computation that differs in the least may round to a neighbour.
        return kept, bounds + _STEP_BOUNDS * rounding.grid_step(kept, scales, dtype)

    def words(self, slot: int, token: int, kind: int) -> np.ndarray | None:
        """Return the random words for a store."""
        if self.key is None:
            return None
        shape = (self.problem.nheads, self.problem.headdim, self.problem.dstate)
        return rounding.slot_words(slot, shape, token, kind, self.key, self.problem.options.config.philox_rounds)
