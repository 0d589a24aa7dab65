"""Replay under JAX's transforms: sharded over devices, mapped, exported."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded import mesh_of
from sharded_replay import HEADS, OVER_HEADS, OVER_SEQUENCES, RINGS, check_sharded, decode, drawn

import ssu_bridge
from ssu_bridge.testing.cases import Case

SIZES = {"nheads": 8, "headdim": 8, "dstate": 16, "tokens": 2, "window": 5, "most": 3}
SLOTS = Case("slots", ngroups=4, starts=(0, 7, 6, 2, 1, 4), pending=(5, 2, 1, 3, 4, 0), **SIZES)
ONE = Case("one group", ngroups=1, starts=SLOTS.starts, pending=SLOTS.pending, **SIZES)
TWO = Case("two groups", ngroups=2, starts=SLOTS.starts, pending=SLOTS.pending, **SIZES)
EIGHT = {"starts": (0, 1, 2, 3, 4, 5, 6, 7), "pending": (5, 4, 3, 2, 1, 0, 5, 5)}
OWN = Case("own slots", sequences=8, slots=8, indices=None, ngroups=2, **EIGHT, **SIZES)


def close(got, expected):
    for name, array in expected.items():
        np.testing.assert_allclose(np.array(got[name]), np.array(array), 1e-5, 1e-5, err_msg=name)


SHARDED = {
    "heads of one group": (ONE, {"h": 4}, OVER_HEADS),
    "heads and groups": (SLOTS, {"h": 4}, OVER_HEADS | {"replay_B": HEADS}),
    "sequences": (OWN, {"s": 4}, OVER_SEQUENCES),
}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_state_stays_where_it_is(name, kind):
    case, sizes, specs = SHARDED[name]
    check_sharded(case, mesh_of(kind, **sizes), specs, close)


@pytest.mark.parametrize(
    ("case", "got"), [(SLOTS, "4 groups, which to_replay shards so"), (TWO, "2 groups, which cannot be")]
)
def test_a_ring_of_groups_goes_with_the_heads(case, got):
    mesh = mesh_of(h=4)
    arrays = {n: jax.device_put(a, NamedSharding(mesh, OVER_HEADS.get(n, P()))) for n, a in drawn(case).items()}
    message = f"replay_B: expected one group, or a multiple of 4 groups, sharded over 'h' as the heads are; got {got}"
    with pytest.raises(ssu_bridge.UnsupportedError, match=message):
        decode(case, "auto", arrays)
    assert not arrays["state"].is_deleted()


def test_to_replay_shards_the_rings_as_the_state():
    mesh = mesh_of(s=2, h=4)
    state = jax.device_put(drawn(OWN)["state"], NamedSharding(mesh, P("s", "h")))
    for groups, of_groups in ((4, "h"), (2, None)):
        made = ssu_bridge.to_replay(state, 5, 3, groups)
        wanted = P("s", "h"), P("s", of_groups), P("s", "h")
        for ring, spec in zip(made[1:], wanted, strict=True):
            assert ring.sharding.is_equivalent_to(NamedSharding(mesh, spec), ring.ndim)
    cursor = ssu_bridge.ReplayCursor.empty(8, 5, 3, like=state)
    assert cursor.start.sharding.is_equivalent_to(NamedSharding(mesh, P("s")), 1)


@pytest.mark.parametrize("backend", ["auto", "xla"])
@pytest.mark.parametrize("shared", [(), ("replay_start", "replay_pending", "B", "state_batch_indices")])
def test_mapped_calls_are_a_loop_of_them(backend, shared):
    shared = ("A", "D", "dt_bias", *shared)
    calls = [drawn(SLOTS, seed) for seed in range(3)]
    calls = [{n: (calls[0] if n in shared else call)[n] for n in call} for call in calls]
    stacked = {n: a if n in shared else jnp.stack([call[n] for call in calls]) for n, a in calls[0].items()}
    axes = {n: None if n in shared else 0 for n in stacked}
    step = functools.partial(decode, SLOTS, backend, steps=1)
    together = jax.jit(jax.vmap(step, in_axes=(axes,)))(stacked)
    for number, call in enumerate(calls):
        close({n: a[number] for n, a in together.items()}, step(call))


def test_a_program_with_open_sizes_is_exported():
    b, slots = export.symbolic_shape("b, s", constraints=["s >= b"])
    sizes = dict.fromkeys(("x", "z", "dt", "B", "C", "state_batch_indices"), b)
    sizes |= dict.fromkeys(("state", *RINGS, "replay_start", "replay_pending"), slots)
    arrays = drawn(SLOTS)
    kinds = {
        n: jax.ShapeDtypeStruct((sizes[n], *a.shape[1:]) if n in sizes else a.shape, a.dtype) for n, a in arrays.items()
    }
    exported = export.export(jax.jit(functools.partial(decode, SLOTS, "xla")))(kinds)
    close(export.deserialize(exported.serialize()).call(arrays), decode(SLOTS, "xla", drawn(SLOTS)))
