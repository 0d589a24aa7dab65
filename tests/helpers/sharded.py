"""Steps on arrays that are sharded: over GPUs, or over virtual CPU devices in programs in processes of their own."""

import functools
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from copied import copied
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from without_torch import WITHOUT_TORCH

import ssu_bridge
from ssu_bridge.core.quantized import paired, unpaired
from ssu_bridge.frontends.jax.metadata import WRITTEN
from ssu_bridge.testing.cases import arguments
from ssu_bridge.testing.check import results_by_name

COLLECTIVE = r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?[(]"
# What hands an array on without touching it; the custom call is the kernel.
IN_PLACE = {"parameter", "tuple", "get-tuple-element", "bitcast", "while", "custom-call"}


def run(program, *arguments, devices=8, **environment):
    """Run a program that begins with all names of this module; return what it prints."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        **environment,
    }
    hidden = WITHOUT_TORCH if environment["JAX_PLATFORMS"] == "cpu" else ""  # FlashInfer needs it
    command = [sys.executable, "-c", hidden + "from sharded import *\n" + program, *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-6000:]
    return result.stdout


def mesh_of(kind=AxisType.Auto, **sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))


def heads(token_axes=1):
    """Return how the arrays of a step are sharded over heads, but for B, C and the parameters."""
    rows = P(*[None] * token_axes, "h")
    slots, entries = P(None, "h"), P(None, None, "h")
    return {**dict.fromkeys(("x", "z", "dt"), rows), **written(slots, entries)}


def channels(token_axes=1):
    """Return how they are sharded over headdim."""
    return {"x": P(*[None] * token_axes, None, "p"), **written(P(None, None, "p"), P(None, None, None, "p"))}


def sequences():
    """Return how they are sharded over sequences that have slots of their own."""
    return {n: P("s") for n in ("x", "z", "dt", "B", "C", *WRITTEN)}


def written(slots, entries):
    return {name: entries if name.startswith("intermediate") else slots for name in WRITTEN}


def drawn(case, seed=4):
    """Draw a case's arrays as JAX takes them, by the names that kernels have for them."""
    return unpaired(arguments(case.arrays(seed), "jax", lambda array: array))


def put(arrays, mesh, specs):
    shardings = {n: NamedSharding(mesh, specs.get(n, P())) for n in arrays}
    if jax.process_count() == 1:
        return copied(arrays, shardings)
    # Between processes device_put would communicate, to compare what each of them has.
    return jax.jit(functools.partial(jax.tree.map, jnp.copy), out_shardings=shardings)(arrays)


def parted(arrays):
    """Return the arrays that a step writes, and the others."""
    return ({n: a for n, a in arrays.items() if (n in WRITTEN) == w} for w in (True, False))


def backend():
    """Return the configuration's backend, or the one of our own that runs here."""
    asked = ssu_bridge.get_config().backend
    return asked if asked != "auto" else "triton" if jax.default_backend() == "gpu" else "cpu"


def step(case, arrays):
    return unpaired(results_by_name(ssu_bridge.update(**paired(arrays), **case.flags, backend=backend())))


def decode(case, count, changed, rest):
    """Take some steps in a scan; return what was written, and the last output."""

    def token(changed, _):
        after = step(case, {**rest, **changed})
        return {name: after[name] for name in changed}, after["out"]

    changed, outs = jax.lax.scan(token, changed, None, length=count)
    # JAX matches donated arrays with results by their size, in this order.
    return changed, outs[-1]


def alone(case, count=3, arrays=None):
    """Take some steps on one device: what was written and the last output. On the CPU NumPy arrays compile nothing."""
    arrays = drawn(case) if arrays is None else arrays
    if backend() != "cpu":
        changed, out = decode(case, count, *parted({n: jnp.array(a) for n, a in arrays.items()}))
        return {**changed, "out": out}
    given = paired({n: np.array(a) for n, a in arrays.items()})
    for _ in range(count):
        after = results_by_name(ssu_bridge.update(**given, **case.flags, backend="cpu"))  # in place
    return unpaired(after)


def decode_in_place(case, arrays, count=3):
    """Take jitted steps on sharded arrays: no collective, no copy of what is written, at the addresses that it had."""
    changed, rest = parted(arrays)
    places = {name: addresses(array) for name, array in changed.items()}
    shardings = {name: array.sharding for name, array in changed.items()}
    compiled = jax.jit(functools.partial(decode, case, count), donate_argnums=0).lower(changed, rest).compile()
    text = compiled.as_text()
    assert not re.search(COLLECTIVE, text), text
    for array in changed.values():
        assert not touched(text, array), touched(text, array)
    after, out = compiled(changed, rest)
    for name, sharding in shardings.items():
        assert addresses(after[name]) == places[name], name
        assert after[name].sharding.is_equivalent_to(sharding, after[name].ndim), name
    return {**after, "out": out}


def touched(text, array):
    """Return the lines of a program that make something like a shard of an array, but for the kernel's."""
    shape = ",".join(map(str, array.sharding.shard_shape(array.shape)))
    # XLA's names of dtypes: f32, bf16, s8, f8e4m3fn.
    kind = array.dtype.name.replace("float", "f").replace("int", "s").replace("_", "") + f"[{shape}]"
    made = re.finditer(rf"^.* = {re.escape(kind)}\S* ([\w-]+)\(.*$", text, re.MULTILINE)
    return [line[0] for line in made if line[1] not in IN_PLACE]


def check(case, mesh, specs, eager=False):
    """Assert that sharded steps have the bits of steps on one device, and stay in place."""
    expected = alone(case)
    same(decode_in_place(case, put(drawn(case), mesh, specs)), expected)
    if eager:
        same(decode_eagerly(case, put(drawn(case), mesh, specs)), expected)


def check_shard_map(case, mesh, specs):
    """Assert that a step that is mapped over shards by hand has the bits of one on one device, and stays in place."""
    expected = step(case, copied(drawn(case)))
    changed, rest = parted(put(drawn(case), mesh, specs))
    places = {name: addresses(array) for name, array in changed.items()}
    into = tuple({n: specs.get(n, P()) for n in arrays} for arrays in (changed, rest))
    run = jax.shard_map(
        lambda changed, rest: decode(case, 1, changed, rest), mesh=mesh, in_specs=into, out_specs=(into[0], specs["x"])
    )
    compiled = jax.jit(run, donate_argnums=0).lower(changed, rest).compile()
    assert not re.search(COLLECTIVE, compiled.as_text()), compiled.as_text()
    after, out = compiled(changed, rest)
    assert {name: addresses(array) for name, array in after.items()} == places
    same({**after, "out": out}, expected)


def check_mapped(case, mesh, spec):
    """Assert that mapped steps, their states and x sharded so, have the bits of a loop over them, and stay in place."""
    calls = [drawn(case, seed) for seed in range(4)]
    stacked = {n: np.stack([c[n] for c in calls]) if n in ("state", "x") else a for n, a in calls[0].items()}
    rest = put(stacked, mesh, {"state": spec, "x": spec})
    state, axes = rest.pop("state"), {n: 0 if n == "x" else None for n in calls[0] if n != "state"}

    def mapped(state, rest):
        return step(case, {**rest, "state": state})

    jitted = jax.jit(jax.vmap(mapped, in_axes=(0, axes)), donate_argnums=0)
    before, compiled = addresses(state), jitted.lower(state, rest).compile()
    assert not re.search(COLLECTIVE, compiled.as_text()), compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < state.addressable_shards[0].data.nbytes / 4
    after = compiled(state, rest)
    assert addresses(after["state"]) == before
    for j, call in enumerate(calls):
        one = alone(case, 1, {**calls[0], "state": call["state"], "x": call["x"]})
        same({n: np.array(a)[j] for n, a in after.items()}, one)


def compiles_once(case, mesh, spec):
    """Assert that eager mapped steps compile nothing after the first."""
    arrays = drawn(case)
    xs = put({"x": np.stack([arrays.pop("x")] * 4)}, mesh, {"x": spec})["x"]
    there = put(arrays, mesh, {})
    outs, events = [], []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
    for _ in range(2):
        counts = [name for name in events if "backend_compile" in name]
        outs.append(jax.vmap(lambda x: step(case, {**there, "x": x})["out"])(xs))
    assert counts
    assert counts == [name for name in events if "backend_compile" in name]
    same({"out": outs[1]}, {"out": outs[0]})


def check_reference(case, mesh, specs):
    """Assert that two sharded steps through a reference, eager and jitted, have the bits of steps on one device."""
    expected = alone(case, 2)
    rest = put(drawn(case), mesh, specs)
    sharding, ref = rest["state"].sharding, jax.new_ref(rest.pop("state"))
    assert step(case, {**rest, "state": ref})["state"] is ref
    jitted = jax.jit(lambda ref, rest: step(case, {**rest, "state": ref})["out"])
    assert not re.search(COLLECTIVE, jitted.lower(ref, rest).compile().as_text())
    same({"out": jitted(ref, rest), "state": ref[...]}, expected)
    assert ref.sharding.is_equivalent_to(sharding, ref[...].ndim)


def decode_eagerly(case, arrays, count=3):
    places = {name: addresses(array) for name, array in arrays.items() if name in WRITTEN}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(count):
            after = step(case, arrays)
            arrays = {name: after.get(name, array) for name, array in arrays.items()}
    assert {name: addresses(arrays[name]) for name in places} == places
    return after


def same(got, expected):
    assert got.keys() == expected.keys()
    for name, array in got.items():
        assert np.array(array).tobytes() == np.array(expected[name]).tobytes(), name


def addresses(array):
    return [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]


def refused(message, call, error=ssu_bridge.UnsupportedError):
    with pytest.raises(error, match=message):
        call()
