"""What the forms compute alike, for tokens with any leading axes, in float32."""

from typing import Any

import jax
import jax.numpy as jnp

from ssu_bridge.core.problem import Problem


def step_sizes(problem: Problem, arrays: dict[str, Any]) -> Any:
    """Return dt with its bias and softplus, (..., H, P), or (..., H, 1) where it is tied."""
    dt = arrays["dt"].astype(jnp.float32)
    dt = dt.reshape(*arrays["x"].shape[:-1], 1) if "dt" in problem.tied else dt
    if "dt_bias" in arrays:
        dt = dt + _by_channel(problem, arrays, "dt_bias")
    if problem.options.dt_softplus:
        # Above 20 the exponential is not needed, and must not overflow in the branch that is not selected either. Not
        # by jnp.minimum, which passes half of a gradient on where its arguments are equal.
        large = dt > 20
        dt = jnp.where(large, dt, jnp.log1p(jnp.exp(jnp.where(large, 0, dt))))
    return dt


def finished(problem: Problem, arrays: dict[str, Any], y: Any) -> Any:
    """Return the output of tokens, from what their states give: with D and the gate z, in the dtype of x."""
    if "D" in arrays:
        y = y + _by_channel(problem, arrays, "D") * arrays["x"].astype(jnp.float32)
    if "z" in arrays:
        z = arrays["z"].astype(jnp.float32)
        y = y * z * jax.nn.sigmoid(z)
    return y.astype(arrays["x"].dtype)


def _by_channel(problem: Problem, arrays: dict[str, Any], name: str) -> Any:
    """Give a parameter (H,) an axis of headdim; one that has it, as a tied one of a single channel may, keeps it."""
    value = arrays[name].astype(jnp.float32)
    return value.reshape(-1, 1) if name in problem.tied else value
