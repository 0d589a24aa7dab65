"""Random schedules of a server that decodes with replay, held step by step against a recurrence in float64.

Sequences join and leave, have tokens or none, are rolled back to any accepted count, and share a batch at different
phases of a window. ``serve`` runs a schedule in any mode on any backend.
"""

import dataclasses
import functools

import jax
import numpy as np
from modes import bits, framework, skip_if_refused, to_host, to_mode

import ssu_bridge
from ssu_bridge.core.quantized import unpaired
from ssu_bridge.frontends.base import frontend

PAD = -1


@dataclasses.dataclass(frozen=True)
class Config:
    """A server: its window, the most tokens of a call, how calls are laid out, its sizes, and the dtype of all but A.

    Attributes:
        state_dtype: of the checkpoint, if it is another.
        tolerance: of outputs and states, relative and absolute.
        unused: what rows of the rings hold that are not pending.
    """

    window: int
    tokens: int
    layout: str
    sequences: int = 4
    slots: int = 6
    nheads: int = 2
    headdim: int = 4
    dstate: int = 8
    ngroups: int = 1
    dtype: str = "float32"
    state_dtype: str | None = None
    steps: int = 30
    tolerance: float = 2e-5
    unused: float = float("nan")

    def __str__(self):
        return f"{self.layout}, {self.tokens} of {self.window}"


CONFIGS = (
    Config(1, 1, "single"),
    Config(16, 1, "single", ngroups=2, steps=40),
    Config(3, 2, "multi", ngroups=2),
    Config(4, 4, "multi"),
    Config(5, 3, "packed"),
    Config(8, 8, "packed", ngroups=2),
    Config(32, 4, "packed", steps=50),
    Config(32, 32, "multi", steps=12),
)


class Exact:
    """The states of all slots in float64."""

    def __init__(self, config, A, D, dt_bias):
        self.config, self.A, self.D, self.dt_bias = config, A.astype("float64"), D.astype("float64"), dt_bias
        self.states = np.zeros((config.slots, config.nheads, config.headdim, config.dstate))

    def after(self, slot, x, dt, B, C):
        """Return the outputs of some tokens of a slot, and the states after none, one, ... of them."""
        state = self.states[slot] if slot != PAD else np.zeros_like(self.states[0])
        outs, states = [], [state]
        for x_t, dt_t, B_t, C_t in zip(*(a.astype("float64") for a in (x, dt, B, C)), strict=True):
            step = np.log1p(np.exp(dt_t + self.dt_bias))
            B_t, C_t = (np.repeat(a, self.config.nheads // self.config.ngroups, axis=0) for a in (B_t, C_t))
            state = state * np.exp(self.A * step)[:, None, None]
            state = state + (step[:, None] * x_t)[..., None] * B_t[:, None]
            states.append(state)
            outs.append((state * C_t[:, None]).sum(-1) + self.D[:, None] * x_t)
        return np.array(outs).reshape(-1, *x.shape[1:]), states


def drawn(rng, config, *leading):
    """Return the inputs of tokens, (*leading, ...)."""
    sizes = {"x": (config.nheads, config.headdim), "dt": (config.nheads,)}
    sizes |= dict.fromkeys("BC", (config.ngroups, config.dstate))
    return {name: rng.standard_normal((*leading, *size)).astype(config.dtype) for name, size in sizes.items()}


def serve(config, mode, backend, seed=0, prompts="auto"):
    """Run a schedule, and assert that each step is right.

    Args:
        config: the server.
        mode, backend: as everywhere in the tests.
        seed: of the schedule.
        prompts: the backend that puts a new sequence's state into its checkpoint.
    """
    rng = np.random.default_rng(seed)
    A, D, dt_bias = -np.exp(rng.standard_normal(config.nheads)), *rng.standard_normal((2, config.nheads))
    parameters = {"A": A.astype("float32"), "D": D.astype("float32"), "dt_bias": dt_bias.astype("float32")}
    exact = Exact(config, *parameters.values())
    server = Server(config, mode, backend, prompts, parameters, rng)
    skip_if_refused(server.explain())
    held = np.full(config.sequences, PAD)
    for step in range(config.steps):
        joined = join(rng, config, held)
        if (joined >= 0).any():
            prompt = drawn(rng, config, config.sequences, 2)
            server.prompt(joined, prompt)
            for i, slot in enumerate(joined):
                if slot != PAD:
                    exact.states[slot] = 0
                    exact.states[slot] = exact.after(slot, *(prompt[name][i] for name in ("x", "dt", "B", "C")))[1][-1]
        lengths = counts(rng, config)
        accepted = np.array([rng.integers(0, n + 1) for n in lengths]) if rng.random() < 0.7 else None
        before = server.slots()
        tokens, edges = server.layout(rng, lengths)
        out = server.step(held, tokens, edges, lengths, accepted)
        for i, slot in enumerate(held):
            own = rows_of(config, i, edges)
            y, states = exact.after(slot, *(tokens[n].reshape(-1, *tokens[n].shape[-a:])[own] for n, a in AXES))
            np.testing.assert_allclose(
                out.reshape(-1, *out.shape[-2:])[own].astype("float64"),
                y,
                config.tolerance,
                config.tolerance,
                err_msg=f"step {step}",
            )
            if slot != PAD:
                exact.states[slot] = states[lengths[i] if accepted is None else accepted[i]]
        for name, (old, new) in {n: (a, server.slots()[n]) for n, a in before.items()}.items():
            unnamed = [slot for slot in range(config.slots) if slot not in held]
            np.testing.assert_array_equal(bits(new[unnamed]), bits(old[unnamed]), f"{name} of slots that nobody named")
        if step % 7 == 0 or step + 1 == config.steps:
            got = server.materialized(held)
            expected = np.array([exact.states[slot] if slot != PAD else 0 * exact.states[0] for slot in held])
            np.testing.assert_allclose(got, expected, config.tolerance, config.tolerance)


AXES = (("x", 2), ("dt", 1), ("B", 2), ("C", 2))


def join(rng, config, held):
    """Let some sequences leave ``held``, and others join in free slots; return the slots of those."""
    joined = np.full(config.sequences, PAD)
    for i in np.flatnonzero(rng.random(config.sequences) < (0.15 if (held >= 0).any() else 0.9)):
        free = [slot for slot in range(config.slots) if slot not in held]
        held[i] = joined[i] = rng.choice([PAD, *free], p=[0.25, *[0.75 / len(free)] * len(free)])
    return joined


def counts(rng, config):
    if config.layout == "packed":
        return rng.integers(0, config.tokens + 1, config.sequences)
    return np.full(config.sequences, 1 if config.layout == "single" else config.tokens)


def rows_of(config, i, edges):
    if edges is not None:
        return slice(edges[i], edges[i + 1])
    each = 1 if config.layout == "single" else config.tokens
    return slice(i * each, (i + 1) * each)


class Server:
    """The calls of a server, in a framework."""

    def __init__(self, config, mode, backend, prompts, parameters, rng):
        self.config, self.mode, self.backend, self.prompts = config, mode, backend, prompts
        self.side = frontend(framework(mode))
        self.parameters = to_mode(parameters, mode)
        state = np.zeros(
            (config.slots, config.nheads, config.headdim, config.dstate), config.state_dtype or config.dtype
        )
        state = to_mode({"state": state}, mode)["state"]
        sizes = (config.window, config.tokens)
        self.state = ssu_bridge.to_replay(state, *sizes, config.ngroups, config.dtype, config.dtype)
        # What is not pending may be anything.
        rings = [
            self.put(np.full(tuple(ring.shape), config.unused, self.side.to_host(ring).dtype))
            for ring in self.state[1:]
        ]
        self.state = ssu_bridge.ReplayState(state, *rings)
        first = self.put(rng.integers(0, sum(sizes), config.slots).astype("int32"))
        empty = ssu_bridge.ReplayCursor.empty(config.slots, *sizes, like=state)
        self.cursor = ssu_bridge.ReplayCursor(first, empty.pending, *sizes)

    def put(self, array):
        return next(iter(to_mode({"x": array}, self.mode).values()))

    def prompt(self, slots, tokens):
        """Put the states of new sequences into the checkpoints of their slots."""
        fresh = np.zeros(self.config.sequences, bool)
        given = to_mode({**tokens, "state_batch_indices": slots.astype("int32"), "has_initial_state": fresh}, self.mode)
        call = {**self.parameters, **given, "dt_softplus": True, "backend": self.prompts}
        _, checkpoint = ssu_bridge.update(self.state.checkpoint, **call)
        self.state = self.state._replace(checkpoint=checkpoint)
        self.cursor = ssu_bridge.reset_replay(self.cursor, given["state_batch_indices"])

    def layout(self, rng, lengths):
        """Draw the tokens of a step, with cu_seqlens if it is packed: rows of no sequence lie before and behind."""
        if self.config.layout != "packed":
            return drawn(
                rng, self.config, self.config.sequences, *[self.config.tokens] * (self.config.layout == "multi")
            ), None
        tokens = drawn(rng, self.config, self.config.sequences * self.config.tokens + 2)
        return tokens, np.cumsum([1, *lengths]).astype("int32")

    def step(self, slots, tokens, edges, lengths, accepted):
        """Take a step, and move the cursor on."""
        arrays = {**tokens, "state_batch_indices": slots.astype("int32")}
        arrays |= {} if edges is None else {"cu_seqlens": edges}
        counted = {} if accepted is None else {"num_accepted": self.put(accepted.astype("int32"))}
        given = to_mode(arrays, self.mode)
        by = {"cu_seqlens": given["cu_seqlens"]} if edges is not None else {"tokens": int(lengths[0])}
        if self.mode == "jax.jit":
            by = by if edges is not None else {}
            run = _jitted(self.backend, 0 if edges is not None else int(lengths[0]))
            out, self.state, self.cursor = run(self.state, self.cursor, {**self.parameters, **given}, counted, by)
        else:
            call = {**self.parameters, **given, "dt_softplus": True, "backend": self.backend}
            out, state = ssu_bridge.update(self.state, **call, replay=self.cursor)
            assert framework(self.mode) == "jax" or state is self.state
            self.state = state
            self.cursor = ssu_bridge.advance_replay(self.cursor, given["state_batch_indices"], **by, **counted)
        return self.side.to_host(out)

    def explain(self):
        """Return what backends say of a step."""
        tokens, edges = self.layout(np.random.default_rng(0), np.ones(self.config.sequences, int))
        arrays = {**tokens, "state_batch_indices": np.zeros(self.config.sequences, "int32")}
        arrays |= {} if edges is None else {"cu_seqlens": edges}
        call = {**self.parameters, **to_mode(arrays, self.mode), "dt_softplus": True, "backend": self.backend}
        return ssu_bridge.explain(self.state, **call, replay=self.cursor)

    def slots(self):
        """Copy all that has slots."""
        return to_host(unpaired({"state": self.state, "replay": self.cursor}), self.mode)

    def materialized(self, slots):
        index = self.put(slots.astype("int32"))
        return self.side.to_host(ssu_bridge.materialize(self.state, self.cursor, index, self.parameters["A"]))


@functools.cache
def _jitted(backend, tokens):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def run(state, cursor, given, counted, by):
        out, state = ssu_bridge.update(state, **given, dt_softplus=True, backend=backend, replay=cursor)
        by = by or {"tokens": tokens}
        cursor = ssu_bridge.advance_replay(cursor, given["state_batch_indices"], **by, **counted)
        return out, state, cursor

    return run
