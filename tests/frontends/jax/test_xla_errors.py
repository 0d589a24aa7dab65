"""What is known by the text of an error alone: each met for real."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tvm_ffi
from copied import copied
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from modes import to_mode

import ssu_bridge
from ssu_bridge.frontends.jax import xla_errors
from ssu_bridge.frontends.jax.ffi_targets import register_function
from ssu_bridge.testing.cases import Case

CASE = Case("errors", nheads=2, headdim=4, dstate=4, slots=4, sequences=4, indices=None)


def mesh_of(kind):
    return jax.make_mesh((2,), ("d",), axis_types=(kind,), devices=jax.devices("cpu"))


def test_a_refusal_inside_the_partitioner():
    mesh = mesh_of(AxisType.Auto)
    arrays = jax.device_put(CASE.arrays(0), NamedSharding(mesh, P()))
    arrays["state"] = jax.device_put(arrays["state"], NamedSharding(mesh, P(None, None, None, "d")))
    step = functools.partial(ssu_bridge.update, **CASE.flags, backend="cpu")
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.jit(step)(**arrays)
    refusal = xla_errors.refusal_in(caught.value)
    assert isinstance(refusal, ssu_bridge.UnsupportedError)
    assert str(refusal).startswith("state: its last axis (dstate) is sharded over 'd'")
    assert str(refusal).endswith("shard heads, headdim or sequences")
    assert xla_errors.refusal_in(jax.errors.JaxRuntimeError("INTERNAL: something else")) is None
    assert xla_errors.refusal_in(ValueError(str(caught.value))) is None


def test_a_mesh_axis_that_is_mapped_elsewhere():
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        xs = jax.device_put(jnp.zeros((2, 4)), NamedSharding(mesh, P("d")))

        def inside(x):
            return jax.shard_map(lambda x: x, mesh=mesh, in_specs=P("d"), out_specs=P("d"))(x)

        with pytest.raises(ValueError) as caught:  # noqa: PT011  (its text is what is tested)
            jax.vmap(inside)(xs)
    assert xla_errors.is_mapped_elsewhere(caught.value)
    assert not xla_errors.is_mapped_elsewhere(ValueError("state: expected an array"))


def test_a_kernel_without_memory():
    """Met for real in test_kernel_errors, where a process has too little."""
    function = tvm_ffi.convert(lambda *tensors: fail())

    def fail():
        raise MemoryError("no memory for the scratch of a state with 8 columns")

    register_function("ssu_bridge.test_without_memory", function, "cpu", in_graphs=False)
    call = jax.ffi.ffi_call("ssu_bridge.test_without_memory", jax.ShapeDtypeStruct((2,), jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.block_until_ready(jax.jit(lambda x: call(x), donate_argnums=0)(state := jnp.zeros(2)))
    assert str(xla_errors.memory_error_in(caught.value)) == "no memory for the scratch of a state with 8 columns"
    assert not hasattr(xla_errors.memory_error_in(caught.value), "__notes__")
    assert xla_errors.lost_its_state(caught.value, state)
    assert "is lost" in xla_errors.memory_error_in(caught.value).__notes__[0]
    assert xla_errors.memory_error_in(jax.errors.JaxRuntimeError("INTERNAL: something else")) is None
    assert xla_errors.memory_error_in(ValueError(str(caught.value))) is None


@pytest.mark.gpu
def test_a_view_that_keeps_a_gpu_from_donating():
    state = jnp.zeros((64, 64))
    view = ssu_bridge.to_torch(state)
    with pytest.raises(Exception) as caught:  # noqa: PT011  (which class it is, XLA does not promise)
        jax.jit(lambda state: state + 1, donate_argnums=0)(state)
    assert view.shape == state.shape
    assert xla_errors.is_viewed(caught.value)
    assert not xla_errors.is_viewed(ValueError("state: expected an array"))


# --- What eager calls make of them ---


@pytest.fixture
def sharded():
    """Return a call's arrays, its state sharded over heads."""
    mesh = mesh_of(AxisType.Auto)
    arrays = {name: NamedSharding(mesh, P()) for name in CASE.arrays(0)}
    arrays["state"] = NamedSharding(mesh, P(None, "d"))
    copies = copied(CASE.arrays(0))
    return jax.device_put(copies, arrays)


def test_a_first_sharded_call_raises_nothing_on_its_way(sharded, monkeypatch):
    expected = ssu_bridge.update(**to_mode(CASE.arrays(0), "jax"), **CASE.flags, backend="cpu")
    monkeypatch.setattr("ssu_bridge.frontends.jax.eager.explain_failure", None)
    out, state = ssu_bridge.update(**sharded, **CASE.flags, backend="cpu")
    np.testing.assert_array_equal(out, expected[0])
    np.testing.assert_array_equal(state, expected[1])


@pytest.mark.parametrize("first", (True, False))
def test_a_call_that_fails_is_run_once(sharded, first, monkeypatch):
    flags = {**CASE.flags, "backend": "cpu", "pad_slot_id": -31 - first}
    if not first:
        _, sharded["state"] = ssu_bridge.update(**sharded, **flags)
        sharded["x"] = sharded["x"].astype("bfloat16")  # compiled anew
    runs = []

    def failing(problem, **_):
        runs.append(problem)
        raise RuntimeError("the kernel is gone")

    monkeypatch.setattr("ssu_bridge.frontends.jax.tracing.bind", lambda arrays, problem: failing(problem))
    with pytest.raises(RuntimeError, match="the kernel is gone"):
        ssu_bridge.update(**sharded, **flags)
    assert len(runs) == 1
    assert not sharded["state"].is_deleted()
