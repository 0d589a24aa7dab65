"""What one shard of a step is given: its seed, and the groups of its heads."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from ssu_bridge.core.problem import Problem
from ssu_bridge.frontends.jax.sharding.layout import Layout


def shard_seed(seed: Any, axes: Iterable[Any]) -> Any:
    """Give each shard along some mesh axes a seed of its own: its elements are counted from 0."""
    for axis in sorted(axes, key=str):
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), jax.lax.axis_index(axis))
        seed = jax.random.key_data(key)
    return seed


def _own_groups(problem: Problem, array: Any, heads: int, axes: tuple[Any, ...]) -> Any:
    """Return the groups of a shard's heads, from B or C with all groups; one a head if it has parts of several."""
    each = problem.nheads // problem.ngroups
    first = jax.lax.axis_index(axes) * heads
    if heads % each and each % heads:
        return jnp.take(array, (first + jnp.arange(heads)) // each, axis=-2)
    return jax.lax.dynamic_slice_in_dim(array, first // each, max(heads // each, 1), axis=-2)


def localised(problem: Problem, layout: Layout, arrays: dict[str, Any]) -> dict[str, Any]:
    """Return the arrays of one shard's step, from the shards in the places of the layout."""
    arrays = dict(arrays)
    heads = arrays["state"].shape[1] if problem.heads_axis else 1
    for name in ("B", "C"):
        whole = problem.ngroups > 1 and arrays[name].shape[-2] == problem.ngroups
        if heads < problem.nheads and whole:
            arrays[name] = _own_groups(problem, arrays[name], heads, layout.heads)
    return arrays
