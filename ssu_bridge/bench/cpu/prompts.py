"""Prompts under jit: one call of many tokens on each backend, and a scan of single steps on xla."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ssu_bridge import update
from ssu_bridge.bench.timing import Timing, interleaved
from ssu_bridge.testing.cases import Case

TOKENS = (16, 64, 512, 2048)
SCANNED = 512
# What a scan of single steps goes over.
_TOKENWISE = ("x", "dt", "B", "C")


def times() -> dict[str, Timing]:
    """Time prompts of several lengths; the ratios are to the matrix form."""
    rows: dict[str, Timing] = {}
    for tokens in TOKENS:
        found = timings(tokens)
        matrix = found["xla, matrix form"].median
        rows |= {f"{tokens} tokens, {name} ({time.median / matrix:.2f})": time for name, time in found.items()}
    return rows


def timings(tokens: int) -> dict[str, Timing]:
    """Time a prompt of so many tokens, of mamba2-130m's sizes in float32, in the forms that there are."""
    sizes = {"sequences": 1, "slots": 1, "nheads": 24, "headdim": 64, "dstate": 128, "ngroups": 1}
    case = Case("prompt", **sizes, tokens=tokens, indices=None, absent=("z",))  # type: ignore[arg-type]
    arrays = {name: jnp.array(array) for name, array in case.arrays(seed=0).items()}
    calls: dict[str, Callable[..., Any]] = {
        "cpu": functools.partial(update, dt_softplus=True, backend="cpu"),
        "xla, matrix form": functools.partial(update, dt_softplus=True, backend="xla", algorithm="matrix"),
    }
    if tokens == SCANNED:
        calls["xla, a scan of single steps"] = _scan
    return interleaved({name: _waiting(call, arrays) for name, call in calls.items()}, rounds=15, seconds=0)


def _scan(state: Any, A: Any, D: Any, dt_bias: Any, **tokenwise: Any) -> tuple[Any, Any]:
    def step(state: Any, token: dict[str, Any]) -> tuple[Any, Any]:
        out, state = update(state, A=A, D=D, dt_bias=dt_bias, **token, dt_softplus=True, backend="xla")
        return state, out

    by_token = {name: jnp.moveaxis(tokenwise[name], 1, 0) for name in _TOKENWISE}
    state, out = jax.lax.scan(step, state, by_token)
    return jnp.moveaxis(out, 0, 1), state


def _waiting(call: Callable[..., Any], arrays: dict[str, Any]) -> Callable[[], object]:
    """Return a jitted call that keeps the state as it was, and waits."""
    jitted = jax.jit(call)
    return lambda: [result.block_until_ready() for result in jitted(**arrays)]
