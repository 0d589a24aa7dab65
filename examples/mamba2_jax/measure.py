"""How fast a model decodes with each backend, and whether its compiled program copies a state."""

import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import ssu_bridge
from mamba2_jax import model
from mamba2_jax.config import Mamba2Config
from mamba2_jax.generate import Progress, decode
from mamba2_jax.sampling import Sampling

Run = Callable[[], None]
_SPARE_SLOTS = 2  # a server's cache has more slots than sequences
# The operations of XLA that hand a buffer on as it is.
_PASSES_ON = {"parameter", "tuple", "get-tuple-element", "while", "call", "conditional", "bitcast"}


def example_step(config: Mamba2Config, weights: model.Weights, batch: int, state_dtype: str) -> dict[str, Any]:
    """Return the arguments of one SSM step as the model makes them, with random numbers in a slotted cache."""
    keys = jax.random.split(jax.random.key(0), 5)
    dtype, layer = weights.embedding.dtype, weights.layers[0]
    state = (batch + _SPARE_SLOTS, config.num_heads, config.head_dim, config.state_size)
    return {
        "state": jax.random.normal(keys[0], state).astype(state_dtype),
        "x": jax.random.normal(keys[1], (batch, *state[1:3]), dtype),
        "dt": jax.random.normal(keys[2], (batch, config.num_heads), dtype),
        "A": -jnp.exp(layer.A_log),
        "B": jax.random.normal(keys[3], (batch, config.n_groups, config.state_size), dtype),
        "C": jax.random.normal(keys[4], (batch, config.n_groups, config.state_size), dtype),
        "D": layer.D,
        "dt_bias": layer.dt_bias,
        "dt_softplus": True,
        "state_batch_indices": _slots(batch),
    }


def backends_present(step: dict[str, Any]) -> list[str]:
    """Return the backends that can run a step under ``jax.jit``, fastest first."""
    # The reference computes on the host and cannot be traced.
    names = [b for b in ssu_bridge.Backend if b not in (ssu_bridge.Backend.AUTO, ssu_bridge.Backend.REFERENCE)]
    return [str(b) for b in names if ssu_bridge.explain(**step, backend=b).backend is not None]


def ssm_steps(weights: model.Weights, step: dict[str, Any], *, tokens: int, backend: str) -> Run:
    """Return a run of the SSM steps of so many tokens alone: each layer with its own state, its x the last one's y."""
    names = ("dt", "A", "B", "C", "D", "dt_bias", "state_batch_indices")
    rest: dict[str, Any] = {name: step[name] for name in names}

    def stack(states: tuple[jax.Array, ...], x: jax.Array, rest: dict[str, Any]) -> Any:
        def token(carry: Any, _: None) -> tuple[Any, None]:
            states, x = carry
            after = []
            for state in states:
                y, state = ssu_bridge.update(state, x, **rest, dt_softplus=True, backend=backend)
                x = y * 0.5  # so that numbers stay finite
                after.append(state)
            return (tuple(after), x), None

        return jax.lax.scan(token, (states, x), None, length=tokens)[0]

    states = tuple(jnp.copy(step["state"]) for _ in weights.layers)
    compiled = jax.jit(stack, donate_argnums=0).lower(states, step["x"], rest).compile()

    def run() -> None:
        nonlocal states
        states, _ = jax.block_until_ready(compiled(states, step["x"], rest))

    return run


def whole_tokens(
    config: Mamba2Config, weights: model.Weights, batch: int, state_dtype: str, *, tokens: int, backend: str
) -> tuple[Run, Any]:
    """Return a run that decodes so many tokens greedily, and the compiled program."""
    dtype = weights.embedding.dtype.name
    states = model.zero_states(config, batch + _SPARE_SLOTS, dtype, state_dtype)
    progress = Progress(states, jnp.zeros((batch, config.vocab_size), jnp.float32), jnp.zeros((), jnp.int32))
    slots, keys = _slots(batch), jax.random.split(jax.random.key(0), batch)
    compiled = decode.lower(
        config, weights, progress, slots, keys, count=tokens, sampling=Sampling(temperature=0), backend=backend
    ).compile()

    def run() -> None:
        nonlocal progress
        _, progress = jax.block_until_ready(compiled(weights, progress, slots, keys))

    return run, compiled


def seconds(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Return the median time of each run; they take turns, after one of each to warm up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if i:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(own) for name, own in times.items()}


def assert_no_copy_of_a_state(compiled: Any, state: jax.Array) -> None:
    """Look in a compiled program for anything but the step itself that makes an array like an SSM state."""
    name = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[state.dtype.name]
    shape = f"{name}[{','.join(map(str, state.shape))}]"
    # On a GPU XLA wraps a custom call together with the slices that it reads, so that it reads them where they lie.
    text = re.sub(r" fusion(\(.*kind=kCustom, calls=%dynamic-slice-fusion)", r" custom-call\1", compiled.as_text())
    made = re.findall(r"= (.*?) ([a-z][\w-]*)\(", text)
    makers = {opcode for kind, opcode in made if shape in kind} - _PASSES_ON
    assert makers == {"custom-call"}, f"arrays of a state's shape come from {', '.join(sorted(makers))}"


def _slots(batch: int) -> jax.Array:
    return jnp.arange(batch, 0, -1, dtype=jnp.int32)
