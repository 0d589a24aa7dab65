"""Steps on arrays that are sharded over several devices: eight virtual CPU devices."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from copied import copied, jax_array
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded import (
    COLLECTIVE,
    addresses,
    alone,
    check,
    check_mapped,
    check_reference,
    compiles_once,
    decode,
    drawn,
    heads,
    mesh_of,
    parted,
    put,
    refused,
    same,
    step,
)

import ssu_bridge
from ssu_bridge.cases import Case
from ssu_bridge.core.quantized import paired, unpaired
from ssu_bridge.testing.check import results_by_name


def test_xla_and_what_does_not_vary():
    # Each shard steps sequences of its own, of rows that all have.
    mesh, packed = mesh_of(d=2), Case("rows of all", nheads=2, tokens=6, cu_seqlens=(0, 2, 3, 3), slots=8)
    arrays = copied(drawn(packed))
    arrays["cu_seqlens"] = jax_array([[0, 2, 3, 3], [3, 4, 6, 6]], "int32")

    def call(arrays):
        return unpaired(results_by_name(ssu_bridge.update(**paired(arrays), **packed.flags, backend="xla")))

    specs = {n: P("d") if n in ("state", "cu_seqlens") else P() for n in arrays}
    arrays["state_batch_indices"] = jax_array([3, 0, 2])  # of a shard's four slots
    mapped = jax.shard_map(
        lambda a: {n: r[None] for n, r in call({**a, "cu_seqlens": a["cu_seqlens"][0]}).items()},
        mesh=mesh,
        in_specs=(specs,),
        out_specs={"out": P("d"), "state": P("d")},
    )
    results = jax.jit(mapped)(arrays)
    for i in range(2):
        one = {**arrays, "cu_seqlens": arrays["cu_seqlens"][i], "state": arrays["state"][4 * i : 4 * i + 4]}
        for name, result in call(one).items():
            assert np.allclose(results[name][i], result, rtol=1e-5, atol=1e-5), name


def test_over_heads_for_all_groups():
    for G in (8, 4, 2, 1):
        case = Case(f"{G} groups", nheads=8, ngroups=G, headdim=8, dstate=16)
        for k in (2, 4, 8):
            mesh = mesh_of(h=k)
            check(case, mesh, heads(), eager=k == 4)
            if G % k == 0:
                check(case, mesh, {**heads(), "B": P(None, "h"), "C": P(None, "h"), "A": P("h")})
    # A shard has all of a group and a part of the next.
    check(Case("three groups over two", nheads=6, ngroups=3, headdim=8, dstate=16), mesh_of(h=2), heads())
    check(Case("untied", nheads=8, headdim=8, dstate=16, untied=("A", "dt", "D", "dt_bias")), mesh_of(h=4), heads())
    check(Case("no axis of groups", nheads=8, ngroups=1, headdim=8, dstate=16, group_axis=False), mesh_of(h=4), heads())


def test_over_channels():
    CHANNELS = {"state": P(None, None, "p"), "x": P(None, None, "p")}
    check(Case("channels", nheads=4, headdim=8, dstate=16), mesh_of(p=4), CHANNELS, eager=True)
    mamba1 = Case("mamba1", nheads=0, ngroups=1, headdim=16, dstate=16, group_axis=False)
    check(mamba1, mesh_of(p=8), {"state": P(None, "p"), "x": P(None, "p"), "A": P("p")}, eager=True)
    both = {"state": P(None, "h", "p"), "x": P(None, "h", "p")}
    check(Case("both", nheads=4, headdim=8, dstate=16), mesh_of(h=4, p=2), both)
    check(Case("two axes for one", nheads=8, headdim=8, dstate=16), mesh_of(a=2, b=4), {"state": P(None, ("a", "b"))})


def test_over_sequences():
    own = Case("own slots", sequences=8, slots=8, nheads=4, headdim=8, dstate=16, indices=None)
    rows = {n: P("s") for n in ("state", "x", "z", "dt", "B", "C")}
    check(own, mesh_of(s=4), rows, eager=True)
    check(own, mesh_of(s=4), {"state": P("s")})
    both = {**{n: P("s", "h") for n in ("state", "x", "z", "dt")}, "B": P("s"), "C": P("s")}
    check(own, mesh_of(s=2, h=4), both, eager=True)
    check(own, mesh_of(s=2, h=2), {**both, "B": P("s", "h"), "C": P("s", "h")})
    # Sequences that are sharded beside a state that is not: right, wherever they are computed.
    case = Case("indices", sequences=4, slots=8, nheads=4, headdim=8, dstate=16, indices=(4, 0, 2, 7))
    expected = ssu_bridge.update(**case.arrays(seed=4), **case.flags)
    there = put(
        case.arrays(seed=4), mesh_of(s=4), {n: P("s") for n in ("x", "z", "dt", "B", "C", "state_batch_indices")}
    )
    out, state = jax.jit(functools.partial(ssu_bridge.update, **case.flags, backend="cpu"))(**there)
    assert np.array_equal(out, expected[0])
    assert np.array_equal(state, expected[1])


def test_what_cannot_be_sharded():
    case = Case("indices", sequences=4, slots=8, nheads=4, headdim=8, dstate=16, indices=(4, 0, 2, 7))
    mesh, _arrays = mesh_of(s=4), case.arrays(seed=4)
    spare = Case("spare", sequences=4, slots=8, nheads=4, headdim=8, dstate=16, indices=None)
    for one in (case, spare):
        for spec, message in (
            (P("s"), "slots are sharded over 's'.*jax.shard_map.*count from 0"),
            (P(None, None, None, "s"), "dstate.*shard heads"),
        ):
            there = put(one.arrays(seed=4), mesh, {"state": spec})
            step = functools.partial(ssu_bridge.update, **one.flags, backend="cpu")
            refused(message, lambda: step(**there))
            assert not there["state"].is_deleted()
            refused(message, lambda: jax.jit(step, donate_argnames="state")(**there), jax.errors.JaxRuntimeError)
            assert not there["state"].is_deleted()
    # Heads that the devices do not share out evenly, which no array of its own can have.
    uneven, h = Case("uneven", nheads=6, ngroups=3, headdim=8, dstate=16), NamedSharding(mesh_of(h=4), P(None, "h"))
    uneven_step = functools.partial(ssu_bridge.update, **uneven.flags, backend="cpu")

    def constrained(state, rest):
        return uneven_step(jax.lax.with_sharding_constraint(state, h), **rest)

    rest = drawn(uneven)
    message = "axis of 6 is sharded over 4 devices .'h'.; expected a number that divides it"
    refused(message, lambda: jax.jit(constrained)(rest.pop("state"), rest), jax.errors.JaxRuntimeError)
    # Where XLA does not know by which axes of a mesh.
    from ssu_bridge.frontends.jax.sharding.automatic import _known

    message = "expected arrays sharded by NamedSharding over one mesh, got SingleDeviceSharding.*jax.set_mesh"
    refused(message, lambda: _known(jax.sharding.SingleDeviceSharding(jax.devices()[1])))


def test_xlas_older_partitioner_is_refused():
    case = Case("indices", sequences=4, slots=8, nheads=4, headdim=8, dstate=16, indices=(4, 0, 2, 7))
    there = put(case.arrays(seed=4), mesh_of(s=4), {"x": P("s")})
    step = functools.partial(ssu_bridge.update, **case.flags, backend="cpu")
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        refused("only Shardy", lambda: step(**there))
        refused("only Shardy", lambda: jax.jit(step)(**there))
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)


def test_explicit_axes():
    for G in (8, 2, 1):
        case = Case(f"{G} groups", nheads=8, ngroups=G, headdim=8, dstate=16)
        mesh = mesh_of(AxisType.Explicit, h=4)
        with jax.set_mesh(mesh):
            check(case, mesh, heads(), eager=True)
    own = Case("own slots", sequences=8, slots=8, nheads=4, headdim=8, dstate=16, indices=None)
    mesh = mesh_of(AxisType.Explicit, s=2, h=4)
    with jax.set_mesh(mesh):
        check(own, mesh, {**{n: P("s", "h") for n in ("state", "x", "z", "dt")}, "B": P("s"), "C": P("s")}, eager=True)
        arrays = put(own.arrays(seed=4), mesh, {"state": P("s", "h"), "x": P("s", "h")})
        expected = ssu_bridge.update(**own.arrays(seed=4), **own.flags)
        out, state = jax.jit(functools.partial(ssu_bridge.update, **own.flags, backend="xla"))(**arrays)
        assert jax.typeof(state).sharding.spec == P("s", "h", None, None), state.sharding
        np.testing.assert_allclose(out, expected[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(state, expected[1], rtol=1e-5, atol=1e-5)
        there = put(own.arrays(seed=4), mesh, {"state": P(None, None, None, "h")})
        refused("dstate.*shard heads", lambda: ssu_bridge.update(**there, **own.flags, backend="cpu"))
        refused(
            "dstate.*shard heads", lambda: jax.jit(lambda a: ssu_bridge.update(**a, **own.flags, backend="cpu"))(there)
        )
    # Copies of the arguments, too, lie where those do.
    report = ssu_bridge.check(
        **put(own.arrays(seed=4), mesh, {"state": P("s", "h"), "x": P("s", "h")}), **own.flags, backend="cpu"
    )
    assert report.passed, report


def test_shard_map():
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
    whole = dict(
        arrays, state_batch_indices=arrays["state_batch_indices"] + np.repeat(np.arange(4), 2).astype("int32") * 4
    )
    expected = ssu_bridge.update(**whole, **case.flags)
    assert np.array_equal(out, expected[0])
    assert np.array_equal(state, expected[1])
    # Over one axis of the mesh alone.
    some = {"mesh": mesh, "in_specs": ({n: P() for n in arrays},), "out_specs": P(), "axis_names": {"s"}}
    part = jax.shard_map(lambda arrays: step(**arrays), **some)
    refused("axis_names", lambda: jax.jit(part)(put(case.arrays(seed=4), mesh, {})))


def test_compiled_ahead():
    case = Case("ahead", nheads=8, headdim=8, dstate=16)
    expected = alone(case, 1)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = mesh_of(kind, h=4)
        with jax.set_mesh(mesh):
            there = put(drawn(case), mesh, heads())
            types = {n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for n, a in there.items()}
            changed, rest = parted(types)
            program = jax.jit(lambda changed, rest: step(case, {**changed, **rest}), donate_argnums=0)
            compiled = program.lower(changed, rest).compile()
            assert not re.search(COLLECTIVE, compiled.as_text())
            changed, rest = parted(there)
            places = {name: addresses(array) for name, array in changed.items()}
            after = compiled(changed, rest)
            same(after, expected)
            assert {name: addresses(after[name]) for name in places} == places
            elsewhere = put(drawn(case), mesh, {"state": P(None, None, "h")})
            refused("sharding", lambda: compiled(*parted(elsewhere)), ValueError)


def test_axes_of_one_device_and_axes_of_both_kinds():
    case = Case("indices", sequences=4, slots=8, nheads=4, headdim=8, dstate=16, indices=(4, 0, 2, 7))
    both = {"state": P("d", "h"), "x": P("d", "h")}
    drafts = Case("drafts", nheads=8, headdim=8, dstate=16, tokens=2, steps=2)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = mesh_of(kind, d=1, h=4)
        with jax.set_mesh(mesh):
            check(case, mesh, both, eager=True)
            # Such an axis shards nothing, wherever it is named.
            check(case, mesh, {"state": P(None, "h", None, "d"), "x": P(None, "h", "d")}, eager=True)
            check(drafts, mesh, {"state": P(None, "h"), "intermediate_states": P("d", None, "h")}, eager=True)
            check(drafts, mesh, {"state": P("d", "h"), "intermediate_states": P(None, None, "h")}, eager=True)
    mesh = jax.make_mesh((2, 4), ("d", "h"), axis_types=(AxisType.Auto, AxisType.Explicit))
    with jax.set_mesh(mesh):
        check(case, mesh, {"state": P(None, "h"), "x": P(None, "h")}, eager=True)
        # What an automatic axis shards beside an explicit one is gathered: right, but not in place.
        expected = alone(case, 1)
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
            gathered = step(case, put(drawn(case), mesh, {"state": P(None, "h", "d")}))
        same(gathered, expected)


def test_references():
    case = Case("references", nheads=8, headdim=8, dstate=16)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = mesh_of(kind, h=4)
        with jax.set_mesh(mesh):
            check_reference(case, mesh, heads())


def test_mapped():
    own = Case("own slots", sequences=4, slots=4, nheads=8, headdim=64, dstate=128, indices=None)
    indexed = Case("indices", nheads=8, headdim=64, dstate=128)

    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = mesh_of(kind, h=4)
        with jax.set_mesh(mesh):
            check_mapped(indexed, mesh, P(None, None, "h"))
            check_mapped(own, mesh, P("h"))
        mesh = mesh_of(kind, v=2, h=4)
        with jax.set_mesh(mesh):
            check_mapped(own, mesh, P("v", None, "h"))
            for spec in (P("v", "h"), P(None, "v", "h")):
                check_mapped(own, mesh, spec)
            for spec in (P("v"), P("v", None, "h")):
                check_mapped(indexed, mesh, spec)
            compiles_once(indexed, mesh, P("v"))
            if kind is AxisType.Auto:
                continue
            # Types may not name one axis of the mesh twice.
            there = put(drawn(own), mesh, {"state": P(None, "h")})
            xs = put({"x": np.stack([drawn(own)["x"]] * 4)}, mesh, {"x": P("h")})["x"]
            for run in (lambda mapped: mapped(xs), lambda mapped: jax.jit(mapped)(xs)):
                call = functools.partial(run, jax.vmap(lambda x: step(own, {**there, "x": x})))
                refused("state: each call's is sharded .*'h'.* jax.vmap maps", call)


def test_mapped_to_a_number_that_the_devices_do_not_divide():
    case, mesh = Case("own slots", sequences=4, slots=4, nheads=8, headdim=8, dstate=16, indices=None), mesh_of(v=8)
    calls = [drawn(case, seed) for seed in range(8)]
    xs, states = (put({n: np.stack([call[n] for call in calls])}, mesh, {n: P("v")})[n] for n in ("x", "state"))

    def one(state, x):
        return step(case, {**calls[0], "state": jnp.array(state), "x": x})

    for cut in (lambda a: a[:6], lambda a: jnp.concatenate([a, a[:1]])):
        both = jax.jit(lambda states, xs: jax.vmap(one)(cut(states), cut(xs)))(states, xs)
        mine = jax.jit(lambda xs: jax.vmap(one, (None, 0))(calls[0]["state"], cut(xs)))(xs)
        for place, j in enumerate(cut(jnp.arange(8))):
            same({n: a[place] for n, a in both.items()}, one(calls[j]["state"], calls[j]["x"]))
            same({n: a[place] for n, a in mine.items()}, one(calls[0]["state"], calls[j]["x"]))
    # Slots beside indices are refused, eagerly as without jax.vmap.
    case = Case("indices", slots=8, nheads=8, headdim=8, dstate=16)
    there = put({**drawn(case), "state": np.stack([drawn(case)["state"]] * 2)}, mesh, {"state": P(None, "v")})
    states = there.pop("state")
    refused("slots are sharded", lambda: jax.vmap(lambda state: step(case, {**there, "state": state}))(states))


def test_mapped_twice_around_a_scan():
    case = Case("indices", nheads=8, headdim=8, dstate=16)
    calls, shared = [drawn(case, seed) for seed in range(4)], drawn(case)
    stacked = {n: np.stack([call[n] for call in calls]) for n in ("state", "x")}
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = mesh_of(kind, v=2, h=4)
        with jax.set_mesh(mesh):
            rest = put({**shared, **stacked}, mesh, {"state": P(None, None, "h"), "x": P("v", None, "h")})
            states, xs = rest.pop("state"), rest.pop("x")

            def scan(state, x):
                return decode(case, 2, {"state": state}, {**rest, "x": x})

            run = jax.jit(jax.vmap(jax.vmap(scan, in_axes=(None, 0)), in_axes=(0, None)))
            assert not re.search(COLLECTIVE, run.lower(states, xs).compile().as_text())
            changed, outs = jax.tree.map(np.array, run(states, xs))
        for i, j in np.ndindex(4, 4):
            one = {**shared, "state": calls[i]["state"], "x": calls[j]["x"]}
            same({"out": outs[i, j], "state": changed["state"][i, j]}, alone(case, 2, one))
