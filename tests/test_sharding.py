"""Steps on arrays that are sharded over several devices: eight virtual CPU devices, in a process of their own."""

import os
import subprocess
import sys

import pytest

START = """
import functools
import re
import warnings
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import ssu_bridge
from ssu_bridge.cases import Case

HEADS = {"state": P(None, "h"), "x": P(None, "h"), "z": P(None, "h"), "dt": P(None, "h")}
COLLECTIVE = r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?[(]"

def mesh_of(kind=AxisType.Auto, **sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))

def put(arrays, mesh, specs):
    # Not in the memory of the NumPy array, which JAX would not donate.
    shardings = {n: NamedSharding(mesh, specs.get(n, P())) for n in arrays}
    return jax.jit(functools.partial(jax.tree.map, jnp.copy), out_shardings=shardings)(arrays)

def decode(case, backend, **arrays):
    '''Take three steps in a scan.'''
    def token(state, _):
        out, state = ssu_bridge.update(**{**arrays, "state": state}, **case.flags, backend=backend)
        return state, out
    state, outs = jax.lax.scan(token, arrays["state"], None, length=3)
    return outs[-1], state

def check(case, mesh, specs, jitted=True, backend="cpu"):
    '''Assert that sharded steps have the bits of steps on one device, without a collective or a copy of the state.'''
    arrays = case.arrays(seed=4)
    expected = decode(case, "cpu", **{n: jnp.array(a) for n, a in arrays.items()})
    there = put(arrays, mesh, specs)
    places, sharding = addresses(there["state"]), there["state"].sharding
    run = jax.jit(functools.partial(decode, case, backend), donate_argnames="state")
    compiled = run.lower(**there).compile()
    text = compiled.as_text()
    assert not re.search(COLLECTIVE, text), (case, mesh.shape, specs, text)
    shard = "f32[" + ",".join(map(str, sharding.shard_shape(arrays["state"].shape))) + "]"
    copies = [line for line in text.splitlines() if re.search(r" = [^ ]+ copy[(]", line) and shard in line.split(" copy(")[0]]
    assert not copies, (case, mesh.shape, specs, copies)
    out, state = compiled(**there)
    assert addresses(state) == places and state.sharding.is_equivalent_to(sharding, state.ndim)
    assert np.array_equal(out, expected[0]) and np.array_equal(state, expected[1]), (case, mesh.shape, specs)
    if jitted:
        return
    rest = put(arrays, mesh, specs)
    state = rest.pop("state")
    places = addresses(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            out, state = ssu_bridge.update(state, **rest, **case.flags, backend=backend)
    assert addresses(state) == places
    assert np.array_equal(out, expected[0]) and np.array_equal(state, expected[1]), (case, mesh.shape, specs)

def addresses(array):
    return [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]

def refused(message, run):
    try:
        run()
    except Exception as error:
        assert re.search(message, str(error)), error
        return error
    raise AssertionError("no error")
"""

PROGRAMS = {
    "over heads, for all groups": """
for G in (8, 4, 2, 1):
    case = Case(f"{G} groups", nheads=8, ngroups=G, headdim=8, dstate=16)
    for k in (2, 4, 8):
        mesh = mesh_of(h=k)
        check(case, mesh, HEADS, jitted=k != 4)
        if G % k == 0:
            check(case, mesh, {**HEADS, "B": P(None, "h"), "C": P(None, "h"), "A": P("h")})
# A shard has all of a group and a part of the next.
check(Case("three groups over two", nheads=6, ngroups=3, headdim=8, dstate=16), mesh_of(h=2), HEADS)
check(Case("untied", nheads=8, headdim=8, dstate=16, untied=("A", "dt", "D", "dt_bias")), mesh_of(h=4), HEADS)
check(Case("no axis of groups", nheads=8, ngroups=1, headdim=8, dstate=16, group_axis=False), mesh_of(h=4), HEADS)
""",
    "over channels": """
CHANNELS = {"state": P(None, None, "p"), "x": P(None, None, "p")}
check(Case("channels", nheads=4, headdim=8, dstate=16), mesh_of(p=4), CHANNELS, jitted=False)
mamba1 = Case("mamba1", nheads=0, ngroups=1, headdim=16, dstate=16, group_axis=False)
check(mamba1, mesh_of(p=8), {"state": P(None, "p"), "x": P(None, "p"), "A": P("p")}, jitted=False)
both = {"state": P(None, "h", "p"), "x": P(None, "h", "p")}
check(Case("both", nheads=4, headdim=8, dstate=16), mesh_of(h=4, p=2), both)
check(Case("two axes for one", nheads=8, headdim=8, dstate=16), mesh_of(a=2, b=4), {"state": P(None, ("a", "b"))})
""",
    "over sequences": """
own = Case("own slots", sequences=8, slots=8, nheads=4, headdim=8, dstate=16, indices=None)
rows = {n: P("s") for n in ("state", "x", "z", "dt", "B", "C")}
check(own, mesh_of(s=4), rows, jitted=False)
check(own, mesh_of(s=4), {"state": P("s")})
both = {**{n: P("s", "h") for n in ("state", "x", "z", "dt")}, "B": P("s"), "C": P("s")}
check(own, mesh_of(s=2, h=4), both, jitted=False)
check(own, mesh_of(s=2, h=2), {**both, "B": P("s", "h"), "C": P("s", "h")})
# Sequences that are sharded beside a state that is not: right, wherever they are computed.
case = Case("indices", sequences=4, slots=8, nheads=4, headdim=8, dstate=16, indices=(4, 0, 2, 7))
expected = ssu_bridge.update(**case.arrays(seed=4), **case.flags)
there = put(case.arrays(seed=4), mesh_of(s=4), {n: P("s") for n in ("x", "z", "dt", "B", "C", "state_batch_indices")})
out, state = jax.jit(functools.partial(ssu_bridge.update, **case.flags, backend="cpu"))(**there)
assert np.array_equal(out, expected[0]) and np.array_equal(state, expected[1])
""",
    "what cannot be sharded": """
case = Case("indices", sequences=4, slots=8, nheads=4, headdim=8, dstate=16, indices=(4, 0, 2, 7))
mesh, arrays = mesh_of(s=4), case.arrays(seed=4)
spare = Case("spare", sequences=4, slots=8, nheads=4, headdim=8, dstate=16, indices=None)
for one in (case, spare):
    for spec, message in ((P("s"), "slots are sharded over 's'.*jax.shard_map.*count from 0"), (P(None, None, None, "s"), "dstate.*shard heads")):
        there = put(one.arrays(seed=4), mesh, {"state": spec})
        step = functools.partial(ssu_bridge.update, **one.flags, backend="cpu")
        error = refused(message, lambda: step(**there))
        assert isinstance(error, ssu_bridge.UnsupportedError), error
        assert not there["state"].is_deleted()
        refused(message, lambda: jax.jit(step)(**there))
""",
    "explicit axes": """
for G in (8, 2, 1):
    case = Case(f"{G} groups", nheads=8, ngroups=G, headdim=8, dstate=16)
    mesh = mesh_of(AxisType.Explicit, h=4)
    with jax.set_mesh(mesh):
        for backend in ("cpu",):
            check(case, mesh, HEADS, jitted=False, backend=backend)
own = Case("own slots", sequences=8, slots=8, nheads=4, headdim=8, dstate=16, indices=None)
mesh = mesh_of(AxisType.Explicit, s=2, h=4)
with jax.set_mesh(mesh):
    check(own, mesh, {**{n: P("s", "h") for n in ("state", "x", "z", "dt")}, "B": P("s"), "C": P("s")}, jitted=False)
    arrays = put(own.arrays(seed=4), mesh, {"state": P("s", "h"), "x": P("s", "h")})
    expected = ssu_bridge.update(**own.arrays(seed=4), **own.flags)
    out, state = jax.jit(functools.partial(ssu_bridge.update, **own.flags, backend="xla"))(**arrays)
    assert jax.typeof(state).sharding.spec == P("s", "h", None, None), state.sharding
    np.testing.assert_allclose(out, expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state, expected[1], rtol=1e-5, atol=1e-5)
    there = put(own.arrays(seed=4), mesh, {"state": P(None, None, None, "h")})
    error = refused("dstate.*shard heads", lambda: ssu_bridge.update(**there, **own.flags, backend="cpu"))
    assert isinstance(error, ssu_bridge.UnsupportedError)
""",
    "shard_map": """
case = Case("local slots", sequences=8, slots=16, nheads=4, headdim=8, dstate=16, indices=(1, 0, 3, 2, 2, 0, 1, 3))
mesh, arrays = mesh_of(s=4, h=2), case.arrays(seed=4)
specs = {n: P("s", "h") for n in ("state", "x", "z", "dt", "B", "C")}
specs |= {n: P("h") for n in ("A", "D", "dt_bias")} | {"state_batch_indices": P("s")}
step = functools.partial(ssu_bridge.update, **case.flags, backend="cpu")
run = jax.shard_map(lambda arrays: step(**arrays), mesh=mesh, in_specs=(specs,), out_specs=P("s", "h"))
run = jax.jit(run, donate_argnums=0)
there = put(arrays, mesh, specs)
places, text = addresses(there["state"]), run.lower(there).compile().as_text()
assert not re.search(COLLECTIVE, text), text
out, state = run(there)
assert addresses(state) == places
whole = dict(arrays, state_batch_indices=arrays["state_batch_indices"] + np.repeat(np.arange(4), 2).astype("int32") * 4)
expected = ssu_bridge.update(**whole, **case.flags)
assert np.array_equal(out, expected[0]) and np.array_equal(state, expected[1])
# Over one axis of the mesh alone.
some = dict(mesh=mesh, in_specs=({n: P() for n in arrays},), out_specs=P(), axis_names={"s"})
part = jax.shard_map(lambda arrays: step(**arrays), **some)
error = refused("axis_names", lambda: jax.jit(part)(put(case.arrays(seed=4), mesh, {})))
assert isinstance(error, ssu_bridge.UnsupportedError), error
""",
    "mapped": """
case = Case("mapped", nheads=8, headdim=8, dstate=16)
calls = [case.arrays(seed=s) for s in (1, 2)]
stacked = {n: np.stack([c[n] for c in calls]) if n in ("state", "x") else a for n, a in calls[0].items()}
axes = {n: 0 if n in ("state", "x") else None for n in stacked}
there = put(stacked, mesh_of(h=4), {"state": P(None, None, "h"), "x": P(None, None, "h")})
run = jax.jit(jax.vmap(lambda a: ssu_bridge.update(**a, **case.flags, backend="cpu"), in_axes=(axes,)), donate_argnums=0)
assert not re.search(COLLECTIVE, run.lower(there).compile().as_text())
out, state = run(there)
for j, call in enumerate(calls):
    expected = ssu_bridge.update(**{**calls[0], "state": call["state"], "x": call["x"]}, **case.flags)
    assert np.array_equal(out[j], expected[0]) and np.array_equal(state[j], expected[1])
""",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_eight_devices(program):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", START + PROGRAMS[program]]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-6000:]
