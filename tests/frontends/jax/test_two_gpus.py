"""Steps on arrays that are sharded over two GPUs, and arrays on the second one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from sharded import (
    channels,
    check,
    check_mapped,
    check_reference,
    check_shard_map,
    decode_eagerly,
    decode_in_place,
    drawn,
    heads,
    mesh_of,
    put,
    same,
    sequences,
    step,
)
from sharded_replay import HEADS, OVER_HEADS, OVER_SEQUENCES, check_sharded

import ssu_bridge
from ssu_bridge.testing.cases import Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="gpu: this machine has one GPU"),
]
case = functools.partial(Case, nheads=8, headdim=16, dstate=32)
own = functools.partial(case, sequences=4, slots=4, indices=None)


@pytest.mark.parametrize("groups", (8, 4, 2, 1))
def test_heads_and_groups(groups):
    mesh = mesh_of(h=2)
    check(case("groups", ngroups=groups), mesh, heads(), eager=True)
    if groups > 1:
        sharded = {"B": P(None, "h"), "C": P(None, "h"), "A": P("h"), "D": P("h"), "dt_bias": P("h")}
        check(case("sharded groups", ngroups=groups), mesh, {**heads(), **sharded})
    check(case("three groups over two", nheads=6, ngroups=3), mesh, heads())


def test_channels_and_sequences():
    check(case("channels"), mesh_of(p=2), channels(), eager=True)
    check(own("sequences"), mesh_of(s=2), sequences(), eager=True)


def test_explicit_axes():
    mesh = mesh_of(AxisType.Explicit, h=2)
    with jax.set_mesh(mesh):
        check(case("explicit"), mesh, heads(), eager=True)


@pytest.mark.parametrize("dtype", ("bfloat16", "float16", "int8"))
def test_tokens_and_dtypes(dtype):
    dtypes = {"state": dtype}
    check(case("tokens", tokens=3, steps=4, dtypes=dtypes), mesh_of(h=2), heads(2))
    check(case("packed", tokens=9, cu_seqlens=(0, 4, 4, 9), dtypes=dtypes), mesh_of(h=2), heads())


def test_the_step_of_a_large_model():
    large = Case(
        "large", sequences=64, slots=80, nheads=64, headdim=64, dstate=128, ngroups=8, indices=tuple(range(64))
    )
    check(large, mesh_of(h=2), heads(), eager=True)


@pytest.mark.parametrize("kind", (AxisType.Auto, AxisType.Explicit), ids=str)
def test_vmap(kind):
    mesh = mesh_of(kind, h=2)
    with jax.set_mesh(mesh):
        check_mapped(case("mapped"), mesh, P(None, None, "h"))
        check_mapped(own("mapped sequences"), mesh, P("h"))
        check_mapped(case("mapped indices"), mesh, P("h"))
        check_mapped(own("slots"), mesh, P(None, "h"))


@pytest.mark.parametrize("kind", (AxisType.Auto, AxisType.Explicit), ids=str)
def test_references(kind):
    mesh = mesh_of(kind, h=2)
    with jax.set_mesh(mesh):
        check_reference(case("references"), mesh, heads())


@pytest.mark.parametrize("dtype", ("bfloat16", "int8"))
def test_stochastic_rounding(dtype):
    drawing, mesh = case("stochastic", ngroups=8, seed=2**62 + 12345, dtypes={"state": dtype}), mesh_of(h=2)
    specs = {**heads(), "B": P(None, "h"), "C": P(None, "h")}
    first = decode_in_place(drawing, put(drawn(drawing), mesh, specs), 1)
    ways = [decode_eagerly(drawing, put(drawn(drawing), mesh, specs), 1)]
    explicit = mesh_of(AxisType.Explicit, h=2)
    with jax.set_mesh(explicit):
        ways.append(decode_in_place(drawing, put(drawn(drawing), explicit, specs), 1))
    for way in ways:
        same(way, first)
    # Each shard is a call of its own, with its place folded into the seed.
    arrays, half = drawn(drawing), drawing.nheads // 2
    key = jax.random.wrap_key_data(arrays.pop("rand_seed"), impl="threefry2x32")
    for j in range(2):
        places = slice(j * half, (j + 1) * half)
        part = {
            n: jnp.array(a[:, places] if n in specs else a[places] if n in ("A", "D", "dt_bias") else a)
            for n, a in arrays.items()
        }
        alone = step(drawing, {**part, "rand_seed": jax.random.key_data(jax.random.fold_in(key, j))})
        same({n: np.array(a)[:, places] for n, a in first.items()}, alone)


@pytest.mark.parametrize("kind", (AxisType.Auto, AxisType.Explicit), ids=str)
def test_intermediate_states_with_indices(kind):
    mesh = mesh_of(kind, h=2)
    with jax.set_mesh(mesh):
        for dtype in ("float32", "int8"):
            drafts = case("drafts", tokens=3, steps=4, entries=(5, 1, 6), spare_entries=2, dtypes={"state": dtype})
            check(drafts, mesh, heads(2), eager=True)


# --- Calls of several tokens, in the matrix form and in the loop ---

layer = functools.partial(Case, nheads=16, headdim=64, dstate=128, ngroups=4)
MIXED = {"*": "bfloat16", "A": "float32"}
FORMS = {"bfloat16": ("matrix", "loop"), "float32": ("matrix", "loop"), "int8": ("matrix", "loop")}
TREES = ((-1, 0, 0, 1, 1), (-1, 0, 1, 2, 0), (-1, -1, 0, 0, 3))


def check_everywhere(of, token_axes):
    """Assert it over heads, with and without their groups, under automatic and explicit axes and in shard_map."""
    rows = P(*[None] * token_axes, "h")
    groups = {"B": rows, "C": rows, **dict.fromkeys(("A", "D", "dt_bias"), P("h"))}
    check(of, mesh_of(h=2), heads(token_axes), eager=True)
    check(of, mesh_of(h=2), {**heads(token_axes), **groups})
    explicit = mesh_of(AxisType.Explicit, h=2)
    with jax.set_mesh(explicit):
        check(of, explicit, heads(token_axes))
    check_shard_map(of, mesh_of(h=2), {**heads(token_axes), **groups})


@pytest.mark.parametrize(("state", "form"), [(state, form) for state, forms in FORMS.items() for form in forms])
@pytest.mark.parametrize("count", (4, 16))
def test_verification(count, state, form):
    dtypes = {**MIXED, "state": state}
    with ssu_bridge.using(algorithm=form):
        check_everywhere(layer("tokens", tokens=count, dtypes=dtypes), 2)
        lengths = (0, count, count, 2 * count + 1)
        check_everywhere(layer("packed", tokens=lengths[-1], cu_seqlens=lengths, dtypes=dtypes), 1)
        many = layer("sequences", sequences=4, slots=4, indices=None, tokens=count, dtypes=dtypes)
        check(many, mesh_of(s=2), sequences(), eager=True)


@pytest.mark.parametrize("state", ("float32", "bfloat16"))
def test_prompts(state):
    of = functools.partial(layer, dtypes={**MIXED, "state": state})
    check_everywhere(of("one", sequences=1, slots=3, indices=(2,), tokens=2048), 2)
    check_everywhere(of("packed", sequences=2, slots=3, indices=(2, 0), tokens=2048, cu_seqlens=(0, 1500, 2048)), 1)
    fresh = {"has_initial_state": (False, True), "steps": 4, "intermediate_stride": 256}
    check_everywhere(of("fresh", sequences=2, slots=3, indices=(2, 0), tokens=1024, **fresh), 2)


@pytest.mark.parametrize("state", ("float32", "bfloat16", "int8"))
def test_trees(state):
    nodes = ((6, 7, 8, 9, 10), (11, 12, 13, -1, 5), (14, 15, 1, 3, 0))
    of = layer("tree", tokens=5, slots=16, destinations=nodes, parents=TREES, dtypes={**MIXED, "state": state})
    check_everywhere(of, 2)


@pytest.mark.parametrize("state", ("int8", "float8_e4m3fn", "int16"))
def test_one_token_of_a_quantised_state(state):
    check_everywhere(layer("quantised", dtypes={**MIXED, "state": state}), 1)


@pytest.mark.parametrize("kind", (AxisType.Auto, AxisType.Explicit), ids=str)
@pytest.mark.parametrize("state", ("bfloat16", "float32", "int8"))
@pytest.mark.parametrize("count", (1, 4))
def test_replay(count, state, kind):
    of = functools.partial(layer, tokens=count, window=16, most=count, dtypes={**MIXED, "state": state})
    phases = {"starts": (0, 7, 15, 2, 16, 4), "pending": (16, 2, 15, 14, 9, 0)}
    own = {"sequences": 6, "slots": 6, "indices": None}
    check_sharded(of("groups", **phases), mesh_of(kind, h=2), OVER_HEADS | {"replay_B": HEADS}, same)
    check_sharded(of("one group", ngroups=1, **phases), mesh_of(kind, h=2), OVER_HEADS, same)
    check_sharded(of("sequences", **phases, **own), mesh_of(kind, s=2), OVER_SEQUENCES, same)


# Of the sizes that FlashInfer takes.
sized = functools.partial(Case, nheads=8, headdim=64, dstate=64)


@pytest.mark.parametrize("groups", (8, 2, 1))
def test_flashinfer_over_heads(groups):
    with ssu_bridge.using(backend="flashinfer"):
        check(sized("heads", ngroups=groups), mesh_of(h=2), heads(), eager=True)
        check(sized("tokens", ngroups=groups, tokens=3), mesh_of(h=2), heads(2))


def test_flashinfer_over_sequences_and_explicit_axes():
    mesh = mesh_of(AxisType.Explicit, h=2)
    with ssu_bridge.using(backend="flashinfer"):
        check(sized("sequences", sequences=4, slots=4, indices=None), mesh_of(s=2), sequences(), eager=True)
        with jax.set_mesh(mesh):
            check(sized("explicit"), mesh, heads(), eager=True)


def test_flashinfer_refuses_shards_that_it_cannot_take():
    case, mesh = sized("channels", headdim=48), mesh_of(p=2)
    with (
        ssu_bridge.using(backend="flashinfer"),
        pytest.raises(jax.errors.JaxRuntimeError, match="headdim .*, and this is 24"),
    ):
        decode_in_place(case, put(drawn(case), mesh, channels()))
