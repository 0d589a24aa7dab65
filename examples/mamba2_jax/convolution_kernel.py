"""The convolution of one token of each sequence on a GPU: one kernel that also moves the cache on.

XLA takes four for it: it gathers what came before, convolves, concatenates and scatters.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

# Channels and sequences of a program, the most of each that divide those of a call. Fewer channels are not worth it.
_MOST_CHANNELS, _LEAST_CHANNELS, _MOST_SEQUENCES = 128, 32, 4


def fits(sizes: tuple[int, ...]) -> bool:
    """Return whether the kernel is for parts of so many channels."""
    return _channels(sizes) >= _LEAST_CHANNELS


def step(
    cache: jax.Array,
    slots: jax.Array,
    rows: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    *,
    start: int,
    sizes: tuple[int, ...],
    interpret: bool = False,
) -> tuple[list[jax.Array], jax.Array]:
    """Do what ``histories``, ``convolve`` and ``stored`` do for one token of each sequence.

    Args:
        cache: (slots, width - 1, channels), as in ``convolution``. It is updated in place where it is donated.
        slots: (batch,) int32, where each sequence's last inputs lie; one that does not exist for none.
        rows: (batch, ...), whose columns from ``start`` on are the inputs; the others are not read.
        weight, bias: as in ``convolve``.
        sizes: the channels of the parts that come back, in their order.
        interpret: run without a GPU.

    Returns:
        Each part of the convolved inputs, (batch, channels of the part) like ``rows``, and the cache after the token.
    """
    batch, channels, sequences = len(slots), _channels(sizes), math.gcd(len(slots), _MOST_SEQUENCES)
    kernel = functools.partial(_kernel, start=start, sizes=sizes, channels=channels, sequences=sequences)
    arrays = [cache, slots, rows, weight] if bias is None else [cache, slots, rows, weight, bias]
    *parts, after = pl.pallas_call(
        kernel if bias is not None else functools.partial(_without_bias, kernel),
        grid=(batch // sequences, sum(sizes) // channels),
        out_shape=[
            *(jax.ShapeDtypeStruct((batch, size), rows.dtype) for size in sizes),
            jax.ShapeDtypeStruct(cache.shape, cache.dtype),
        ],
        input_output_aliases={0: len(sizes)},
        compiler_params=None if interpret else triton.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="convolution_step",
    )(*arrays)
    return parts, after


def _channels(sizes: tuple[int, ...]) -> int:
    return math.gcd(_MOST_CHANNELS, *sizes)


def _without_bias(kernel: Any, cache: Any, slots: Any, rows: Any, weight: Any, *out: Any) -> None:
    kernel(cache, slots, rows, weight, None, *out)


def _kernel(
    cache: Any,
    slots: Any,
    rows: Any,
    weight: Any,
    bias: Any,
    *out: Any,
    start: int,
    sizes: tuple[int, ...],
    channels: int,
    sequences: int,
) -> None:
    """Convolve a block of channels of some sequences, in float32."""
    *parts, after = out
    first, width = pl.program_id(1) * channels, weight.shape[-1]
    own = pl.ds(first, channels)
    taps = [weight[own, jnp.int32(0), jnp.int32(i)].astype(jnp.float32) for i in range(width)]
    shift = jnp.zeros(channels, jnp.float32) if bias is None else bias[own].astype(jnp.float32)
    loaded = []
    for i in range(sequences):  # All are loaded before any is stored, so that loads do not wait for stores.
        sequence = pl.program_id(0) * sequences + i
        slot = slots[sequence]
        is_there = (slot >= 0) & (slot < cache.shape[0])
        live, place = jnp.full(channels, is_there), jnp.where(is_there, slot, 0)
        before = [triton.load(cache.at[place, jnp.int32(j), own], mask=live, other=0) for j in range(width - 1)]
        loaded.append((sequence, live, place, [*before, rows[sequence, pl.ds(start + first, channels)]]))
    for sequence, live, place, inputs in loaded:
        total = sum((x.astype(jnp.float32) * tap for x, tap in zip(inputs, taps, strict=True)), start=shift)
        convolved, begin = (total * jax.nn.sigmoid(total)).astype(rows.dtype), 0
        for part, size in zip(parts, sizes, strict=True):
            pl.when((first >= begin) & (first < begin + size))(
                functools.partial(_store, part, sequence, pl.ds(first - begin, channels), convolved)
            )
            begin += size
        for j in range(width - 1):
            triton.store(after.at[place, jnp.int32(j), own], inputs[j + 1].astype(after.dtype), mask=live)


def _store(part: Any, sequence: Any, columns: Any, values: jax.Array) -> None:
    part[sequence, columns] = values
