"""The xla backend: the step in plain jax.numpy, on any device and differentiable."""

import functools
from typing import Any

from ssu_bridge.backends.base import TracedKernel, not_yet
from ssu_bridge.problem import Problem


def missing(framework: str) -> str | None:
    """Nothing is: where JAX arrays come from, JAX is."""
    return None


def refusal(problem: Problem) -> str | None:
    """Refuse arrays that are not JAX's, and what is not written yet."""
    if problem.framework != "jax":
        return f"it runs on JAX arrays only, and these are {problem.framework} arrays"
    return not_yet(problem)


def settings(problem: Problem) -> str:
    """There are none."""
    return ""


def load(problem: Problem) -> TracedKernel:
    """Return the function that computes the step; it is traced into the caller's program."""
    return TracedKernel(functools.partial(_step, problem))


def _step(problem: Problem, arrays: dict[str, Any]) -> tuple[Any, Any]:
    import jax
    import jax.numpy as jnp

    def wide(name: str) -> Any:
        return arrays[name].astype(jnp.float32)

    def by_channel(name: str) -> Any:
        """Give a parameter (H,) an axis of headdim; one that has it stays as it is."""
        value = wide(name)
        return value[..., None] if value.ndim < len(channels) else value

    def by_head(name: str) -> Any:
        """Give B or C an axis of heads: (b, H, 1, N)."""
        grouped = wide(name).reshape(problem.sequences, problem.ngroups, 1, problem.dstate)
        repeated = jnp.repeat(grouped, problem.nheads // problem.ngroups, axis=1)
        return repeated if problem.heads_axis else repeated[:, 0]

    state, x = arrays["state"], wide("x")
    channels = x.shape[1:]
    dt = wide("dt")
    dt = dt[..., None] if dt.ndim < x.ndim else dt
    if "dt_bias" in arrays:
        dt = dt + by_channel("dt_bias")
    if problem.options.dt_softplus:
        # Above 20 the exponential is not needed, and must not overflow in the branch that is not taken either.
        dt = jnp.where(dt > 20, dt, jnp.log1p(jnp.exp(jnp.minimum(dt, 20))))
    A = wide("A")
    A = A[:, None, None] if A.ndim < state.ndim - 1 else A
    read = _Slots(arrays.get("state_batch_indices"), problem)
    old = read.load(state)
    new = old * jnp.exp(A * dt[..., None]) + (dt * x)[..., None] * by_head("B")
    out = jnp.sum(new * by_head("C"), axis=-1)
    if "D" in arrays:
        out = out + by_channel("D") * x
    if "z" in arrays:
        z = wide("z")
        out = out * z * jax.nn.sigmoid(z)
    write = _Slots(arrays["dst_state_batch_indices"], problem) if "dst_state_batch_indices" in arrays else read
    return out.astype(arrays["x"].dtype), write.store(state, new.astype(state.dtype), read)


class _Slots:
    """The slots that the sequences read or write: one each, some of them pads."""

    def __init__(self, indices: Any | None, problem: Problem):
        self.problem = problem
        self.indices = indices
        if indices is not None:
            inside = (indices >= 0) & (indices < problem.slots)
            self.valid = inside & (indices != problem.options.pad_slot_id) if self._pad_fits() else inside

    def _pad_fits(self) -> bool:
        """A pad id outside the slots is a pad by being outside, and need not fit the indices' dtype."""
        return 0 <= self.problem.options.pad_slot_id < self.problem.slots

    def load(self, state: Any) -> Any:
        import jax.numpy as jnp

        if self.indices is None:
            return state[: self.problem.sequences].astype(jnp.float32)
        if self.problem.slots == 0:
            return jnp.zeros((self.problem.sequences, *state.shape[1:]), jnp.float32)
        rows = state[jnp.where(self.valid, self.indices, 0)].astype(jnp.float32)
        return jnp.where(self.valid.reshape(-1, *[1] * (state.ndim - 1)), rows, 0)

    def store(self, state: Any, rows: Any, read: "_Slots") -> Any:
        import jax.numpy as jnp

        if self.indices is None:
            return state.at[: self.problem.sequences].set(rows)
        valid = self.valid if read.indices is None else self.valid & read.valid
        # The row of a pad goes past the last slot, where the scatter drops it; each to a place of its own, because XLA
        # writes faster where no two rows go to one place.
        dropped = self.problem.slots + jnp.arange(self.problem.sequences, dtype=self.indices.dtype)
        places = jnp.where(valid, self.indices, dropped)
        return state.at[places].set(rows, mode="drop", unique_indices=True)
