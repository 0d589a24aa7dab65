"""The reference backend: the step in NumPy and float64, written to be read beside the formulas."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ssu_bridge.backends.base import HostKernel, not_yet
from ssu_bridge.problem import Problem


class Exact(NamedTuple):
    """The step before anything is rounded, and how much rounding it could bear.

    Attributes:
        out: (b, H, P), float64.
        states: (b, H, P, N), float64; the state of each sequence after the step.
        slots: the slot that each sequence writes, -1 for none.
        out_scale, states_scale: of the same shapes; the sum of the absolute values that were added up, each weighted
            with how strongly it carries on the rounding of what it was computed from. A float32 computation differs
            from the exact one by a few times 2**-24 of this.
    """

    out: np.ndarray
    states: np.ndarray
    slots: np.ndarray
    out_scale: np.ndarray
    states_scale: np.ndarray


def missing(framework: str) -> str | None:
    """Nothing is: NumPy is required."""
    return None


def refusal(problem: Problem) -> str | None:
    """Refuse tracing, where there are no values to copy, and what is not written yet."""
    if problem.traced:
        return "it computes on the host and so cannot be traced by JAX"
    return not_yet(problem)


def settings(problem: Problem) -> str:
    """There are none."""
    return ""


def load(problem: Problem) -> HostKernel:
    """Return a function that runs the step on NumPy arrays."""
    return HostKernel(functools.partial(_run, problem))


def _run(problem: Problem, arrays: dict[str, np.ndarray], out: np.ndarray) -> None:
    exact = compute(problem, arrays)
    state = arrays["state"]
    with np.errstate(over="ignore"):  # a value beyond the dtype's range is stored as inf, as everywhere
        out[...] = exact.out.reshape(out.shape).astype(np.float32).astype(out.dtype)
        for sequence, slot in enumerate(exact.slots):
            if slot >= 0:
                state[slot] = exact.states[sequence].reshape(state.shape[1:]).astype(np.float32).astype(state.dtype)


def compute(problem: Problem, arrays: Mapping[str, Any]) -> Exact:
    """Compute one step in float64.

    Args:
        problem: the description of the call.
        arrays: NumPy arrays by name, as ``problem.names`` lists them. They are only read.
    """
    b, H, P, N, G = problem.sequences, problem.nheads, problem.headdim, problem.dstate, problem.ngroups

    def wide(name: str, shape: tuple[int, ...]) -> Any:
        """Widen to float64 and give every array the axes (b, H, P, N) or a broadcastable part of them."""
        return arrays[name].astype(np.float64).reshape(shape)

    def parameter(name: str) -> Any:
        return wide(name, (1, H, -1, 1))

    def grouped(name: str) -> Any:
        return np.repeat(wide(name, (b, G, 1, N)), H // G, axis=1)

    x, dt = wide("x", (b, H, P, 1)), wide("dt", (b, H, -1 if b else P, 1))
    dt_scale = np.abs(dt)
    if "dt_bias" in arrays:
        dt, dt_scale = dt + parameter("dt_bias"), dt_scale + np.abs(parameter("dt_bias"))
    if problem.options.dt_softplus:
        # A change of dt changes softplus by at most the sigmoid's share of it.
        dt_scale = dt_scale / (1 + np.exp(-dt))
        dt = np.where(dt > 20, dt, np.log1p(np.exp(np.minimum(dt, 20))))
    dt_scale = np.maximum(dt_scale, np.abs(dt))
    A = wide("A", (1, H, -1, N) if arrays["A"].size > H else (1, H, 1, 1))
    B, C = grouped("B"), grouped("C")
    reads, writes = _slots(problem, arrays)
    old = np.zeros((b, H, P, N))
    for sequence, slot in enumerate(reads):
        if slot >= 0:
            old[sequence] = arrays["state"][slot].astype(np.float64).reshape(H, P, N)
    decay = np.exp(A * dt)
    states = old * decay + dt * x * B
    states_scale = np.abs(old) * decay * (1 + np.abs(A) * dt_scale) + dt_scale * np.abs(x * B)
    out, out_scale = (states * C).sum(-1), (states_scale * np.abs(C)).sum(-1)
    if "D" in arrays:
        skip = (parameter("D") * x)[..., 0]
        out, out_scale = out + skip, out_scale + np.abs(skip)
    if "z" in arrays:
        z = wide("z", (b, H, P))
        gate = z * np.exp(-np.logaddexp(0, -z))
        out, out_scale = out * gate, out_scale * np.abs(gate) * (1 + np.abs(z))
    return Exact(out, states, np.where(reads >= 0, writes, -1), out_scale, states_scale)


def _slots(problem: Problem, arrays: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the slot that each sequence reads and the one that it writes, -1 for a pad."""

    def slots(name: str) -> Any:
        indices = arrays[name].astype(np.int64)
        pad = (indices == problem.options.pad_slot_id) | (indices < 0) | (indices >= problem.slots)
        return np.where(pad, -1, indices)

    reads = slots("state_batch_indices") if "state_batch_indices" in arrays else np.arange(problem.sequences)
    writes = slots("dst_state_batch_indices") if "dst_state_batch_indices" in arrays else reads
    return reads, writes
