"""An eager JAX call of ``update``, and a trivial jitted function with the same arguments to compare it with."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ssu_bridge import update

TRIVIAL = "a jitted function that adds 1 to x and to the state"
# JAX leaves out of a program what it does not use, if it may; then the program has two arguments.
DROPPING = "the same, but JAX drops its unused arguments"


def eager_calls(a: dict[str, Any]) -> tuple[dict[str, Callable[[], None]], list[Any]]:
    """Return the calls by name, and the list of the states that they replace, in the same order.

    The arguments are written out, because building them would be part of what is measured.
    """
    states = [jnp.copy(a["state"]) for _ in range(3)]
    z = a.get("z")

    def call_update() -> None:
        _, states[0] = update(
            states[0], a["x"], a["dt"], a["A"], a["B"], a["C"],
            D=a["D"], z=z, dt_bias=a["dt_bias"], state_batch_indices=a["state_batch_indices"], dt_softplus=True,
        )  # fmt: skip

    def trivial(place: int, jitted: Any) -> Callable[[], None]:
        def call() -> None:
            _, states[place] = jitted(
                states[place], a["x"], a["dt"], a["A"], a["B"], a["C"],
                D=a["D"], z=z, dt_bias=a["dt_bias"], state_batch_indices=a["state_batch_indices"],
            )  # fmt: skip

        return call

    return {
        "update": call_update,
        TRIVIAL: trivial(1, _trivial(keep_unused=True)),
        DROPPING: trivial(2, _trivial()),
    }, states


def _trivial(**options: Any) -> Any:
    """Return a jitted function; each call makes another function, because JAX keeps programs by those."""

    def add_one(
        state: Any, x: Any, dt: Any, A: Any, B: Any, C: Any, *, D: Any, z: Any, dt_bias: Any, state_batch_indices: Any
    ) -> tuple[Any, Any]:
        return x + 1, state + 1

    return jax.jit(add_one, donate_argnums=0, **options)


def ratios(medians: dict[str, float]) -> str:
    """Return the ratios of update's time to the others', in words."""
    return ", ".join(f"{medians['update'] / medians[name]:.2f} times {name}" for name in (TRIVIAL, DROPPING))
