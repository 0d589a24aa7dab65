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
    """Return the calls by name, and the list of the states that they replace, in the same order."""
    states = [jnp.copy(a["state"]) for _ in range(3)]
    others: list[Any] = [a.get(name) for name in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    rest: list[Any] = [*others, True, a["state_batch_indices"]]

    def call_update() -> None:
        _, states[0] = update(states[0], *rest)

    def trivial(place: int, jitted: Any) -> Callable[[], None]:
        def call() -> None:
            _, states[place] = jitted(states[place], *others, a["state_batch_indices"])

        return call

    kept, dropping = (jax.jit(_adding_one(), donate_argnums=0, keep_unused=keep) for keep in (True, False))
    return {"update": call_update, TRIVIAL: trivial(1, kept), DROPPING: trivial(2, dropping)}, states


def _adding_one() -> Callable[..., Any]:
    """Return another function in each call, because JAX keeps programs by those."""
    return lambda state, x, *others: (x + 1, state + 1)


def ratios(medians: dict[str, float]) -> str:
    """Return the ratios of update's time to the others', in words."""
    return ", ".join(f"{medians['update'] / medians[name]:.2f} times {name}" for name in (TRIVIAL, DROPPING))
