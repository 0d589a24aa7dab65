"""The matrix form of the xla backend: chunks by products of matrices, right against float64 wherever the loop is."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest
from contract import assert_step
from copied import copied, jax_array
from modes import int64_as_it_is, to_mode
from thinned import thinned

import ssu_bridge
from ssu_bridge.api import explain
from ssu_bridge.backends.xla import chunks
from ssu_bridge.backends.xla import forms as xla_forms
from ssu_bridge.testing.cases import CASES, Case
from ssu_bridge.testing.check import check

_TINY = {"nheads": 4, "headdim": 4, "dstate": 8, "ngroups": 2}
LONG = (
    Case("two chunks and a part", tokens=70, **_TINY),
    Case("bare, no softplus", tokens=33, absent=("D", "z", "dt_bias"), dt_softplus=False, indices=None, **_TINY),
    Case("bfloat16, untied D", tokens=40, dtypes={"state": "bfloat16", "*": "bfloat16"}, untied=("D",), **_TINY),
    Case("pads, fresh", tokens=40, indices=(4, -1, 2), has_initial_state=(False, True, True), **_TINY),
    Case("destinations", tokens=33, destinations=(1, 0, -1), **_TINY),
    Case("no update", tokens=33, disable_state_update=True, **_TINY),
    Case("no sequences", tokens=33, sequences=0, indices=(), **_TINY),
    Case("every tenth", tokens=33, steps=3, intermediate_stride=10, **_TINY),
    Case("every fiftieth, in two chunks each", tokens=130, steps=3, intermediate_stride=50, entries=(2, 6, 0), **_TINY),
    Case("every two hundredth of fewer", tokens=40, steps=1, intermediate_stride=200, **_TINY),
    Case("packed", tokens=150, cu_seqlens=(0, 100, 101, 150), **_TINY),
    Case("packed, rows of nobody", tokens=90, cu_seqlens=(7, 60, 60, 83), **_TINY),
    Case("packed, every twentieth", tokens=90, cu_seqlens=(0, 45, 45, 85), steps=2, intermediate_stride=20, **_TINY),
    Case("packed, every fiftieth", tokens=160, cu_seqlens=(0, 101, 110, 160), steps=2, intermediate_stride=50, **_TINY),
    Case("packed, backwards", tokens=60, sequences=5, indices=(4, 0, 2, 1, 3), cu_seqlens=(40, 60, 0, 25, 25, 33), **_TINY),
)  # fmt: skip


def forms(case):
    """Say what explain does of a case."""
    said = explain(**to_mode(case.arrays(1), "jax", case.window), **case.flags, backend="xla", algorithm="matrix")
    return said.choices[0].answers[0]


@pytest.fixture
def elsewhere(monkeypatch):
    """How devices compute that are no CPU."""
    monkeypatch.setattr(xla_forms, "_ONE_BY_ONE", ())
    monkeypatch.setattr(xla_forms, "_NEVER_SCANNED", ())
    jax.clear_caches()
    yield
    jax.clear_caches()


WAYS = ["one by one", "at once"]


@pytest.fixture(params=WAYS)
def chunks_of_a_device(request):
    """How a CPU computes chunks, and how other devices do."""
    if request.param == "at once":
        request.getfixturevalue("elsewhere")


# By default each case in one of the ways.
@pytest.mark.parametrize(
    ("chunks_of_a_device", "case"),
    thinned(WAYS, LONG, one_in=2),
    indirect=["chunks_of_a_device"],
    ids=lambda value: getattr(value, "name", value),
)
@pytest.mark.usefixtures("chunks_of_a_device")
def test_long_sequences(case):
    assert "matrix form" in forms(case).settings
    assert_step(case, case.arrays(seed=1), "jax.jit", "xla", algorithm="matrix")


@pytest.mark.gpu
@pytest.mark.parametrize("case", LONG, ids=lambda case: case.name)
def test_long_sequences_on_a_gpu(case):
    assert "matrix form" in forms(case).settings
    assert_step(case, case.arrays(seed=1), "jax.jit", "xla", algorithm="matrix")


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("name", ["two chunks and a part", "packed", "every fiftieth, in two chunks each"])
def test_a_few_chunks_at_a_time(name, monkeypatch):
    """Where not all fit into memory."""
    monkeypatch.setattr(xla_forms, "_MOST", {"cpu": 16})
    monkeypatch.setattr(chunks, "_AT_A_TIME", 100)
    case = next(case for case in LONG if case.name == name)
    assert_step(case, case.arrays(seed=1), "jax.jit", "xla", algorithm="matrix")


UNTIED = ("A", "dt", "D", "dt_bias")
SCANNED = (
    Case("mamba1", nheads=0, headdim=8, dstate=8, ngroups=1, group_axis=False, tokens=40),
    Case("mamba1, packed", nheads=0, headdim=8, dstate=8, ngroups=1, tokens=90, cu_seqlens=(0, 45, 45, 85)),
    Case("untied", tokens=70, untied=UNTIED, **_TINY),
    Case("bias untied", tokens=40, untied=("dt_bias",), **_TINY),
    Case("bfloat16, pads, fresh", tokens=40, indices=(4, -1, 2), has_initial_state=(False, True, True), untied=UNTIED,
         dtypes={"state": "bfloat16", "*": "bfloat16"}, **_TINY),
    Case("one channel", nheads=4, headdim=1, dstate=8, ngroups=2, tokens=40, untied=("A",)),
    Case("every tenth", tokens=33, steps=3, intermediate_stride=10, untied=UNTIED, **_TINY),
)  # fmt: skip


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    ("case", "size"), thinned(SCANNED, [64, 5], one_in=2), ids=lambda value: getattr(value, "name", value)
)
def test_parameters_that_are_not_tied_are_scanned(case, size, monkeypatch):
    """Where the states of so many tokens fit into memory."""
    sequences = case.sequences if case.cu_seqlens is None else 1
    elements = size * sequences * max(case.nheads, 1) * case.headdim * case.dstate
    monkeypatch.setattr(xla_forms, "_SCANNED_ELEMENTS", elements)
    arrays = case.arrays(seed=1)
    said = explain(**to_mode(arrays, "jax"), **case.flags, backend="xla").choices[0].answers[0]
    assert re.match(r"associative scan, \d+ tokens at a time$", said.settings)
    assert_step(case, arrays, "jax.jit", "xla")


@pytest.mark.usefixtures("elsewhere")
def test_what_is_not_scanned(monkeypatch):
    long = Case("long", tokens=70, untied=UNTIED, **_TINY)
    each = Case("each", tokens=33, steps=33, untied=UNTIED, **_TINY)
    assert settings(dataclasses.replace(long, tokens=15)) == "loop over the tokens: they are few"
    assert settings(long, algorithm="loop") == "loop over the tokens, as requested"
    assert settings(each).startswith("loop over the tokens: the matrix form has no state after every token")
    assert settings(long).startswith("associative scan")
    monkeypatch.setattr(xla_forms, "_NEVER_SCANNED", ("cpu",))
    assert settings(long).startswith("loop over the tokens: the matrix form takes parameters that are tied to the head")


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    "layout", [{"tokens": 64}, {"tokens": 192, "cu_seqlens": (0, 1, 100, 192)}], ids=["multi", "packed"]
)
def test_chunks_at_once_take_no_more_memory_than_a_limit(layout, monkeypatch):
    problem = explain(**to_mode(Case("many", **layout, **_TINY).arrays(1), "jax"), backend="xla").choices[0].problem
    chunking = xla_forms.chunking(problem)
    assert chunking.at_once
    chunks = sum(-(-n // chunking.size) for n in ([64] * 3 if "cu_seqlens" not in layout else [1, 99, 92]))
    monkeypatch.setattr(xla_forms, "_ELEMENTS_AT_ONCE", chunks * 4 * 4 * 8 - 1)
    assert not xla_forms.chunking(problem).at_once


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("case", [SCANNED[0], SCANNED[1], SCANNED[2]], ids=lambda case: case.name)
def test_gradients_of_the_scan_are_the_loop_s(case):
    arrays = to_mode(case.arrays(seed=1), "jax")
    floats = {name: array for name, array in arrays.items() if jnp.issubdtype(array.dtype, jnp.floating)}

    def loss(floats, algorithm):
        out, state = ssu_bridge.update(**{**arrays, **floats}, **case.flags, backend="xla", algorithm=algorithm)
        return jnp.sum(out * out) + jnp.sum(state * state)

    loop, scan = (jax.jit(jax.grad(functools.partial(loss, algorithm=a)))(floats) for a in ("loop", "auto"))
    for name, slope in loop.items():
        np.testing.assert_allclose(scan[name], slope, rtol=1e-4, atol=2e-6 * np.abs(slope).max(), err_msg=name)


MULTI = [case for case in CASES if (case.tokens or 0) > 1 and case.cu_seqlens is None and forms(case).refusal is None]


# Those of packed tokens take the matrix form in the contract's own tests.
@pytest.mark.parametrize("case", thinned(MULTI, one_in=3), ids=lambda case: case.name)
def test_the_cases_of_the_contract(case):
    arrays = case.arrays(seed=1)
    with int64_as_it_is(arrays):
        assert_step(case, arrays, "jax.jit", "xla", algorithm="matrix")


def test_a_sequence_is_not_touched_by_others_that_share_rows():
    """Others name the same rows again and again, and have more tokens together than there are rows."""
    case = Case("sharing", tokens=60, sequences=5, indices=(4, 0, 2, 1, 3), cu_seqlens=(0, 40, 0, 40, 40, 60), **_TINY)
    arrays = case.arrays(seed=1)
    run = functools.partial(ssu_bridge.update, **case.flags, backend="xla", algorithm="matrix")
    out, state = run(**to_mode(arrays, "jax"))
    tables = {"cu_seqlens": np.array([40, 60], "int32"), "state_batch_indices": np.array([3], "int32")}
    expected_out, expected_state = run(**to_mode({**arrays, **tables}, "jax"))
    np.testing.assert_allclose(out[40:], expected_out[40:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state[3], expected_state[3], rtol=1e-4, atol=1e-5)
    assert np.array_equal(state[5], arrays["state"][5])


@pytest.mark.usefixtures("chunks_of_a_device")
@pytest.mark.parametrize("algorithm", ["loop", "matrix"])
def test_rows_of_no_sequence_reach_nothing(algorithm):
    """NaN in them is in no output, no state and no gradient."""
    case = Case("nobody's", tokens=30, cu_seqlens=(3, 12, 12, 25), **_TINY)
    arrays = case.arrays(seed=1)
    for name in ("x", "dt", "B", "C", "z"):
        arrays[name][[0, 2, 25, 29]] = np.nan
    given = to_mode(arrays, "jax")
    floats = {name: given.pop(name) for name in ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")}

    @jax.jit
    @jax.grad
    def gradient(floats):
        results = ssu_bridge.update(**floats, **given, **case.flags, backend="xla", algorithm=algorithm)
        return sum(jnp.sum(result * result) for result in results)

    for name, slope in gradient(floats).items():
        assert np.isfinite(np.asarray(slope)).all(), name
        assert np.asarray(slope).any(), name


# --- Errors ---


def exact(arrays):
    """Compute outputs and states in float64."""
    a = {name: array.astype("float64") for name, array in arrays.items()}
    state, outs = a["state"], []
    for t in range(a["x"].shape[1]):
        d = np.logaddexp(0, a["dt"][:, t])
        state = state * np.exp(a["A"] * d)[..., None, None]
        state = state + (d[..., None] * a["x"][:, t])[..., None] * a["B"][:, t, :, None]
        outs.append((state * a["C"][:, t, :, None]).sum(-1))
    return np.stack(outs, 1), state


STEPS = {
    "usual": lambda rng, shape: rng.standard_normal(shape) - 4,
    "near 0": lambda rng, shape: np.full(shape, -9.2),
    "80": lambda rng, shape: np.full(shape, 80.0),
    # A sum over a chunk is large then, and the decays between the others have to come out of it.
    "now and then 80": lambda rng, shape: np.where(rng.random(shape) < 0.1, 80, rng.standard_normal(shape) - 7),
}


@pytest.mark.parametrize(
    ("chunks_of_a_device", "steps"), thinned(WAYS, STEPS, one_in=2), indirect=["chunks_of_a_device"]
)
@pytest.mark.usefixtures("chunks_of_a_device")
@pytest.mark.parametrize("tokens", [2, 16, 256, pytest.param(4096, marks=pytest.mark.nightly)])
def test_errors_are_at_most_twice_the_loop_s(tokens, steps, rng):
    errors = _errors(rng, tokens, steps, dstate=64)
    # jaxlib 0.10.0 adds up products of two or three rows term by term, which doubles their error.
    most = 4 if jaxlib.__version__ == "0.10.0" and tokens < 4 else 2
    assert all(one <= most * other for one, other in zip(errors["matrix"], errors["loop"], strict=True)), errors


def test_errors_of_long_sums(rng):
    """Of 256 terms that are added up one after another, the error is about twice the loop's, which adds in parts."""
    errors = _errors(rng, 256, "80", dstate=256)
    assert all(one <= 2 * other for one, other in zip(errors["matrix"], errors["loop"], strict=True)), errors


def _errors(rng, tokens, steps, dstate):
    """Return the errors of the output and of the state in each form, relative to their norms."""
    shapes = {"state": (4, 32, dstate), "x": (tokens, 4, 32), "B": (tokens, 1, dstate), "C": (tokens, 1, dstate)}
    arrays = {name: rng.standard_normal((1, *shape)) for name, shape in shapes.items()}
    arrays |= {"A": -np.array([1.0, 3.0, 7.0, 16.0]), "dt": STEPS[steps](rng, (1, tokens, 4))}
    arrays = {name: array.astype("float32") for name, array in arrays.items()}
    expected = exact(arrays)
    errors = {}
    for form in ("loop", "matrix"):
        run = jax.jit(functools.partial(ssu_bridge.update, dt_softplus=True, backend="xla", algorithm=form))
        errors[form] = [
            np.linalg.norm(np.asarray(got) - right) / np.linalg.norm(right)
            for got, right in zip(run(**arrays), expected, strict=True)
        ]
    return errors


@pytest.mark.usefixtures("chunks_of_a_device")
def test_large_steps_leave_nothing_and_no_nan():
    """The exponent of a decay may overflow float32 where the loop's result is finite."""
    case = Case("large", tokens=20, absent=("dt_bias",), **_TINY)
    arrays = case.arrays(seed=1)
    arrays["dt"][:, ::3] = 1e30
    arrays["A"][:] = -1e10
    arrays["x"][:, ::3] = 0
    given = to_mode(arrays, "jax")
    assert check(**given, **case.flags, backend="xla", algorithm="matrix")

    def total(floats):
        out, state = ssu_bridge.update(**{**given, **floats}, **case.flags, backend="xla", algorithm="matrix")
        return jnp.sum(out) + jnp.sum(state)

    for slope in jax.jit(jax.grad(total))({name: given[name] for name in ("state", "dt", "x", "B", "C")}).values():
        assert np.isfinite(slope).all()


# --- Gradients ---

STEP = 1e-30


def formula(a, lengths, weights, of_state):
    """Compute the weighted sum of packed sequences' outputs and states in any number type of NumPy."""
    total, row = 0, 0
    for sequence, length in enumerate(lengths):
        state = a["state"][sequence]
        for t in range(row, row + length):
            d = np.log1p(np.exp(a["dt"][t] + a["dt_bias"]))[:, None]
            state = state * np.exp(a["A"][:, None] * d)[..., None] + (d * a["x"][t])[..., None] * a["B"][t]
            y = (state * a["C"][t]).sum(-1) + a["D"][:, None] * a["x"][t]
            total = total + (weights[t] * y * a["z"][t] / (1 + np.exp(-a["z"][t]))).sum()
        total, row = total + (of_state[sequence] * state).sum(), row + length
    return total


# By default each form in one of the ways.
@pytest.mark.parametrize(
    ("chunks_of_a_device", "form"), thinned(WAYS, ["tokens", "packed"], one_in=2), indirect=["chunks_of_a_device"]
)
@pytest.mark.usefixtures("chunks_of_a_device")
def test_gradients_against_differences(form):
    """A difference is taken along the imaginary axis, where nothing cancels."""
    rng = np.random.default_rng(0)  # the same for all of them: how much a sum cancels depends on its numbers
    lengths = (36,) if form == "tokens" else (35, 1)
    case = Case("gradients", sequences=len(lengths), slots=len(lengths), indices=None, nheads=2, headdim=2, dstate=2,
                ngroups=1, tokens=36, cu_seqlens=None if form == "tokens" else (0, 35, 36))  # fmt: skip
    arrays = case.arrays(seed=3)
    arrays["dt"] = arrays["dt"].clip(-9, 9)
    edges = {name: arrays.pop(name) for name in ("cu_seqlens",) if name in arrays}
    weights, of_state = (rng.standard_normal(arrays[name].shape) for name in ("x", "state"))

    def loss(arrays):
        out, state = ssu_bridge.update(**arrays, **edges, dt_softplus=True, backend="xla", algorithm="matrix")
        return (out * weights).sum() + (state * of_state).sum()

    got = jax.jit(jax.grad(loss))(copied(arrays))
    rows = {n: a[0] if form == "tokens" and n in ("x", "dt", "B", "C", "z") else a for n, a in arrays.items()}
    wide = {name: array.astype(np.complex128) for name, array in rows.items()}
    weights = weights[0] if form == "tokens" else weights
    for name, array in wide.items():
        expected = np.empty(array.shape)
        for place in np.ndindex(expected.shape):
            moved = array.copy()
            moved[place] += 1j * STEP
            expected[place] = formula({**wide, name: moved}, lengths, weights, of_state).imag / STEP
        slope = np.array(got[name]).reshape(expected.shape)
        np.testing.assert_allclose(slope, expected, rtol=2e-5, atol=2e-6 * abs(expected).max(), err_msg=name)


@pytest.mark.usefixtures("chunks_of_a_device")
def test_forward_and_second_derivatives_agree():
    case = Case("derivatives", tokens=20, absent=("z",), indices=None, **_TINY)
    given = to_mode(case.arrays(seed=1), "jax")

    def loss(dt, algorithm):
        out, state = ssu_bridge.update(**{**given, "dt": dt}, **case.flags, backend="xla", algorithm=algorithm)
        return jnp.sum(out * out) + jnp.sum(state)

    for transform in (jax.grad, lambda f: lambda dt: jax.jvp(jax.grad(f), (dt,), (jnp.ones_like(dt),))[1]):
        one, other = (jax.jit(transform(functools.partial(loss, algorithm=a)))(given["dt"]) for a in ("loop", "matrix"))
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * abs(one).max())


# --- Transforms ---


@pytest.mark.parametrize(("packed", "backend"), thinned([False, True], ["xla", "auto"], one_in=2))
def test_mapped(packed, backend):
    """vmap of a call is a loop over calls; with auto the kernel's own rule, which makes one call of them."""
    case = Case("mapped", tokens=40, cu_seqlens=(5, 30, 30, 40) if packed else None, **_TINY)
    calls = [to_mode(case.arrays(seed), "jax") for seed in range(3)]
    shared = {name: calls[0][name] for name in ("A", "D", "dt_bias")}
    own = [{name: array for name, array in call.items() if name not in shared} for call in calls]
    run = functools.partial(ssu_bridge.update, **case.flags, backend=backend, algorithm="matrix", donate=False)
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *own)
    out, state = jax.jit(jax.vmap(lambda call: run(**call, **shared)))(stacked)
    for i, call in enumerate(own):
        expected_out, expected_state = run(**call, **shared)
        np.testing.assert_allclose(out[i], expected_out, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state[i], expected_state, rtol=1e-4, atol=1e-5)


def test_an_exported_program_leaves_the_tokens_open():
    case = Case("exported", tokens=40, **_TINY)
    (tokens,) = jax.export.symbolic_shape("t", constraints=["t >= 2"])
    arrays = to_mode(case.arrays(seed=1), "jax")
    kinds = {
        name: jax.ShapeDtypeStruct((a.shape[0], tokens, *a.shape[2:]) if a.shape[1:2] == (40,) else a.shape, a.dtype)
        for name, a in arrays.items()
    }
    run = functools.partial(ssu_bridge.update, **case.flags, backend="xla", algorithm="matrix")
    exported = jax.export.export(jax.jit(lambda arrays: run(**arrays)))(kinds)
    for length in (2, 40, 65):
        given = to_mode(Case("called", tokens=length, **_TINY).arrays(seed=2), "jax")
        for got, expected in zip(exported.call(given), run(**given), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


# --- Which form ---


def settings(case, **flags):
    answer = explain(**to_mode(case.arrays(1), "jax"), **case.flags, backend="xla", **flags).choices[0].answers[0]
    return answer.refusal or answer.settings


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (Case("one token"), ""),
        (Case("few", tokens=3), "loop over the tokens: they are few"),
        (Case("many", tokens=9), "matrix form, 9 tokens at a time"),
        (Case("more", tokens=33), "matrix form, 17 tokens at a time"),
        (Case("packed", tokens=9, cu_seqlens=(0, 4, 5, 9)), "matrix form, 8 tokens at a time"),
        (Case("untied", tokens=9, untied=("A",)), "loop over the tokens: .* tied to the head, and A is not"),
        (Case("stored", tokens=9, steps=9), "loop over the tokens: .* intermediate_stride k >= 8"),
        (Case("tree", tokens=9, steps=9, parents=((-1,) * 9,) * 3), "loop over the tokens: .* no trees .*"),
    ],
    ids=str,
)
def test_explain_names_the_form_and_why(case, said):
    assert re.fullmatch(said, settings(case))
    if said.startswith("loop") and "few" not in said:
        assert re.fullmatch(said.removeprefix("loop over the tokens: "), settings(case, algorithm="matrix"))
    if case.tokens:
        assert settings(case, algorithm="loop") == "loop over the tokens, as requested"


def test_a_packed_call_has_one_form_whatever_its_lengths():
    arrays = to_mode(Case("lengths", tokens=40, cu_seqlens=(0, 1, 2, 40)).arrays(1), "jax")
    step = jax.jit(functools.partial(ssu_bridge.update, backend="xla"))
    for edges in ((0, 1, 2, 40), (0, 13, 26, 40), (0, 0, 0, 1)):
        step(**{**arrays, "cu_seqlens": jax_array(edges, "int32")})
    assert step._cache_size() == 1


def test_auto_goes_on_to_xla_for_the_matrix_form_on_a_cpu():
    arrays = to_mode(Case("matrix", tokens=9).arrays(1), "jax")
    assert explain(**arrays, algorithm="matrix").backend == "xla"
    assert explain(**arrays).backend == "cpu"
