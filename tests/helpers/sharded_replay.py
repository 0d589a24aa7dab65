"""Steps on the arrays of a ReplayState that are sharded, over GPUs or virtual CPU devices."""

import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from modes import to_mode
from sharded import COLLECTIVE

import ssu_bridge
from ssu_bridge.core.quantized import paired, unpaired
from ssu_bridge.frontends.jax.metadata import address

ROWS, HEADS, OF_SEQUENCES = P(None, None, "h"), P(None, "h"), P("s")
RINGS = ("replay_x", "replay_B", "replay_dt")
# What is donated.
CHANGED = ("state", "state_scale", *RINGS)
OVER_HEADS = dict.fromkeys(("x", "z", "dt"), ROWS) | dict.fromkeys(set(CHANGED) - {"replay_B"}, HEADS)
_LEADING = ("x", "z", "dt", "B", "C", *CHANGED, "replay_start", "replay_pending")
OVER_SEQUENCES = dict.fromkeys(_LEADING, OF_SEQUENCES)


def drawn(case, seed=4):
    return unpaired(to_mode(case.arrays(seed), "jax", case.window))


def decode(case, backend, arrays, steps=3):
    """Take steps of a model of one layer; return its last output, and what it has then by kernels' names."""
    given = paired(arrays, case.window)
    state, cursor = given.pop("state"), given.pop("replay")
    for _ in range(steps):
        out, state = ssu_bridge.update(state, **given, **case.flags, backend=backend, replay=cursor)
        cursor = ssu_bridge.advance_replay(cursor, given.get("state_batch_indices"), tokens=case.tokens)
    return {"out": out, **unpaired({"state": state, "replay": cursor})}


def parted(results):
    """Put what was donated first: XLA gives its memory to the first results of its size."""
    return tuple({n: a for n, a in results.items() if (n in CHANGED) == is_first} for is_first in (True, False))


def check_sharded(case, mesh, specs, compare):
    """Assert that sharded steps compute what those on one device do, in place and without a collective.

    Args:
        case: with a window.
        mesh, specs: by which its arrays are sharded.
        compare: called with the results and those of one device, by name.
    """
    expected = decode(case, "auto", drawn(case))
    with jax.set_mesh(mesh):
        shardings = {n: NamedSharding(mesh, specs.get(n, P())) for n in drawn(case)}
        arrays = jax.jit(functools.partial(jax.tree.map, jnp.copy), out_shardings=shardings)(drawn(case))
        written = {n: arrays.pop(n) for n in CHANGED if n in arrays}
        places = {n: address(array) for n, array in written.items()}
        run = jax.jit(lambda written, rest: parted(decode(case, "auto", {**rest, **written})), donate_argnums=0)
        compiled = run.lower(written, arrays).compile()
        assert not re.search(COLLECTIVE, compiled.as_text())
        written, rest = compiled(written, arrays)
        after = {**written, **rest}
        compare(after, expected)
        for n, place in places.items():
            assert address(after[n]) == place, n
            assert after[n].sharding.is_equivalent_to(shardings[n], after[n].ndim), n
