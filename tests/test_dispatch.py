"""The choice of a backend: refusals, what is not computed yet, explain, and what is logged."""

import dataclasses
import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from modes import PAIRS, bits, convert, to_host, to_mode

import ssu_bridge
from ssu_bridge import dispatch
from ssu_bridge.backends.base import DeviceKernel
from ssu_bridge.frontends.jax import ffi_targets, metadata
from ssu_bridge.testing.cases import Case
from ssu_bridge.testing.check import results_by_name

CASE = Case("choose", headdim=8, dstate=16)


def several_tokens(arrays):
    return {n: np.repeat(arrays[n][:, None], 2, axis=1) for n in ("x", "dt", "B", "C", "z")}


def quantized(arrays, dtype="int8"):
    return ssu_bridge.QuantizedState(arrays["state"].astype(dtype), np.ones(arrays["state"].shape[:3], "float32"))


# What backends refuse, as changes to a call, and what the refusal must name.
REFUSED = {
    "matrix": (several_tokens, r"matrix form of several tokens \(algorithm=\"matrix\"\)"),
    **{
        f"quantised {dtype}": (lambda a, d=dtype: {"state": quantized(a, d)}, "quantised states")
        for dtype in ("int16", "int8", "float8_e4m3fn")
    },
    "stochastic rounding": (
        lambda a: {"state": a["state"].astype("float16"), "rand_seed": np.array(3)},
        "stochastic rounding",
    ),
}
EACH = [*(pair for pair in PAIRS if pair[0] != "jax.lax.scan"), ("numpy", "auto"), ("torch", "auto"), ("jax", "auto")]


@pytest.mark.parametrize(
    ("what", "mode", "backend"),
    [
        *(("matrix", *pair) for pair in EACH if pair[1] == "cpu" or pair in (("numpy", "auto"), ("torch", "auto"))),
        *((what, m, "xla") for what in REFUSED if what != "matrix" for m in ("jax", "jax.jit")),
    ],
)
def test_refused_not_ignored(what, mode, backend):
    change, named = REFUSED[what]
    arrays = CASE.arrays(seed=1)
    arguments = convert({**arrays, **change(arrays)}, mode)
    before = to_host(arguments, mode)
    algorithm = {"matrix": "matrix"}.get(what, "auto")
    call = functools.partial(ssu_bridge.update, **CASE.flags, backend=backend, algorithm=algorithm)
    with pytest.raises(ssu_bridge.UnsupportedError, match=named):
        (jax.jit(call, donate_argnames="state") if mode == "jax.jit" else call)(**arguments)
    for name, after in to_host(arguments, mode).items():
        np.testing.assert_array_equal(bits(after), bits(before[name]))


@pytest.mark.parametrize(("mode", "backend"), [pair for pair in EACH if pair[1] != "reference"])
def test_one_token_satisfies_every_form(mode, backend):
    arrays = CASE.arrays(seed=1)
    for tokens in ({}, {n: arrays[n][:, None] for n in ("x", "dt", "B", "C", "z")}):
        call = functools.partial(ssu_bridge.update, **CASE.flags, backend=backend)
        results = [
            to_host(results_by_name(call(**convert({**arrays, **tokens}, mode), algorithm=form)), mode)
            for form in ("auto", "loop", "matrix")
        ]
        for name, value in results[0].items():
            for other in results[1:]:
                np.testing.assert_array_equal(bits(other[name]), bits(value))


@pytest.mark.parametrize("algorithm", ["loop", "simple", "vertical", "horizontal"])
@pytest.mark.parametrize(("mode", "backend"), [pair for pair in EACH if pair[1] != "reference"])
def test_the_form_that_a_backend_has_and_kernels_of_flashinfer(mode, backend, algorithm):
    arrays = {**CASE.arrays(seed=1), **several_tokens(CASE.arrays(seed=1))}
    call = functools.partial(ssu_bridge.update, **CASE.flags, backend=backend)
    auto, named = (
        to_host(results_by_name(call(**convert(arrays, mode), algorithm=a)), mode) for a in ("auto", algorithm)
    )
    for name, value in auto.items():
        np.testing.assert_array_equal(bits(named[name]), bits(value))


def test_the_reference_ignores_the_form():
    arrays = {**CASE.arrays(seed=1), **several_tokens(CASE.arrays(seed=1))}
    assert ssu_bridge.explain(**arrays, backend="reference", algorithm="matrix").backend == "reference"


def test_a_jax_key_is_a_seed():
    arrays = to_mode(Case("seed", dtypes={"state": "float16"}).arrays(seed=1), "jax")
    with pytest.raises(ssu_bridge.UnsupportedError, match="stochastic rounding"):
        ssu_bridge.update(**arrays, rand_seed=jax.random.key(3), backend="xla")


def test_xla_refuses_other_arrays_and_says_who_can():
    arrays = CASE.arrays(seed=2)
    for mode in ("numpy", "torch"):
        with pytest.raises(
            ssu_bridge.UnsupportedError, match=r"xla: it runs on JAX.*supported by backend='cpu' or 'reference'"
        ):
            ssu_bridge.update(**to_mode(arrays, mode), backend="xla")


def test_the_reference_refuses_tracing():
    arrays = to_mode(CASE.arrays(seed=2), "jax")
    with pytest.raises(
        ssu_bridge.UnsupportedError, match="reference: .*cannot be traced.*supported by backend='cpu' or 'xla'"
    ):
        jax.jit(functools.partial(ssu_bridge.update, backend="reference"))(**arrays)


def test_jax_arrays_without_jax_tvm_ffi(monkeypatch):
    arrays = to_mode(Case("no ffi", headdim=4).arrays(seed=2), "jax")
    find_spec = dispatch.module("cpu").missing_jax_ffi.__globals__["importlib"].util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n: None if n == "jax_tvm_ffi" else find_spec(n))
    with pytest.raises(ssu_bridge.BackendNotAvailableError, match="pip install jax-tvm-ffi"):
        ssu_bridge.update(**arrays, backend="cpu")
    explanation = ssu_bridge.explain(**arrays)
    assert explanation.backend == "xla"
    assert "jax-tvm-ffi, which is not installed" in str(explanation)
    jax.clear_caches()
    outs, _ = jax.jit(jax.vmap(lambda x: ssu_bridge.update(**{**arrays, "x": x})))(np.stack([arrays["x"]] * 2))
    assert np.isfinite(outs).all()


def test_explain_runs_nothing_and_reads_as_a_table():
    arrays = CASE.arrays(seed=3)
    state = arrays["state"].copy()
    text = str(ssu_bridge.explain(**arrays, **CASE.flags))
    assert text.splitlines()[0] == "on cpu, requested auto:"
    assert "cpu         selected, the first that supports the call" in text
    assert "xla         not supported: it runs on JAX arrays only" in text
    np.testing.assert_array_equal(bits(arrays["state"]), bits(state))
    refused = ssu_bridge.explain(**{**arrays, **several_tokens(arrays)}, algorithm="matrix")
    assert refused.backend is None
    assert re.search("not supported: it does not support the matrix form of several tokens", str(refused))


def test_explain_while_tracing_answers_for_each_platform():
    explanations = []

    @jax.jit
    def run(arrays):
        explanations.append(ssu_bridge.explain(**arrays))
        return ssu_bridge.update(**arrays)

    run(to_mode(CASE.arrays(seed=3), "jax"))
    assert [choice.problem.platform for choice in explanations[0].choices] == list(
        dict.fromkeys([jax.default_backend(), "cpu"])
    )
    assert explanations[0].choices[-1].backend == "cpu"


def test_falling_through_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "_logged", set())
    monkeypatch.setattr(dispatch.module("cpu"), "refusal", lambda problem: "not today")
    arrays = CASE.arrays(seed=4)
    with caplog.at_level(logging.INFO, logger="ssu_bridge"):
        for pad in (-5, -6, -7):
            # A function of its own each time: what is compiled here must not be found by others.
            out, _ = jax.jit(lambda arrays, pad=pad: ssu_bridge.update(**arrays, pad_slot_id=pad))(
                to_mode(arrays, "jax")
            )
    messages = [record.getMessage() for record in caplog.records]
    assert messages.count("backend cpu passed over for xla: not today") == 1
    assert len(messages) == len(set(messages))
    expected, _ = ssu_bridge.update(**to_mode(arrays, "jax"), backend="xla")
    np.testing.assert_array_equal(np.array(out), np.array(expected))


def test_a_refusal_is_logged_to_users_once_whatever_the_sizes(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "_logged", set())
    monkeypatch.setattr(dispatch.module("cpu"), "refusal", lambda problem: f"no batch of {problem.sequences}")
    with caplog.at_level(logging.DEBUG, logger="ssu_bridge"):
        for sequences in range(1, 5):
            arrays = Case("logged", sequences=sequences, indices=tuple(range(sequences))).arrays(seed=0)
            jax.jit(lambda arrays: ssu_bridge.update(**arrays)).trace(to_mode(arrays, "jax")).lower()
    said = [(r.levelname, r.getMessage()) for r in caplog.records if "cpu passed over for xla" in r.getMessage()]
    levels = ["INFO", "DEBUG", "DEBUG", "DEBUG"]
    assert said == [(level, f"backend cpu passed over for xla: no batch of {n}") for n, level in enumerate(levels, 1)]
    assert len(dispatch._logged) <= len(dispatch.BACKENDS) ** 2


UNUSED = {"strict_in_place": True, "algorithm": "vertical", "triton_tile": (16, 4), "philox_rounds": 7}


@pytest.fixture
def compilations():
    """A list that grows by one whenever XLA compiles a program."""
    found = []

    def listen(name, seconds, **_):
        if name.endswith("backend_compile_duration"):
            found.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="on a GPU some of these fields are used")
@pytest.mark.parametrize("backend", ["cpu", "xla", "auto"])
def test_a_field_that_no_backend_uses_compiles_nothing(backend, compilations):
    arrays = Case("unused", headdim=4, dstate=8, pad_slot_id=-909).arrays(seed=1)
    ssu_bridge.update(**to_mode(arrays, "jax"), pad_slot_id=-909, backend=backend)
    assert compilations
    for field, value in UNUSED.items():
        given = to_mode(arrays, "jax")  # which compiles some of JAX's own programs
        before = len(compilations), ffi_targets.registered()
        with ssu_bridge.using(**{field: value}):
            ssu_bridge.update(**given, pad_slot_id=-909, backend=backend)
        assert (len(compilations), ffi_targets.registered()) == before, field


def test_philox_rounds_are_used_with_a_seed():
    arrays = Case("rounds", headdim=4, dstate=8, dtypes={"state": "float16"}).arrays(seed=1)
    states = []
    for rounds in (7, 10):
        with ssu_bridge.using(philox_rounds=rounds):
            _, state = ssu_bridge.update(**to_mode(arrays, "jax"), rand_seed=jax.random.key(3), backend="cpu")
        states.append(np.array(state))
    assert (states[0] != states[1]).any()


def test_each_backend_names_its_programs_by_the_fields_that_it_uses():
    fields = {field: value for field, value in UNUSED.items() if field != "philox_rounds"}
    for backend in ("cpu", "triton", "flashinfer"):
        problem = ssu_bridge.explain(**CASE.arrays(seed=1)).choices[0].problem
        config = ssu_bridge.SSUConfig(backend, **fields)
        problem = dataclasses.replace(problem, options=dataclasses.replace(problem.options, config=config))
        name = ffi_targets.spell(DeviceKernel(f"ssu_bridge.{backend}(x)", None, print), problem)
        assert ("algorithm=vertical" in name) == (backend in ("triton", "flashinfer"))
        assert ("tile=16,4" in name) == (backend == "triton")
        call = ffi_targets.parse(name)
        assert call.kernel == f"ssu_bridge.{backend}(x)"
        assert call.options.config.backend == backend


@pytest.mark.parametrize("backend", ["auto", "cpu", "xla"])
def test_a_first_jax_call_describes_and_chooses_once(monkeypatch, backend):
    arrays = to_mode(Case("once", headdim=4, dstate=8, pad_slot_id=-919).arrays(seed=1), "jax")
    described, considered = [], []
    describe, consider = metadata.describe, dispatch.consider_problem
    monkeypatch.setattr(metadata, "describe", lambda *a, **k: described.append(a) or describe(*a, **k))
    monkeypatch.setattr(dispatch, "consider_problem", lambda problem: considered.append(problem) or consider(problem))
    ssu_bridge.update(**arrays, pad_slot_id=-919, backend=backend)
    assert len(described) == 1
    assert len(considered) == 1


def test_the_table_of_targets_has_an_end(monkeypatch):
    arrays = to_mode(Case("full", pad_slot_id=-77).arrays(seed=5), "jax")
    monkeypatch.setattr(ffi_targets, "CAPACITY", 0)
    message = r'^0 kernels are registered .*pad=-77.* is another.*vary fewer of them, or pass backend="xla"'
    with pytest.raises(ssu_bridge.TooManyKernelsError, match=message):
        ssu_bridge.update(**arrays, pad_slot_id=-77)
    assert not arrays["state"].is_deleted()


def test_one_target_serves_all_sizes_and_dtypes():
    before = len(ffi_targets.registered())
    for sequences, dtype in ((1, "float32"), (2, "bfloat16"), (3, "float16")):
        case = Case("sizes", sequences=sequences, indices=tuple(range(sequences)), dtypes={"state": dtype, "*": dtype})
        ssu_bridge.update(**to_mode(case.arrays(seed=6), "jax"), pad_slot_id=-4321)
    assert len(ffi_targets.registered()) == before + 1


def gradient_case():
    arrays = to_mode(Case("gradient", headdim=2, dstate=3, ngroups=1, nheads=2).arrays(seed=8), "jax")
    return {name: value for name, value in arrays.items() if name != "state_batch_indices"}, arrays[
        "state_batch_indices"
    ]


def test_xla_is_differentiable():
    floats, indices = gradient_case()

    @jax.jit
    def loss(floats):
        floats = jax.tree.map(jnp.asarray, floats)  # finite differences come as NumPy arrays
        out, state = ssu_bridge.update(
            **floats, state_batch_indices=indices, dt_softplus=True, backend="xla", donate=False
        )
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(state))

    with jax.enable_x64(False):
        check_grads(loss, (floats,), order=1, modes=("fwd", "rev"), rtol=2e-2, atol=2e-2, eps=1e-2)


@pytest.mark.parametrize(
    "form",
    [
        {"tokens": 2, "steps": 2, "entries": (1, 0, 3)},
        {"tokens": 2, "destinations": ((1, 3), (0, -1), (5, 2))},
        {"tokens": 4, "cu_seqlens": (0, 2, 2, 4), "steps": 2},
    ],
    ids=["intermediates", "destinations", "packed"],
)
@pytest.mark.nightly  # gradients of chunks are compared with differences by default, too
def test_xla_is_differentiable_over_tokens(form):
    case = Case("gradient", headdim=2, dstate=3, ngroups=1, nheads=2, **form)
    arrays = to_mode(case.arrays(seed=8), "jax")
    tables = {name: array for name, array in arrays.items() if not jnp.issubdtype(array.dtype, jnp.floating)}
    floats = {name: array for name, array in arrays.items() if name not in tables}

    @jax.jit
    def loss(floats):
        floats = jax.tree.map(jnp.asarray, floats)
        results = ssu_bridge.update(**floats, **tables, dt_softplus=True, backend="xla", donate=False)
        return sum(jnp.sum(jnp.sin((i + 1) * result)) for i, result in enumerate(results))

    with jax.enable_x64(False):
        check_grads(loss, (floats,), order=1, modes=("fwd", "rev"), rtol=2e-2, atol=2e-2, eps=1e-2)


@pytest.mark.parametrize("backend", ["cpu", "xla"])
def test_a_state_that_a_jitted_function_closes_over_is_not_donated(backend):
    arrays = to_mode({**CASE.arrays(seed=9), "dt": np.full((3, 4), 0.1, "float32")}, "jax")
    state, x = arrays.pop("state"), arrays.pop("x")
    expected, _ = ssu_bridge.update(state, x, **arrays, donate=False, backend=backend)

    @jax.jit
    def run(x):
        return ssu_bridge.update(state, x, **arrays, backend=backend)[0]

    for _ in range(2):
        np.testing.assert_allclose(run(x), expected, rtol=1e-5, atol=1e-5)
    assert not state.is_deleted()
