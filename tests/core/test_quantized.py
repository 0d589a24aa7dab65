"""QuantizedState: the same numbers in every framework, and how far they are from what was quantised."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from copied import copied
from modes import bits, to_host, to_mode

import ssu_bridge
from ssu_bridge import QuantizedState
from ssu_bridge.core.rounding import LARGEST, rounded

FRAMEWORKS = ("numpy", "torch", "jax")


def rows():
    """Rows of many magnitudes, and odd ones."""
    rng = np.random.default_rng(3)
    states = rng.standard_normal((4, 5, 6, 33)) * 10.0 ** rng.uniform(-30, 30, (4, 5, 6, 1))
    states[0, 0, 0] = 0
    states[0, 0, 1] = [1e-44, *[0] * 32]
    states[0, 0, 2, 7] = np.inf
    states[0, 0, 3, 9] = np.nan
    return states.astype(np.float32)


@pytest.mark.parametrize("dtype", LARGEST)
def test_every_framework_gives_the_same_bits(dtype):
    expected = QuantizedState.quantize(rows(), dtype)
    assert expected.values.dtype == dtype
    assert expected.scale.dtype == np.float32
    assert expected.scale.shape == (4, 5, 6)
    for mode in FRAMEWORKS:
        (given,) = to_mode({"x": rows()}, mode).values()
        pair = QuantizedState.quantize(given, dtype)
        host = to_host(pair._asdict(), mode)
        for mine, its in zip(host.values(), expected, strict=True):
            np.testing.assert_array_equal(bits(mine), bits(its), mode)
        back = to_host({"x": pair.dequantize()}, mode)["x"]
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(back, expected.values.astype(np.float32) * expected.scale[..., None])


# A number of 15 bits times the inverse of the scale, which is rounded itself, may be off by another hundredth.
@pytest.mark.parametrize(("dtype", "half"), [("int16", 0.51), ("int8", 0.5001), ("float8_e4m3fn", 16.001)])
def test_the_error_is_half_a_step(dtype, half):
    states = rows()[1:]
    pair = QuantizedState.quantize(states, dtype)
    error = np.abs(pair.dequantize().astype(np.float64) - states)
    assert (error <= half * pair.scale[..., None]).all()
    largest = np.abs(pair.values.astype(np.float64)).max(-1)
    assert (largest == LARGEST[dtype]).all()


@pytest.mark.parametrize("dtype", LARGEST)
def test_odd_rows(dtype):
    pair = QuantizedState.quantize(rows(), dtype)
    assert pair.scale[0, 0, :2].tolist() == [1, 1]
    assert not pair.dequantize()[0, 0, :2].any()  # a row too small for a scale that has an inverse becomes zero
    assert np.isinf(pair.scale[0, 0, 2])
    assert np.isnan(pair.scale[0, 0, 3])
    with np.errstate(invalid="ignore"):
        assert not np.isfinite(pair.dequantize()[0, 0, 3]).any()


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("mode", ["numpy", "torch", pytest.param("torch.cuda", marks=pytest.mark.gpu)])
def test_tiny_rows(mode, dtype):
    (given,) = to_mode({"x": tiny.rows(dtype)}, mode).values()
    pair = QuantizedState.quantize(given, dtype)
    values, scales = to_host(pair._asdict(), mode).values()
    expected = tiny.stored_scales(dtype)
    np.testing.assert_array_equal(scales, expected)
    inverse = (1 / expected.astype(np.float64)).astype(np.float32)
    scaled = (tiny.rows(dtype).astype(np.float64) * inverse[:, None]).astype(np.float32)
    np.testing.assert_array_equal(bits(values), bits(rounded(scaled, dtype)))
    np.testing.assert_array_equal(np.abs(values.astype(np.float32)).max(-1), np.where(expected == 1, 0, LARGEST[dtype]))
    back = to_host({"x": pair.dequantize()}, mode)["x"]
    np.testing.assert_array_equal(back, values.astype(np.float32) * scales[:, None])


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("dtype", LARGEST)
def test_tiny_rows_where_jax_takes_subnormal_numbers_for_zero(dtype, traced):
    quantize = functools.partial(QuantizedState.quantize, dtype=dtype)
    pair = (jax.jit(quantize) if traced else quantize)(copied(tiny.rows(dtype)))
    expected, normal = QuantizedState.quantize(tiny.rows(dtype), dtype), tiny.stored_scales(dtype) >= 2.0**-126
    np.testing.assert_array_equal(pair.scale, np.where(normal, expected.scale, 1))
    values = np.array(pair.values).astype(np.float32)
    np.testing.assert_array_equal(values, np.where(normal[:, None], expected.values.astype(np.float32), 0))


def test_it_is_a_pytree():
    pair = QuantizedState.quantize(jnp.ones((2, 3, 4, 5)), "int8")
    assert len(jax.tree.leaves(pair)) == 2
    doubled = jax.jit(lambda p: QuantizedState(p.values, 2 * p.scale))(pair)
    assert isinstance(doubled, QuantizedState)
    np.testing.assert_allclose(jax.jit(QuantizedState.dequantize)(doubled), 2 * np.ones((2, 3, 4, 5)), rtol=1e-2)
    traced = jax.jit(lambda s: QuantizedState.quantize(s, "int8"))(jnp.ones((2, 3, 4, 5)))
    np.testing.assert_array_equal(traced.values, pair.values)


@pytest.mark.parametrize("dtype", ["int8", np.int8, np.dtype("int8"), jnp.int8, torch.int8])
def test_dtypes_of_any_framework(dtype):
    assert QuantizedState.quantize(np.ones((1, 1, 1, 4), "float16"), dtype).values.dtype == np.int8


def test_what_it_does_not_take():
    with pytest.raises(ValueError, match="dtype: expected int16, int8, float8_e4m3fn, got int32"):
        QuantizedState.quantize(np.ones((1, 4)), "int32")
    with pytest.raises(TypeError, match="state: expected a JAX, Torch or NumPy array, got list"):
        QuantizedState.quantize([1.0], "int8")


def test_a_scale_that_is_no_number_warns_of_nothing():
    """Nor does one that is infinite, times 0: both read back as NaN."""
    scale = np.full((2, 1, 1), np.inf, "float32")
    state = QuantizedState(np.zeros((2, 1, 1, 4), "int8"), scale)
    ones, rows = np.ones((2, 1, 1), "float32"), np.ones((2, 4), "float32")
    out, _ = ssu_bridge.update(state, ones, ones, -np.ones(1, "float32"), rows, rows, backend="reference")
    assert np.isnan(out).all()
