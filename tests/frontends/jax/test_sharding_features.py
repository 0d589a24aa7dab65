"""Steps on sharded arrays that ask for more than one token and a float state."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from copied import copied, jax_array
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from sharded import (
    COLLECTIVE,
    alone,
    channels,
    check,
    decode_eagerly,
    decode_in_place,
    drawn,
    heads,
    mesh_of,
    put,
    refused,
    same,
    sequences,
    step,
    written,
)
from thinned import thinned

from ssu_bridge.cases import Case
from ssu_bridge.core import rounding
from ssu_bridge.frontends.jax.metadata import WRITTEN

case = functools.partial(Case, nheads=8, headdim=8, dstate=16)
own = functools.partial(case, sequences=8, slots=8, indices=None)


def dtypes_of_states(daily, *others):
    """Return parameters for dtypes of states: each of the others meets the same code, in another kernel."""
    return pytest.mark.parametrize(
        "dtype", [daily, *(pytest.param(name, marks=pytest.mark.nightly) for name in others)]
    )


@dtypes_of_states("int8", "int16", "float8_e4m3fn")
def test_quantised(dtype):
    dtypes = {"state": dtype}
    for groups, k in ((2, 4), (8, 2)):
        check(case("heads", ngroups=groups, dtypes=dtypes), mesh_of(h=k), heads(), eager=True)
    check(case("channels", dtypes=dtypes), mesh_of(p=4), channels(), eager=True)
    # With one token x looks like the scales.
    check(own("sequences", dtypes=dtypes, tokens=2), mesh_of(s=4), sequences(), eager=True)
    mesh = mesh_of(AxisType.Explicit, h=4)
    with jax.set_mesh(mesh):
        check(case("explicit", dtypes=dtypes), mesh, heads(), eager=True)


def test_scales_go_with_their_rows():
    there = put(drawn(case("apart", dtypes={"state": "int8"})), mesh_of(h=4), {"state": P(None, "h")})
    refused("state_scale: expected to be sharded as the state is", lambda: step(case("apart"), there))
    assert not there["state"].is_deleted()


def test_tokens():
    check(case("tokens", tokens=3), mesh_of(h=4), heads(2), eager=True)
    check(case("channels", tokens=3, untied=("A", "dt", "D", "dt_bias")), mesh_of(p=8), channels(2))
    check(own("sequences", tokens=3), mesh_of(s=4), sequences(), eager=True)
    packed = case("packed", tokens=9, cu_seqlens=(0, 4, 4, 9))
    check(packed, mesh_of(h=4), heads(), eager=True)
    check(packed, mesh_of(p=4), channels())
    each = case("a destination each", tokens=2, slots=9, indices=(4, 0, 2), destinations=((1, 3), (0, -1), (5, 6)))
    check(each, mesh_of(h=4), heads(2), eager=True)
    tables = {
        "slots": 12,
        "indices": ((4, 1, 6), (0, 8, 9), (2, 3, 5)),
        "destinations": ((4, 1, 6), (0, 8, 9), (2, 3, -1)),
    }
    check(case("accepted", tokens=3, accepted=(2, 1, 0), **tables), mesh_of(h=4), heads(2), eager=True)
    many = case(
        "accepted, packed", tokens=7, cu_seqlens=(0, 3, 4, 7), accepted=(3, 1, 2), dtypes={"state": "int8"}, **tables
    )
    check(many, mesh_of(h=2), heads(), eager=True)
    mesh = mesh_of(AxisType.Explicit, h=4)
    with jax.set_mesh(mesh):
        check(packed, mesh, heads())
        check(each, mesh, heads(2), eager=True)
        check(many, mesh, heads())
    # Packed sequences are of any length: no device knows where its own begin.
    apart = own("packed, own slots", tokens=16, cu_seqlens=tuple(range(0, 17, 2)))
    there = put(drawn(apart), mesh_of(s=4), {"state": P("s")})
    refused("cu_seqlens.*jax.shard_map", lambda: step(apart, there))


@dtypes_of_states("int8", "float32", "bfloat16")
def test_intermediate_states(dtype):
    kind = {"dtypes": {"state": dtype}, "tokens": 3, "steps": 4}
    check(case("entries", entries=(5, 1, 6), spare_entries=2, **kind), mesh_of(h=4), heads(2), eager=True)
    check(case("slots", **kind), mesh_of(p=4), channels(2))
    check(case("kept", disable_state_update=True, **kind), mesh_of(h=4), heads(2), eager=True)
    check(own("sequences", **kind), mesh_of(s=4), sequences(), eager=True)
    mesh = mesh_of(AxisType.Explicit, s=2, h=2)
    with jax.set_mesh(mesh):
        both = {**dict.fromkeys(("x", "z", "dt"), P("s", None, "h")), **written(P("s", "h"), P("s", None, "h"))}
        check(own("both", **kind), mesh, both, eager=True)


def test_intermediate_states_of_packed_sequences():
    check(
        case("packed", tokens=6, cu_seqlens=(0, 3, 3, 6), steps=2, entries=(1, 3, 0)), mesh_of(h=4), heads(), eager=True
    )
    # What cannot go with its slot.
    for more in ({"entries": tuple(range(8))}, {"spare_entries": 8}):
        apart = own("entries of their own", tokens=2, steps=2, **more)
        there = put(drawn(apart), mesh_of(s=4), {"state": P("s"), "intermediate_states": P("s")})
        refused("intermediate_states: expected an entry for each slot.*jax.shard_map", lambda: step(apart, there))


TREE = (-1, 0, 0, 1)


@dtypes_of_states("int8", "float32")
def test_trees(dtype):
    nodes = {"slots": 16, "destinations": tuple(tuple(range(i, i + 4)) for i in (4, 8, 12))}
    trees = {"tokens": 4, "parents": (TREE, (3, -1, 0, 2), (-1, 0, 1, 2))}
    packed = {"tokens": 9, "parents": (*TREE, -1, *TREE), "cu_seqlens": (0, 4, 5, 9)}
    dtypes = {"state": dtype}
    check(case("heads", **trees, **nodes, dtypes=dtypes), mesh_of(h=4), heads(2), eager=True)
    check(case("channels", **trees, steps=4, dtypes=dtypes), mesh_of(p=4), channels(2), eager=True)
    check(case("packed", **packed, **nodes, dtypes=dtypes), mesh_of(h=2), heads(), eager=True)
    own_trees = own("sequences", tokens=4, steps=5, parents=(TREE, (-1,) * 4) * 4, dtypes=dtypes)
    # Each device has those of its sequences, whether they lie there or on each. x must not look like the scales.
    for more in ({}, {"parent_tokens": P("s")}):
        check(own_trees, mesh_of(s=4), {**sequences(), **more}, eager=True)
    mesh = mesh_of(AxisType.Explicit, h=4)
    with jax.set_mesh(mesh):
        check(case("explicit", **trees, **nodes, dtypes=dtypes), mesh, heads(2), eager=True)
        check(case("explicit, packed", **packed, **nodes, dtypes=dtypes), mesh, heads())


def test_fresh_sequences_and_strides():
    flags = {"has_initial_state": (True, False, True)}
    for more in ({}, {"tokens": 5, "steps": 2, "intermediate_stride": 2}):
        axes = 2 if more else 1
        check(case("heads", **flags, **more), mesh_of(h=4), heads(axes), eager=True)
        check(case("channels", **flags, **more), mesh_of(p=4), channels(axes))
        each = own("sequences", has_initial_state=(True, False) * 4, **more)
        for own_flags in ({}, {"has_initial_state": P("s")}):
            check(each, mesh_of(s=4), {**sequences(), **own_flags}, eager=True)
        mesh = mesh_of(AxisType.Explicit, s=2, h=2)
        with jax.set_mesh(mesh):
            check(case("explicit", **flags, **more), mesh, heads(axes), eager=True)
    check(case("packed", **flags, tokens=9, cu_seqlens=(0, 4, 4, 9)), mesh_of(h=4), heads(), eager=True)


@dtypes_of_states("int8", "float32")
def test_no_update(dtype):
    kind = {"disable_state_update": True, "dtypes": {"state": dtype}, "tokens": 2}
    check(case("heads", **kind), mesh_of(h=4), heads(2), eager=True)
    check(own("sequences", **kind), mesh_of(s=4), sequences(), eager=True)


def test_no_update_keeps_the_array():
    arrays = put(drawn(case("kept", disable_state_update=True)), mesh_of(h=4), heads())
    assert step(case("kept", disable_state_update=True), arrays)["state"] is arrays["state"]


@dtypes_of_states("int8", "bfloat16", "float8_e4m3fn")
def test_stochastic_rounding(dtype):
    kind = own("stochastic", ngroups=4, seed=2**62 + 12345, dtypes={"state": dtype})
    mesh, specs = mesh_of(s=2, h=4), {**dict.fromkeys(("x", "z", "dt", "B", "C", *WRITTEN), P("s", "h"))}
    first = decode_in_place(kind, put(drawn(kind), mesh, specs), 1)

    # The same bits each time and on each way; with another seed others.
    ways = [decode_eagerly(kind, put(drawn(kind), mesh, specs), 1)]
    explicit = mesh_of(AxisType.Explicit, s=2, h=4)
    with jax.set_mesh(explicit):
        ways += [call(kind, put(drawn(kind), explicit, specs), 1) for call in (decode_in_place, decode_eagerly)]
    own_specs = {n: specs.get(n, P("h") if n in ("A", "D", "dt_bias") else P()) for n in drawn(kind)}
    results = dict.fromkeys(first, specs["x"])
    by_hand = jax.shard_map(lambda arrays: step(kind, arrays), mesh=mesh, in_specs=(own_specs,), out_specs=results)
    ways += [by_hand(put(drawn(kind), mesh, own_specs))]
    for way in ways:
        same(way, first)
    other = decode_in_place(kind, {**put(drawn(kind), mesh, specs), "rand_seed": jax_array([1, 2], "uint32")}, 1)
    assert (np.array(other["state"]) != np.array(first["state"])).any()

    # Each shard is a call of its own, with its place along the axes of the mesh folded into the seed.
    for i, j in np.ndindex(2, 4):
        arrays, key = drawn(kind), jax.random.wrap_key_data(drawn(kind)["rand_seed"], impl="threefry2x32")
        rows, places = slice(4 * i, 4 * i + 4), slice(2 * j, 2 * j + 2)
        part = {
            n: a[rows, j : j + 1] if n in ("B", "C") else a[rows, places] if n in specs else a[places]
            for n, a in arrays.items()
            if n != "rand_seed"
        }
        seed = jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, j), i))
        one = step(kind, {**copied(part), "rand_seed": seed})
        same({n: np.array(a)[rows, places] for n, a in first.items()}, one)

    # What is stored is one of the two neighbours of what a float32 state would be, and each sometimes.
    arrays = drawn(kind)
    scale = arrays.pop("state_scale", None)
    state = arrays.pop("state").astype("float32") * (1 if scale is None else scale[..., None])
    exact = step(kind, {n: a for n, a in arrays.items() if n != "rand_seed"} | {"state": state})
    assert np.array_equal(exact["out"], first["out"])
    scaled, scales = (exact["state"], None) if scale is None else rounding.scale_rows(np, exact["state"], dtype)
    assert scale is None or np.array_equal(scales, first["state_scale"])
    word = np.zeros_like(scaled, "uint32")
    down, up = (rounding.rounded(scaled, dtype, w).astype("float32") for w in (~word, word))
    stored = np.array(first["state"]).astype("float32")
    assert ((stored == down) | (stored == up)).all()
    assert (stored[down != up] == down[down != up]).any()
    assert (stored[down != up] == up[down != up]).any()


def test_shards_round_each_in_its_own_way():
    # Shards of the same numbers are rounded each in its own way, and copies of one shard alike.
    twins = case("twins", sequences=2, slots=2, indices=None, seed=7, dtypes={"state": "bfloat16"})
    arrays = {
        n: np.repeat(a[:, :1], a.shape[1], 1)
        if n in ("state", "x", "z", "dt", "B", "C")
        else np.repeat(a[:1], len(a))
        if n in ("A", "D", "dt_bias")
        else a
        for n, a in drawn(twins).items()
    }
    there = put(arrays, mesh_of(h=4, copies=2), heads())
    state = step(twins, there)["state"]
    shards = {}
    for shard in state.addressable_shards:
        shards.setdefault(str(shard.index), []).append(np.array(shard.data).tobytes())
    assert len(shards) == 4
    assert all(len(copies) == 2 and len(set(copies)) == 1 for copies in shards.values())
    assert len({copies[0] for copies in shards.values()}) == 4

    # Calls that are mapped over a state that is not draw numbers of their own, whatever device each is on.
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = mesh_of(kind, v=4)
        with jax.set_mesh(mesh):
            there = put(drawn(twins), mesh, {})
            xs = put({"x": np.stack([drawn(twins)["x"]] * 8)}, mesh, {"x": P("v")})["x"]
            states = jax.jit(jax.vmap(lambda x: step(twins, {**there, "x": x})["state"]))(xs)
        assert len({np.array(state).tobytes() for state in np.array(states)}) == 8

    # States after each token are rounded in the same way.
    drafts = case(
        "drafts", ngroups=1, tokens=3, steps=3, disable_state_update=True, seed=7, dtypes={"state": "float16"}
    )
    first, again = (decode_in_place(drafts, put(drawn(drafts), mesh_of(h=4), heads(2)), 1) for _ in range(2))
    same(first, again)
    nearest = alone(drafts, 1, {n: a for n, a in drawn(drafts).items() if n != "rand_seed"})
    got, expected = (np.array(r["intermediate_states"]).astype("float32") for r in (first, nearest))
    assert (got != expected).any()
    np.testing.assert_allclose(got, expected, rtol=2.0**-10, atol=2.0**-24)


DRAFTS = {"tokens": 2, "steps": 2}
MAPPED_KINDS = [
    case("drafts", **DRAFTS),
    case("quantised drafts", **DRAFTS, dtypes={"state": "int8"}),
    case("packed", tokens=9, cu_seqlens=(0, 4, 4, 9)),
    case("trees", tokens=4, steps=4, parents=(TREE,) * 3),
    case("fresh", tokens=4, steps=2, intermediate_stride=2, has_initial_state=(False, True, False)),
    case("rounded each", **DRAFTS, dtypes={"state": "int8"}, round_each_token=True),
    case("a state that is only read", **DRAFTS, disable_state_update=True),
    own("own slots", **DRAFTS),
]
SUBSETS = (("x",), ("state",), ("state", "x"), ("state_batch_indices", "x"), ("x", *WRITTEN))
# The kind of the mesh's axes, and whether heads are sharded as well as calls.
MESHES = tuple(itertools.product((AxisType.Auto, AxisType.Explicit), (False, True)))


# Each is a compilation: by default each kind of call meets each choice of mapped arrays, on one of the meshes.
@pytest.mark.parametrize(
    ("kind", "mapped", "mesh"),
    thinned(MAPPED_KINDS, SUBSETS, MESHES, one_in=len(MESHES)),
    ids=lambda value: value.name if isinstance(value, Case) else "+".join(map(str, value)),
)
def test_mapped_with_all_that_a_call_can_have(kind, mapped, mesh):
    axes, split = mesh
    mesh, calls = mesh_of(axes, v=2, h=4), [drawn(kind, seed) for seed in range(4)]
    names = [name for name in calls[0] if name in mapped]
    arrays = {n: np.stack([call[n] for call in calls]) if n in names else a for n, a in calls[0].items()}
    in_axes = {n: 0 if n in names else None for n in arrays}
    lead = {n: ("v",) if n in names else () for n in arrays}
    over_heads = {n: P(*lead[n], *spec) for n, spec in heads().items() if n in WRITTEN and n in arrays}
    with jax.set_mesh(mesh):
        specs = {n: P(*axes) for n, axes in lead.items()} | (over_heads if split else {})
        run = jax.jit(jax.vmap(functools.partial(step, kind), in_axes=(in_axes,)))
        there = put(arrays, mesh, specs)
        compiled = run.lower(there).compile()
        got = compiled(there)
    assert not re.search(COLLECTIVE, compiled.as_text())
    for j, call in enumerate(calls):
        one = alone(kind, 1, {n: call[n] if n in names else a for n, a in calls[0].items()})
        same({n: np.array(got[n]) if got[n].ndim == a.ndim else np.array(got[n])[j] for n, a in one.items()}, one)


def test_stochastic_rounding_where_jax_does_not_say_what_varies():
    twins = case("twins", sequences=2, slots=2, indices=None, seed=7, dtypes={"state": "bfloat16"})
    arrays = copied(drawn(twins))
    states = jnp.stack([arrays.pop("state")] * 8)

    def stored(state, rest, fold):
        if fold:
            key = jax.random.wrap_key_data(rest["rand_seed"], impl="threefry2x32")
            rest = {**rest, "rand_seed": jax.random.key_data(jax.random.fold_in(key, jax.lax.axis_index("s")))}
        return step(twins, {**rest, "state": state})["state"]

    def shards(fold, check_vma):
        def body(states, rest):
            return stored(states[0], rest, fold)[None]

        specs = {"in_specs": (P("s"), P()), "out_specs": P("s"), "check_vma": check_vma}
        return jax.shard_map(body, mesh=mesh_of(s=8), **specs)(states, arrays)

    def mapped(fold):
        return jax.pmap(functools.partial(stored, fold=fold), axis_name="s", in_axes=(0, None))(states, arrays)

    def several(states):
        return len({np.array(state).tobytes() for state in states})

    assert several(shards(False, True)) == 8
    for way in (functools.partial(shards, check_vma=False), mapped):
        assert several(way(False)) == 1
        assert several(way(True)) == 8
