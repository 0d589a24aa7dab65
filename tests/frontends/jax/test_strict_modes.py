"""JAX's strict modes: the calls, transforms and examples run in each, and give what they give without."""

import functools
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tvm_ffi
from copied import copied
from modes import to_mode
from small_models import random_weights, zero_states
from thinned import thinned

import share_state
import ssu_bridge
from mamba2_jax import initial, measure, model, train
from mamba2_jax.benchmark import compare
from mamba2_jax.config import Mamba2Config
from mamba2_jax.generate import decode, prefill
from mamba2_jax.sampling import Sampling
from mamba2_jax.scheduler import Scheduler, Sequence
from ssu_bridge import dispatch
from ssu_bridge.backends.flashinfer import backend as flashinfer
from ssu_bridge.backends.flashinfer import kernel as flashinfer_kernel
from ssu_bridge.frontends.jax import metadata, step_primitive
from ssu_bridge.testing.cases import Case

MODES = {
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "NaN": lambda: jax.debug_nans(True),
    "checks": lambda: jax.enable_checks(True),
    "leaks": lambda: jax.checking_leaks(),
    "x64": lambda: jax.enable_x64(True),
}
SMALL = {"sequences": 2, "slots": 3, "nheads": 2, "ngroups": 1, "headdim": 2, "dstate": 4, "indices": (2, 0)}
CASES = {
    "mixed": Case("mixed", **{**SMALL, "indices": None}, untied=("A", "dt", "D", "dt_bias"),
                  dtypes={"*": "bfloat16", "state": "float32", "A": "float32"}),
    "columns": Case("columns", **{**SMALL, "indices": ((2, 0), (0, 1))}, tokens=2, destinations=((2, 1), (0, -1)),
                    accepted=(2, 0)),
    "packed": Case("packed", **SMALL, tokens=4, cu_seqlens=(0, 3, 4), steps=2, entries=(1, 0)),
    "quantised": Case("quantised", **SMALL, dtypes={"state": "int8"}, seed=3),
}  # fmt: skip
BACKENDS = ("cpu", "xla", "reference", pytest.param("triton", marks=pytest.mark.gpu))


def run(case, backend):
    """Return what an eager call does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a state that was copied
        return ssu_bridge.update(**to_mode(case.arrays(2), "jax"), **case.flags, backend=backend)


def transformed(case, backend):
    """Return a call under the transforms that there are, each with its arguments."""
    rest = to_mode(case.arrays(2), "jax")
    state, x = rest.pop("state"), rest.pop("x")
    step = functools.partial(ssu_bridge.update, **case.flags, backend=backend)
    both = jax.tree.map(lambda array: jnp.stack([array, array]), (state, x))
    functions = [
        (lambda state, x: step(state, x, **rest), (state, x)),
        (jax.vmap(lambda state, x: step(state, x, **rest)), both),
        (lambda state, xs: jax.lax.scan(lambda s, x: step(s, x, **rest)[1::-1], state, xs), (state, both[1])),
    ]
    if backend == "xla":
        functions.append((jax.grad(lambda x: step(state, x, **rest)[0].astype("float32").sum()), (x,)))
        functions.append((lambda x: jax.jvp(lambda x: step(state, x, **rest)[0], (x,), (x,)), (x,)))
    return functions


def trace(functions, runs):
    """Lower functions to programs, and run them, too, if ``runs``."""
    for function, given in functions:
        jitted = jax.jit(function)
        jitted.lower(*given)
        if runs:
            jax.block_until_ready(jitted(*given))


# By default each case in one or two modes.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("mode", "case"), thinned(MODES, CASES, one_in=4))
def test_each_call_and_transform(mode, case, backend):
    expected = without_a_mode(case, backend)
    if expected is None:
        pytest.skip("refused without a mode, too")
    with MODES[mode]():
        got = run(CASES[case], backend)
        functions = [] if backend == "reference" else transformed(CASES[case], backend)
        # What JAX compiles of a program no mode changes, but one looks at what the program computes.
        trace(functions, runs=mode == "NaN" or case == "mixed")
    assert len(functions) == {"reference": 0, "xla": 5}.get(backend, 3)
    for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(*(np.array(a).astype("float32") for a in (one, other)), rtol=1e-6, atol=1e-6)


@functools.cache
def without_a_mode(case, backend):
    """Return the same outside of any mode, None for what a backend refuses."""
    arrays = to_mode(CASES[case].arrays(2), "jax")
    able = ssu_bridge.explain(**arrays, **CASES[case].flags, backend=backend).backend
    return None if able is None else run(CASES[case], backend)


@pytest.mark.parametrize("backend", ("cpu", "xla", pytest.param("triton", marks=pytest.mark.gpu)))
@pytest.mark.parametrize("mode", MODES)
def test_references(mode, backend):
    """Eager, jitted, in a scan that closes over one, and mapped."""
    rest = to_mode(CASES["mixed"].arrays(2), "jax")
    state = rest.pop("state")
    step = functools.partial(ssu_bridge.update, **rest, **CASES["mixed"].flags, backend=backend)
    expected = step(state, donate=False)
    with MODES[mode]():
        ref, both = jax.new_ref(state), jax.new_ref(jnp.stack([state, state]))
        out, same = step(ref)
        assert same is ref
        for one, other in zip((out, ref[...]), expected, strict=True):
            np.testing.assert_allclose(*(np.array(a).astype("float32") for a in (one, other)), rtol=1e-6, atol=1e-6)
        functions = [
            (lambda ref: step(ref)[0], (ref,)),
            (lambda ref: jax.lax.scan(lambda _, __: (None, step(ref)[0]), None, length=2)[1], (ref,)),
            (jax.vmap(lambda ref: step(ref)[0]), (both,)),
        ]
        trace(functions, runs=True)


LARGE = Case(
    "large", **{**SMALL, "headdim": 64, "dstate": 64}, dtypes={"*": "bfloat16", "state": "bfloat16", "A": "float32"}
)


@pytest.fixture
def with_a_gpu(monkeypatch):
    """The process seems to have a GPU and FlashInfer, whose function runs nothing."""
    gpu = SimpleNamespace(platform="gpu", compute_capability="9.0")
    monkeypatch.setattr(metadata, "_devices", lambda: [gpu])
    monkeypatch.setattr(step_primitive, "several_devices", lambda: False)
    monkeypatch.setattr(flashinfer.module, "missing", lambda: None)
    monkeypatch.setattr(flashinfer.module, "load", lambda module: tvm_ffi.convert(lambda *_: None))
    flashinfer_kernel.load.cache_clear()
    dispatch._chosen.cache_clear()
    yield
    flashinfer_kernel.load.cache_clear()
    dispatch._chosen.cache_clear()


@pytest.mark.parametrize("mode", MODES)
def test_programs_of_flashinfer_are_lowered(mode, with_a_gpu):
    """All of it that needs no GPU: tracing, the choice, the kernel's check, the call in the program."""
    with MODES[mode]():
        for function, given in transformed(LARGE, "flashinfer"):
            text = jax.jit(function).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
            assert "ssu_bridge.flashinfer(" in text


# By default each part of the examples in every third mode: one or two of the four in each mode.
IN_TURN = [pytest.mark.parametrize("mode", thinned(MODES, one_in=3, first=first)) for first in range(3)]
# Looking for NaNs, JAX donates nothing.
COPIES = pytest.mark.filterwarnings("ignore:.*the state was copied:RuntimeWarning")
TINY = Mamba2Config(256, 32, 1, num_heads=4, head_dim=16, state_size=8, n_groups=2, use_bias=True)


@IN_TURN[0]
def test_the_example_model_draws(mode):
    with MODES[mode]():
        weights = initial.random_weights(TINY, jax.random.key(0))
        states = model.zero_states(TINY, 3, "float32", "float32")
        tokens = jax.random.randint(jax.random.key(1), (3, 6), 0, 256)
        slots, keys = jnp.array([2]), jax.random.key(0)[None]
        progress = prefill(TINY, weights, states, tokens[:1], slots)
        drawn, _ = decode(TINY, weights, progress, slots, keys, count=2, sampling=Sampling())
    assert drawn.shape == (1, 2)
    assert ((drawn >= 0) & (drawn < 256)).all()


@IN_TURN[1]
def test_the_optimiser_takes_a_step(mode):
    with MODES[mode]():
        weights = random_weights(TINY, jax.random.key(0))
        zeros = jax.tree.map(jnp.zeros_like, weights)
        training = train.Training(weights, zeros, zeros, zero_states(TINY, 3, "float32", "float32"))
        streams = jax.random.randint(jax.random.key(1), (3, 12), 0, 256).astype("uint8")
        progress = jnp.array([0, 0.5, 2], jnp.float32)
        step = functools.partial(train.update.__wrapped__, TINY, length=6, peak=1e-3)
        trace([(step, (training, streams, progress, jax.random.key(2)))], runs=mode == "NaN")


@IN_TURN[2]
def test_the_scheduler_runs(mode):
    with MODES[mode]():
        batch = Scheduler(
            TINY, random_weights(TINY, jax.random.key(0)), width=2, slots=3, piece=2, prefixes=2, prefix_stride=8
        )
        requests = [Sequence([seed], 2, seed=seed) for seed in range(3)]
        for request in requests:
            batch.submit(request)
        assert len(list(batch.run())) == 6
    assert all(request.done for request in requests)


@COPIES
@IN_TURN[1]
def test_what_the_demo_compares(mode, monkeypatch):
    # Nor does JAX donate in the program; and the other modes find the programs that it kept then.
    monkeypatch.setattr(measure, "assert_no_copy_of_a_state", lambda *_: None)
    with MODES[mode]():
        assert compare(TINY, random_weights(TINY, jax.random.key(0)), batch=1, tokens=2, rounds=1)


@COPIES
@pytest.mark.parametrize("mode", MODES)
def test_a_state_is_shared_with_torch(mode):
    expected = share_state.in_jax(copied(share_state.CASE.arrays(0)["state"]), range(2))
    with MODES[mode]():
        state = copied(share_state.CASE.arrays(0)["state"])
        state = share_state.in_jax(share_state.in_torch(state, range(1)), range(1, 2))
    np.testing.assert_array_equal(state, expected)
