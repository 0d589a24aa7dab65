"""JAX arrays of NumPy ones. ``jnp.array`` compiles a program for each shape and dtype, which adds up in tests."""

import jax
import numpy as np


def copied(arrays, places=None):
    """Return a tree of NumPy arrays as JAX arrays, with these shardings, in memory of their own, which JAX donates."""
    # The first have the NumPy arrays' own memory where that can be, which JAX does not donate, may_alias or not.
    return jax.block_until_ready(jax.device_put(jax.device_put(arrays, places), places, may_alias=False))


def jax_array(values, dtype=None):
    """Return numbers, in lists or a NumPy array, as a JAX array."""
    return copied(np.asarray(values, dtype))
