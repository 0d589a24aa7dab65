"""How fast a model decodes with each backend, and whether its compiled program copies a state."""

import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import ssu_bridge
from mamba2_jax import distributed, model, speculate
from mamba2_jax.config import Mamba2Config
from mamba2_jax.generate import Progress, decode, prefill
from mamba2_jax.sampling import Sampling

Run = Callable[[], None]
_SPARE_SLOTS = 2  # a server's cache has more slots than sequences
# The operations of XLA that hand a buffer on as it is.
_PASSES_ON = {"parameter", "tuple", "get-tuple-element", "while", "call", "conditional", "bitcast"}


def example_step(
    config: Mamba2Config, weights: model.Weights, batch: int, state_dtype: str, *, prompt: int = 0
) -> dict[str, Any]:
    """Return the arguments of one SSM step as the model makes them, with random numbers in a slotted cache.

    With ``prompt`` they are those of a call that reads the first so many tokens of each sequence, in packed rows.
    """
    keys = jax.random.split(jax.random.key(0), 5)
    dtype, layer = weights.embedding.dtype, weights.layers[0]
    state = (batch + _SPARE_SLOTS, config.num_heads, config.head_dim, config.state_size)
    rows = batch * max(prompt, 1)
    step = {
        "state": model.stored(jax.random.normal(keys[0], state), state_dtype),
        "x": jax.random.normal(keys[1], (rows, *state[1:3]), dtype),
        "dt": jax.random.normal(keys[2], (rows, config.num_heads), dtype),
        "A": -jnp.exp(layer.A_log),
        "B": jax.random.normal(keys[3], (rows, config.n_groups, config.state_size), dtype),
        "C": jax.random.normal(keys[4], (rows, config.n_groups, config.state_size), dtype),
        "D": layer.D,
        "dt_bias": layer.dt_bias,
        "dt_softplus": True,
        "state_batch_indices": _slots(batch),
    }
    if prompt:
        step["cu_seqlens"] = jnp.arange(0, rows + 1, prompt, dtype=jnp.int32)
        step["has_initial_state"] = jnp.zeros(batch, jnp.bool_)
    return step


def backends_present(step: dict[str, Any]) -> list[str]:
    """Return the backends that can run a step under ``jax.jit``, fastest first."""
    # The reference computes on the host and cannot be traced.
    names = [b for b in ssu_bridge.Backend if b not in (ssu_bridge.Backend.AUTO, ssu_bridge.Backend.REFERENCE)]
    return [str(b) for b in names if ssu_bridge.explain(**step, backend=b).backend is not None]


def replays(
    config: Mamba2Config, weights: model.Weights, step: dict[str, Any], window: int, backend: str, *, tokens: int = 1
) -> bool:
    """Return whether a backend can run a step with states that are replayed, of so many tokens in other calls."""
    dtype = weights.embedding.dtype
    state = ssu_bridge.to_replay(step["state"], window, tokens, config.n_groups, dtype, dtype)
    cursor = ssu_bridge.ReplayCursor.empty(len(state.dt), window, tokens, like=state.dt)
    return ssu_bridge.explain(**{**step, "state": state}, replay=cursor, backend=backend).backend is not None


def ssm_steps(weights: model.Weights, step: dict[str, Any], *, tokens: int, backend: str) -> Run:
    """Return a run of so many SSM steps alone: each layer with its own state, its x the last one's y."""
    rest = {name: value for name, value in step.items() if name not in ("state", "x", "dt_softplus")}

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

    states = tuple(jax.tree.map(jnp.copy, step["state"]) for _ in weights.layers)
    compiled = jax.jit(stack, donate_argnums=0).lower(states, step["x"], rest).compile()

    def run() -> None:
        nonlocal states
        states, _ = jax.block_until_ready(compiled(states, step["x"], rest))

    return run


def whole_tokens(
    config: Mamba2Config,
    weights: model.Weights,
    batch: int,
    state_dtype: str,
    *,
    tokens: int,
    backend: str,
    replay: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[Run, Any]:
    """Return a run that decodes so many tokens greedily, and the compiled program.

    With ``replay`` the states are written once in so many tokens. The devices of a ``mesh`` share the heads.
    """
    if mesh is not None:
        config = config.over(mesh)
        weights = distributed.place(config, weights)
    states = model.zero_states(config, batch + _SPARE_SLOTS, weights.embedding.dtype.name, state_dtype)
    progress = Progress(states, jnp.zeros((batch, config.vocab_size), jnp.float32), jnp.zeros((), jnp.int32))
    if replay is not None:
        progress = progress.replayed(config, weights, replay)
    slots, keys = _slots(batch), jax.random.split(jax.random.key(0), batch)
    compiled = decode.lower(
        config, weights, progress, slots, keys, count=tokens, sampling=Sampling(temperature=0), backend=backend
    ).compile()

    def run() -> None:
        nonlocal progress
        _, progress = jax.block_until_ready(compiled(weights, progress, slots, keys))

    return run, compiled


def whole_verifications(
    config: Mamba2Config,
    weights: model.Weights,
    batch: int,
    state_dtype: str,
    *,
    length: int,
    count: int,
    backend: str,
    replay: int | None = None,
) -> Run:
    """Return a run of so many calls that each verify ``length`` tokens of each sequence.

    The state after each has a slot of its own, or with ``replay`` states are written once in a window of tokens.
    """
    greedy, keys = Sampling(temperature=0), jax.random.split(jax.random.key(0), batch)
    dtype = weights.embedding.dtype.name
    of_a_slot = length if replay is None else 1
    states = model.zero_states(config, batch, dtype, state_dtype, tokens=length, of_a_slot=of_a_slot)
    text = jnp.zeros((batch, 2), jnp.int32)  # nothing is looked up in it
    progress = speculate.under_way(config, weights, states, text, jnp.ones(batch, jnp.int32), length, replay)
    drafts = jnp.zeros((batch, 1, length - 1), jnp.int32)

    def verify(weights: model.Weights, progress: speculate.Progress, drafts: jax.Array) -> speculate.Progress:
        def call(progress: speculate.Progress, _: None) -> tuple[speculate.Progress, None]:
            after = speculate.step(config, weights, keys, greedy, backend, progress, drafts)
            return after._replace(text=progress.text.at[:, 0].set(after.text[:, 1]), lengths=progress.lengths), None

        return jax.lax.scan(call, progress, None, length=count)[0]

    compiled = jax.jit(verify, donate_argnums=1).lower(weights, progress, drafts).compile()

    def run() -> None:
        nonlocal progress
        progress = jax.block_until_ready(compiled(weights, progress, drafts))

    return run


def whole_prompts(
    config: Mamba2Config, weights: model.Weights, batch: int, state_dtype: str, *, length: int, backend: str
) -> Run:
    """Return a run that reads a prompt of so many tokens for each sequence, as ``generate`` does."""
    states = model.zero_states(config, batch + _SPARE_SLOTS, weights.embedding.dtype.name, state_dtype)
    prompts, slots = _prompts(config, batch, length).tolist(), _slots(batch)

    def run() -> None:
        nonlocal states
        states = jax.block_until_ready(prefill(config, weights, states, prompts, slots, backend)).states

    return run


def prompts_by_steps(
    config: Mamba2Config, weights: model.Weights, batch: int, state_dtype: str, *, length: int, backend: str
) -> Run:
    """Return a run that reads the same prompts token by token, in a ``lax.scan``."""
    states = model.zero_states(config, batch + _SPARE_SLOTS, weights.embedding.dtype.name, state_dtype)
    prompts, slots = _prompts(config, batch, length).T, _slots(batch)

    def read(weights: model.Weights, states: tuple[model.State, ...], prompts: jax.Array) -> Any:
        def token(carry: Any, tokens: jax.Array) -> tuple[Any, None]:
            return model.step(config, weights, carry[1], tokens, slots, backend), None

        return jax.lax.scan(token, (jnp.zeros((batch, config.vocab_size)), states), prompts)[0]

    compiled = jax.jit(read, donate_argnums=1).lower(weights, states, prompts).compile()

    def run() -> None:
        nonlocal states
        _, states = jax.block_until_ready(compiled(weights, states, prompts))

    return run


def _prompts(config: Mamba2Config, batch: int, length: int) -> jax.Array:
    return jax.random.randint(jax.random.key(0), (batch, length), 0, config.vocab_size)


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
    # XLA's names of dtypes: f32, bf16, s8, f8e4m3fn.
    name = state.dtype.name.replace("float", "f").replace("int", "s").replace("_", "")
    shape = f"{name}[{','.join(map(str, state.shape))}]"
    # On a GPU XLA wraps a custom call together with the slices that it reads, so that it reads them where they lie.
    text = re.sub(r" fusion(\(.*kind=kCustom, calls=%dynamic-slice-fusion)", r" custom-call\1", compiled.as_text())
    made = re.findall(r"= (.*?) ([a-z][\w-]*)\(", text)
    makers = {opcode for kind, opcode in made if shape in kind} - _PASSES_ON
    assert makers == {"custom-call"}, f"arrays of a state's shape come from {', '.join(sorted(makers))}"


def _slots(batch: int) -> jax.Array:
    return jnp.arange(batch, 0, -1, dtype=jnp.int32)
