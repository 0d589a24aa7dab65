"""Sequences that share a cache: they join, fork, are rolled back, leave, are quantised, and move between frameworks.

Each has, to the bit, the outputs and the state of a sequence that is alone, in NumPy.
"""

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import ssu_bridge
from ssu_bridge import QuantizedState
from ssu_bridge.core.arrays import framework_of
from ssu_bridge.frontends.base import frontend as modules

SLOTS, H, P, N, G = 7, 2, 4, 16, 1
A, BIAS = -np.exp(np.linspace(-1, 1, H)).astype("float32"), np.linspace(-2, 0, H).astype("float32")
FRAMEWORKS = ("numpy", "torch", "jax")
SEEDS = st.integers(0, 2**31)


def over(function, state):
    """Apply a function to a state, or to both arrays of a quantised one."""
    return QuantizedState(*map(function, state)) if isinstance(state, QuantizedState) else function(state)


def converted(array, framework):
    """Return a copy of a NumPy array in a framework."""
    return modules(framework).from_host(np.array(array))


class Cache(RuleBasedStateMachine):
    """A server's cache, and the sequences that have slots in it."""

    @initialize(framework=st.sampled_from(FRAMEWORKS))
    def begin(self, framework):
        self.framework = framework
        self.state = converted(np.full((SLOTS, H, P, N), np.nan, "float32"), framework)
        # What each sequence is alone, by its slot; those that have no state yet.
        self.alone, self.new = {}, set()

    @property
    def free(self):
        return [slot for slot in range(SLOTS) if slot not in self.alone]

    @rule()
    @precondition(lambda self: self.free)
    def join(self):
        slot = self.free[0]
        self.alone[slot] = over(np.zeros_like, self.of_slot(slot))
        self.new.add(slot)

    @rule(data=st.data())
    @precondition(lambda self: self.alone)
    def leave(self, data):
        slot = data.draw(st.sampled_from(sorted(self.alone)))
        del self.alone[slot]
        self.new.discard(slot)

    @rule(data=st.data(), seed=SEEDS, tokens=st.sampled_from([None, 2]))
    @precondition(lambda self: self.alone)
    def step(self, data, seed, tokens):
        """Some of the sequences have tokens, in any order."""
        slots = data.draw(st.lists(st.sampled_from(sorted(self.alone)), unique=True, min_size=1, max_size=3))
        self.update(slots, seed, tokens)

    @rule(data=st.data(), seed=SEEDS)
    @precondition(lambda self: self.alone and self.free)
    def fork(self, data, seed):
        """A sequence goes on in another slot, and stays as it is in its own."""
        slot, target = data.draw(st.sampled_from(sorted(self.alone))), self.free[-1]
        before = over(np.copy, self.alone[slot])
        was_new = slot in self.new
        self.update([slot], seed, None, dst_state_batch_indices=np.array([target], "int32"))
        self.alone[target], self.alone[slot] = self.alone[slot], before
        self.new |= {slot} if was_new else set()

    @rule(data=st.data(), seed=SEEDS)
    @precondition(lambda self: self.alone and len(self.free) >= 2)
    def draft(self, data, seed):
        """Two tokens are stored in slots of their own, of which a number is accepted: the sequence is rolled back."""
        slot = data.draw(st.sampled_from(sorted(self.alone)))
        places, accepted = self.free[:2], data.draw(st.integers(0, 2))
        before, was_new = over(np.copy, self.alone[slot]), slot in self.new
        states = []
        self.update([slot], seed, 2, states, dst_state_batch_indices=np.array([places], "int32"))
        if accepted == 0:
            self.alone[slot] = before
            self.new |= {slot} if was_new else set()
            return
        del self.alone[slot]
        self.alone[places[accepted - 1]] = states[accepted - 1]

    @rule(dtype=st.sampled_from(["int16", "int8", "float8_e4m3fn"]))
    @precondition(lambda self: not isinstance(self.state, QuantizedState))
    def quantise(self, dtype):
        self.state = QuantizedState.quantize(self.state, dtype)
        self.alone = {slot: QuantizedState.quantize(state, dtype) for slot, state in self.alone.items()}

    @rule()
    @precondition(lambda self: isinstance(self.state, QuantizedState))
    def dequantise(self):
        self.state = self.state.dequantize()
        self.alone = {slot: state.dequantize() for slot, state in self.alone.items()}

    @rule(framework=st.sampled_from(FRAMEWORKS))
    def move(self, framework):
        """Between JAX and Torch without a copy, as far as DLPack has the dtype."""
        pair = (self.framework, framework)
        if pair == ("jax", "torch"):
            self.state = over(ssu_bridge.to_torch, self.state)
        elif pair == ("torch", "jax"):
            self.state = over(lambda tensor: ssu_bridge.to_jax(tensor.clone()), self.state)
        else:
            self.state = over(lambda array: converted(host(array), framework), self.state)
        self.framework = framework

    def update(self, slots, seed, tokens, states=None, **tables):
        """Run a call for all of the sequences, and one for each token of each that is alone."""
        rng = np.random.default_rng(seed)
        leading = (len(slots),) if tokens is None else (len(slots), tokens)
        sizes = {"x": (H, P), "dt": (H,), "B": (G, N), "C": (G, N)}
        drawn = {n: rng.standard_normal((*leading, *size)).astype("float32") for n, size in sizes.items()}
        has = np.array([slot not in self.new for slot in slots])
        tables |= {"state_batch_indices": np.array(slots, "int32"), "has_initial_state": has}
        given = {**drawn, "A": A, "dt_bias": BIAS, **tables}
        given = {name: converted(array, self.framework) for name, array in given.items()}
        out, self.state = ssu_bridge.update(self.state, **given, dt_softplus=True, backend="cpu", algorithm="loop")
        for i, slot in enumerate(slots):
            state = self.alone[slot]
            call = {n: array[i : i + 1] for n, array in drawn.items()}
            if states is not None:  # after each token, which starts from a float32 state here as there
                for t in range(tokens):
                    part = {n: array[:, : t + 1] for n, array in call.items()}
                    states.append(self.run(over(np.copy, state), part)[1])
            alone, self.alone[slot] = self.run(state, call)
            np.testing.assert_array_equal(host(out[i : i + 1]), alone)
        self.new -= set(slots)

    def run(self, state, call):
        return ssu_bridge.update(state, **call, A=A, dt_bias=BIAS, dt_softplus=True, backend="cpu", algorithm="loop")

    def of_slot(self, slot):
        return over(lambda array: host(array)[slot : slot + 1], self.state)

    @invariant()
    def every_sequence_has_its_own_state(self):
        for slot, state in getattr(self, "alone", {}).items():
            if slot not in self.new:
                for got, expected in zip(parts(self.of_slot(slot)), parts(state), strict=True):
                    assert got.tobytes() == expected.tobytes(), slot


def parts(state):
    return state if isinstance(state, QuantizedState) else (state,)


def host(array):
    """Return a NumPy copy."""
    return modules(framework_of(array)).to_host(array)


# JAX on a CPU copies what came from Torch.
TestCache = pytest.mark.filterwarnings("ignore:ssu_bridge. the state was copied")(Cache.TestCase)
TestCache.settings = settings(
    max_examples=15, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
