"""The chunks of the xla backend on sharded arrays: eight virtual CPU devices, each with its part of the state."""

import functools
import re

import jax
import numpy as np
import pytest
from copied import copied
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from sharded import COLLECTIVE, channels, heads, mesh_of, put, sequences
from thinned import thinned

import ssu_bridge
from ssu_bridge.backends.xla import forms
from ssu_bridge.cases import Case
from ssu_bridge.core.quantized import paired
from ssu_bridge.testing.check import results_by_name

case = functools.partial(Case, nheads=8, ngroups=8, headdim=8, dstate=16)
MULTI = case("multi", tokens=70, sequences=8, slots=8, indices=None)
PACKED = case("packed", tokens=70, cu_seqlens=(0, 40, 40, 70))
KEPT = case("states on the way", tokens=70, steps=4, intermediate_stride=16, sequences=8, slots=8, indices=None)


def by_heads(token_axes):
    """Heads, with the groups that they read: then a device needs nothing of another."""
    groups = P(*[None] * token_axes, "h")
    return {**heads(token_axes), "B": groups, "C": groups, **dict.fromkeys(("A", "D", "dt_bias"), P("h"))}


def chunks(case):
    return functools.partial(ssu_bridge.update, **case.flags, backend="xla", algorithm="matrix")


def compiled(case, there):
    """A donated call of chunks, of which the checks look at the program."""

    def call(state, rest):
        return results_by_name(chunks(case)(**paired({"state": state, **rest})))

    rest = {name: array for name, array in there.items() if name != "state"}
    lowered = jax.jit(call, donate_argnums=0).lower(there["state"], rest)
    # A scatter without indices in a shard_map, over which XLA's compiler ends the process in JAX 0.11.
    assert "tensor<0xi32>" not in lowered.as_text()
    return lowered.compile(), rest


SHARDED = {
    "heads": (MULTI, {"h": 8}, by_heads(2)),
    "heads, packed": (PACKED, {"h": 4}, by_heads(1)),
    "heads, states on the way": (KEPT, {"h": 4}, by_heads(2)),
    "channels": (MULTI, {"p": 4}, channels(2)),
    "channels, packed": (PACKED, {"p": 8}, channels(1)),
    "sequences": (MULTI, {"s": 8}, sequences()),
    "sequences, states on the way": (KEPT, {"s": 4}, sequences()),
}


def check_parts(name, kind):
    """Assert that a sharded call has the results of one on one device; return its program."""
    case, axes, specs = SHARDED[name]
    expected = results_by_name(chunks(case)(**copied(case.arrays(seed=3))))
    mesh = mesh_of(kind, **axes)
    with jax.set_mesh(mesh):
        there = put(case.arrays(seed=3), mesh, specs)
        before = there["state"].sharding
        program, rest = compiled(case, there)
        got = program(there["state"], rest)
    assert got["state"].sharding.is_equivalent_to(before, got["state"].ndim)
    for result, array in expected.items():
        assert np.allclose(got[result], array, rtol=2e-5, atol=2e-5), result
    return program.as_text()


# A product of matrices in a loop over chunks.
PRODUCT_BY_CHUNK = r'op_name="[^"]*while/body[^"]*dot_general'


# By default each with one kind of axes.
@pytest.mark.parametrize(("name", "kind"), thinned(SHARDED, [AxisType.Auto, AxisType.Explicit], one_in=2))
def test_each_device_computes_its_part(name, kind):
    program = check_parts(name, kind)
    # That a sequence's entry is on its device is not known to XLA, which sends states to all that could have it.
    gathers = name == "sequences, states on the way" and kind is AxisType.Auto
    assert bool(re.findall(COLLECTIVE, program)) == gathers
    assert re.search(PRODUCT_BY_CHUNK, program)


@pytest.mark.parametrize("name", ["heads", "heads, packed", "sequences"])
def test_all_chunks_at_once(name, monkeypatch):
    """The form of devices that are neither a CPU nor a GPU of CUDA."""
    monkeypatch.setattr(forms, "_ONE_BY_ONE", ())
    jax.clear_caches()
    try:
        program = check_parts(name, AxisType.Auto)
    finally:
        jax.clear_caches()
    assert not re.findall(COLLECTIVE, program)
    assert not re.search(PRODUCT_BY_CHUNK, program)


@pytest.mark.parametrize(
    "name", ["heads", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("channels", "sequences"))]
)
def test_gradients(name):
    case, axes, specs = SHARDED[name]

    def loss(arrays):
        out, state = chunks(case)(**arrays)
        return (out**2).sum() + (state**2).sum()

    expected = jax.jit(jax.grad(loss))(copied(case.arrays(seed=3)))
    got = jax.jit(jax.grad(loss))(put(case.arrays(seed=3), mesh_of(**axes), specs))
    for argument, array in expected.items():
        assert np.allclose(got[argument], array, rtol=1e-4, atol=1e-4 * np.abs(array).max()), argument
