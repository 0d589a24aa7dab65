"""An eager JAX call of ``update``, and one of a trivial jitted function with the same arguments to hold it against."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ssu_bridge import update

TRIVIAL = "a jitted function that adds 1 to x and to the state"


def eager_calls(a: dict[str, Any]) -> tuple[dict[str, Callable[[], None]], list[Any]]:
    """Return the two calls by name, and the list of the states that they replace: update's, the other's.

    The arguments are written out, because building them would be part of what is measured.
    """
    states = [jnp.copy(a["state"]), jnp.copy(a["state"])]

    def add_one(
        state: Any, x: Any, dt: Any, A: Any, B: Any, C: Any, *, D: Any, z: Any, dt_bias: Any, state_batch_indices: Any
    ) -> tuple[Any, Any]:
        return x + 1, state + 1

    jitted = jax.jit(add_one, donate_argnums=0)
    z = a.get("z")

    def call_update() -> None:
        _, states[0] = update(
            states[0], a["x"], a["dt"], a["A"], a["B"], a["C"],
            D=a["D"], z=z, dt_bias=a["dt_bias"], state_batch_indices=a["state_batch_indices"], dt_softplus=True,
        )  # fmt: skip

    def call_trivial() -> None:
        _, states[1] = jitted(
            states[1], a["x"], a["dt"], a["A"], a["B"], a["C"],
            D=a["D"], z=z, dt_bias=a["dt_bias"], state_batch_indices=a["state_batch_indices"],
        )  # fmt: skip

    return {"update": call_update, TRIVIAL: call_trivial}, states
