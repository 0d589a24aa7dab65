"""Whose memory the new state has, in each framework, and what happens where JAX cannot donate."""

import functools
import importlib
import warnings

import jax
import numpy as np
import pytest
import torch
from copied import copied
from modes import address, bits, to_host, to_mode

import ssu_bridge
from ssu_bridge.api import explain
from ssu_bridge.backends import reference
from ssu_bridge.core.arrays import framework_of
from ssu_bridge.frontends.jax import eager
from ssu_bridge.testing.cases import Case
from ssu_bridge.testing.check import compare

CASE = Case("in place", headdim=8, dstate=16)
IN_PLACE_BACKENDS = ("cpu", "xla")


@pytest.fixture
def arrays():
    return CASE.arrays(seed=7)


def jax_args(arrays):
    given = to_mode(arrays, "jax")
    return given.pop("state"), given


@pytest.fixture
def _warn_again(monkeypatch):
    monkeypatch.setattr(eager, "_warned", False)


@pytest.mark.parametrize("backend", IN_PLACE_BACKENDS)
def test_eager_jax_steps_stay_in_one_place(arrays, backend):
    state, rest = jax_args(arrays)
    before, expected = address(state), arrays["state"].copy()
    for _ in range(4):
        old = state
        out, state = ssu_bridge.update(state, **rest, **CASE.flags, backend=backend)
        assert old.is_deleted()
        assert address(state) == before
        exact_out, expected = ssu_bridge.update(expected, *list(arrays.values())[1:9], **table(arrays), **CASE.flags)
        np.testing.assert_allclose(out, exact_out, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(state, expected, rtol=1e-5, atol=1e-5)


def test_an_output_of_the_shape_of_scales_does_not_take_their_memory():
    case = Case("alike", sequences=6, slots=6, indices=None, headdim=8, dstate=16, dtypes={"state": "int8"})
    given = to_mode(case.arrays(seed=7), "jax")
    before = [address(array) for array in given["state"]]
    for _ in range(2):
        out, given["state"] = ssu_bridge.update(**given, **case.flags)
        assert out.shape == given["state"].scale.shape
        assert [address(array) for array in given["state"]] == before


def table(arrays):
    return {"state_batch_indices": arrays["state_batch_indices"]}


@pytest.mark.parametrize("backend", ("cpu", "xla", "reference"))
def test_eager_jax_without_donation_leaves_the_old_state(arrays, backend):
    state, rest = jax_args(arrays)
    _, new = ssu_bridge.update(state, **rest, **CASE.flags, backend=backend, donate=False)
    assert address(new) != address(state)
    np.testing.assert_array_equal(bits(np.array(state)), bits(arrays["state"]))
    assert not np.array_equal(np.array(new), arrays["state"])


def test_the_reference_deletes_the_old_state_too(arrays):
    state, rest = jax_args(arrays)
    ssu_bridge.update(state, **rest, **CASE.flags, backend="reference")
    assert state.is_deleted()


@pytest.mark.parametrize("backend", IN_PLACE_BACKENDS)
def test_jit_without_donation_leaves_the_old_state(arrays, backend):
    state, rest = jax_args(arrays)
    jax.jit(functools.partial(ssu_bridge.update, **CASE.flags, backend=backend))(state, **rest)
    np.testing.assert_array_equal(bits(np.array(state)), bits(arrays["state"]))


@pytest.mark.parametrize("backend", IN_PLACE_BACKENDS)
def test_a_donated_scan_over_a_tuple_of_states_copies_none(backend):
    case = Case("scan", slots=64, nheads=8, headdim=64, dstate=64)
    arrays = case.arrays(seed=3)
    states = tuple(copied(arrays["state"]) for _ in range(3))
    rest = to_mode({name: array for name, array in arrays.items() if name != "state"}, "jax")

    @functools.partial(jax.jit, donate_argnums=0)
    def decode(states, rest):
        def body(states, _):
            outs, states = zip(
                *[ssu_bridge.update(s, **rest, **case.flags, backend=backend) for s in states], strict=True
            )
            return states, outs[-1]

        return jax.lax.scan(body, states, None, length=5)

    before = [address(state) for state in states]
    memory = decode.lower(states, rest).compile().memory_analysis()
    assert memory.temp_size_in_bytes < arrays["state"].nbytes
    assert memory.alias_size_in_bytes == 3 * arrays["state"].nbytes
    states, _ = decode(states, rest)
    assert [address(state) for state in states] == before


@pytest.mark.usefixtures("_warn_again")
@pytest.mark.parametrize("view_of", (np.asarray, ssu_bridge.to_torch))
@pytest.mark.parametrize("steps_before", (0, 1, 2))
def test_a_live_view_keeps_jax_from_donating_and_that_is_said_once(arrays, steps_before, view_of):
    state, rest = jax_args(arrays)
    for _ in range(steps_before):
        _, state = ssu_bridge.update(state, **rest, **CASE.flags)
    before, view = np.array(state), view_of(state)
    with pytest.warns(RuntimeWarning, match="the state was copied.*still views"):
        _, new = ssu_bridge.update(state, **rest, **CASE.flags)
    assert address(new) != address(view)
    viewed = to_host({"state": view}, framework_of(view))["state"]
    np.testing.assert_array_equal(bits(viewed), bits(before))
    view = np.asarray(new)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ssu_bridge.update(new, **rest, **CASE.flags)


def test_strict_in_place_raises_and_hands_the_results_over(arrays):
    state, rest = jax_args(arrays)
    view = np.asarray(state)
    problem = explain(state, **rest, **CASE.flags).choices[0].problem
    with (
        ssu_bridge.using(strict_in_place=True),
        pytest.raises(ssu_bridge.NotInPlaceError, match="state: the state was copied") as caught,
    ):
        ssu_bridge.update(state, **rest, **CASE.flags)
    after = dict(zip(("out", "state"), map(np.array, caught.value.results), strict=True))
    assert all(row.passed for row in compare(reference.compute(problem, arrays), arrays, after))
    np.testing.assert_array_equal(bits(view), bits(arrays["state"]))


@pytest.mark.usefixtures("_warn_again")
def test_foreign_memory_is_not_donated(arrays):
    _, rest = jax_args(arrays)
    tensor = torch.from_numpy(arrays["state"]).clone()
    with pytest.warns(RuntimeWarning, match="did not allocate"):
        _, new = ssu_bridge.update(ssu_bridge.to_jax(tensor), **rest, **CASE.flags)
    assert address(new) != tensor.data_ptr()
    np.testing.assert_array_equal(bits(tensor.numpy()), bits(arrays["state"]))


@pytest.mark.gpu
@pytest.mark.usefixtures("_warn_again")
@pytest.mark.parametrize("steps_before", (0, 1))
def test_on_a_gpu_a_live_view_makes_a_copy_too(arrays, steps_before):
    state, rest = jax_args(arrays)
    for _ in range(steps_before):
        _, state = ssu_bridge.update(state, **rest, **CASE.flags)
    before, view = np.array(state), ssu_bridge.to_torch(state)
    problem = explain(state, **rest, **CASE.flags).choices[0].problem
    with pytest.warns(RuntimeWarning, match="the state was copied.*still views"):
        out, new = ssu_bridge.update(state, **rest, **CASE.flags)
    arrays = {**arrays, "state": before}
    after = {"out": np.array(out), "state": np.array(new)}
    assert all(row.passed for row in compare(reference.compute(problem, arrays), arrays, after))
    assert address(new) != address(view)
    np.testing.assert_array_equal(bits(view.cpu().numpy()), bits(before))
    np.testing.assert_array_equal(bits(np.array(state)), bits(before))  # alive still, as on a CPU
    with ssu_bridge.using(strict_in_place=True), pytest.raises(ssu_bridge.NotInPlaceError):
        ssu_bridge.update(state, **rest, **CASE.flags)


@pytest.mark.gpu
def test_on_a_gpu_foreign_memory_is_updated_in_place(arrays):
    _, rest = jax_args(arrays)
    tensor = torch.from_numpy(arrays["state"]).cuda()
    place, held = tensor.data_ptr(), torch.cuda.memory_allocated()
    state = ssu_bridge.to_jax(tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            _, state = ssu_bridge.update(state, **rest, **CASE.flags)
    assert address(state) == place
    after = np.array(state)
    np.testing.assert_array_equal(bits(tensor.cpu().numpy()), bits(after))
    del tensor
    assert torch.cuda.memory_allocated() == held  # the state's
    spoiler = torch.full((2**20,), float("nan"), device="cuda")
    np.testing.assert_array_equal(bits(np.array(state)), bits(after))
    held = torch.cuda.memory_allocated()
    del state
    assert torch.cuda.memory_allocated() < held
    assert spoiler.isnan().all()


DRAFTS = Case("drafts", headdim=8, dstate=16, tokens=3, steps=3)


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_without_donation_nothing_that_was_given_changes(backend):
    arrays = DRAFTS.arrays(seed=7)
    given = to_mode(arrays, "jax")
    results = ssu_bridge.update(**given, **DRAFTS.flags, backend=backend, donate=False)
    assert len(results) == 3
    for name, array in given.items():
        np.testing.assert_array_equal(bits(np.array(array)), bits(arrays[name]), err_msg=name)
    assert not np.array_equal(results[2], arrays["intermediate_states"])


@pytest.mark.parametrize(
    ("mode", "backend"), [("numpy", "reference"), ("torch", "reference"), ("jax", "reference"), ("jax", "xla")]
)
def test_a_state_that_is_only_read_comes_back_as_it_is(mode, backend):
    arrays = DRAFTS.arrays(seed=7)
    given = to_mode(arrays, mode)
    flags = {**DRAFTS.flags, "disable_state_update": True, "backend": backend}
    _, state, steps = ssu_bridge.update(**given, **flags)
    assert state is given["state"]
    host = to_host({"state": state, "steps": steps}, mode)
    np.testing.assert_array_equal(bits(host["state"]), bits(arrays["state"]))
    assert not np.array_equal(host["steps"], arrays["intermediate_states"])
    if mode == "jax":
        assert given["intermediate_states"].is_deleted()
        ssu_bridge.update(**{**given, "intermediate_states": steps}, **flags)  # it was not given up
    elif mode == "numpy":
        arrays["state"].setflags(write=False)
        ssu_bridge.update(**arrays, **flags)


@pytest.mark.parametrize("mode", ["numpy", "torch", "jax"])
def test_a_quantised_state_comes_back_as_one(mode):
    case = Case("quantised", headdim=8, dstate=16, steps=1, dtypes={"state": "int8"})
    known = importlib.import_module("ssu_bridge.api")._launchers
    known.clear()
    given = to_mode(case.arrays(seed=7), mode)
    _, state, steps = ssu_bridge.update(**given, **case.flags, backend="reference")
    for new, old in ((state, given["state"]), (steps, given["intermediate_states"])):
        assert isinstance(new, ssu_bridge.QuantizedState)
        assert (new is old) == (mode != "jax")
        assert mode != "jax" or (old.values.is_deleted() and old.scale.is_deleted())
    again = {**given, "state": state, "intermediate_states": steps}
    ssu_bridge.update(**again, **case.flags, backend="reference")
    assert len(known) == 1  # looked up, like any call


def test_what_jax_gives_up_is_given_once():
    case = Case("twice", sequences=2, slots=2, indices=None, dtypes={"state": "int8"})
    arrays = to_mode(case.arrays(seed=6), "jax")
    arrays["x"] = arrays["state"].scale
    with pytest.raises(ValueError, match="x: expected an array of its own, got state_scale, which is given up"):
        ssu_bridge.update(**arrays, **case.flags)
    assert not arrays["x"].is_deleted()
    plain = to_mode(CASE.arrays(seed=6), "jax")
    ssu_bridge.update(**{**plain, "z": plain["x"]}, **CASE.flags)  # what is only read may be given twice


def strided(array, gap):
    """Copy an array into one with a gap of poison behind each entry of its first axis; return both."""
    width = array[0].numel()
    whole = torch.full((len(array), width + gap), -123.0, dtype=array.dtype)
    view = whole[:, :width].view(array.shape)
    view.copy_(array)
    return view, whole


def test_torch_strided_arguments(arrays):
    tensors = to_mode(arrays, "torch")
    views, wholes = {}, {}
    for name in ("state", "x", "B", "C", "z", "dt"):
        views[name], wholes[name] = strided(tensors[name], gap=24)
    out, out_whole = strided(torch.full_like(tensors["x"], float("nan")), gap=8)
    gaps = {name: whole.clone() for name, whole in wholes.items()}
    dense_out, dense_state = ssu_bridge.update(**to_mode(arrays, "torch"), **CASE.flags)

    got, state = ssu_bridge.update(**{**tensors, **views}, **CASE.flags, out=out)
    assert got is out
    assert state is views["state"]
    torch.testing.assert_close(out, dense_out, rtol=0, atol=0)
    torch.testing.assert_close(state, dense_state, rtol=0, atol=0)
    assert (out_whole[:, -8:] == -123.0).all()
    for name, whole in wholes.items():
        same = whole[:, -24:] if name == "state" else whole
        torch.testing.assert_close(same, gaps[name][:, -24:] if name == "state" else gaps[name], rtol=0, atol=0)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_torch_expanded_views_are_tied(arrays, backend):
    heads, headdim, dstate = arrays["state"].shape[1:]
    tensors = to_mode(arrays, "torch")
    expected = ssu_bridge.update(**to_mode(arrays, "torch"), **CASE.flags, backend=backend)
    tensors["A"] = tensors["A"][:, None, None].expand(heads, headdim, dstate)
    tensors["dt"] = tensors["dt"][..., None].expand(-1, heads, headdim)
    for name in ("D", "dt_bias"):
        tensors[name] = tensors[name][:, None].expand(heads, headdim)
    problem = explain(**tensors, **CASE.flags).choices[0].problem
    assert problem.tied == ("dt", "A", "D", "dt_bias")
    got = ssu_bridge.update(**tensors, **CASE.flags, backend=backend)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("expanded", [False, True])
def test_gaps_between_the_tokens_of_a_tied_view_are_told(expanded):
    case = Case("tokens", tokens=3)
    tensors = to_mode(case.arrays(seed=2), "torch")
    dense = tensors["dt"].contiguous()
    spread = torch.stack((dense, dense), dim=2)[:, :, 0]
    for dt, strided in ((dense, ()), (spread, ("dt",))):
        dt = dt[..., None].expand(*dt.shape, case.headdim) if expanded else dt
        problem = explain(**{**tensors, "dt": dt}, **case.flags).choices[0].problem
        assert "dt" in problem.tied
        assert problem.strided == strided


def test_torch_bumps_the_version_counter(arrays):
    tensors = to_mode(arrays, "torch")
    out = torch.empty_like(tensors["x"])
    versions = out._version, tensors["state"]._version
    ssu_bridge.update(**tensors, **CASE.flags, out=out)
    assert (out._version, tensors["state"]._version) == (versions[0] + 1, versions[1] + 1)


def test_torch_parameters_and_no_grad(arrays):
    tensors = to_mode(arrays, "torch")
    for name in ("A", "D", "dt_bias"):
        tensors[name] = torch.nn.Parameter(tensors[name])
    out, _ = ssu_bridge.update(**tensors, **CASE.flags)
    assert not out.requires_grad
    for name in ("state", "x", "dt", "B", "C", "z"):
        with_grad = to_mode(arrays, "torch")
        with_grad[name].requires_grad_()
        with pytest.raises(ssu_bridge.UnsupportedError, match=rf"{name}: .*torch\.no_grad"):
            ssu_bridge.update(**with_grad, **CASE.flags)
        np.testing.assert_array_equal(bits(with_grad["state"].detach().numpy()), bits(arrays["state"]))
        with torch.no_grad():
            ssu_bridge.update(**with_grad, **CASE.flags)


def test_numpy_takes_read_only_inputs(arrays):
    expected, _ = ssu_bridge.update(**to_mode(arrays, "numpy"), **CASE.flags)
    for name, array in arrays.items():
        array.setflags(write=name == "state")
    out, _ = ssu_bridge.update(**arrays, **CASE.flags)
    np.testing.assert_array_equal(out, expected)


def test_numpy_arrays_beside_jax_ones(arrays):
    expected, _ = ssu_bridge.update(**to_mode(arrays, "jax"), **CASE.flags)
    rest = {name: array for name, array in arrays.items() if name != "state"}
    out, _ = ssu_bridge.update(copied(arrays["state"]), **rest, **CASE.flags)
    np.testing.assert_array_equal(np.array(out), np.array(expected))


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "xla"])
def test_numpy_indices_that_32_bits_cannot_hold_are_pads(arrays, backend, jitted):
    """JAX keeps the low 32 bits of an int64, and those would name a slot here."""
    arrays["state_batch_indices"] = np.array([2**32 + 1, 0, -(2**63) + 2])
    expected = ssu_bridge.update(**{n: a.copy() for n, a in arrays.items()}, **CASE.flags)
    rest = {name: array for name, array in arrays.items() if name != "state"}

    def step(state):
        return ssu_bridge.update(state, **rest, **CASE.flags, backend=backend)

    got = (jax.jit(step) if jitted else step)(copied(arrays["state"]))
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_without_jit_too(arrays):
    expected, _ = ssu_bridge.update(**to_mode(arrays, "jax"), **CASE.flags)
    with jax.disable_jit():
        out, _ = ssu_bridge.update(**to_mode(arrays, "jax"), **CASE.flags, donate=False)
    np.testing.assert_array_equal(out, expected)


def test_all_frameworks_give_the_same_bits(arrays):
    results = {}
    for mode in ("numpy", "torch", "jax"):
        results[mode] = [np.asarray(r) for r in ssu_bridge.update(**to_mode(arrays, mode), **CASE.flags, backend="cpu")]
    for mode in ("torch", "jax"):
        for got, expected in zip(results[mode], results["numpy"], strict=True):
            np.testing.assert_array_equal(bits(got), bits(expected))
