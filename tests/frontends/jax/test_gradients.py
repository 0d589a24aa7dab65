"""The xla backend's gradients against float64 differences, at and around each switch of the formula.

A difference is taken along the imaginary axis, where nothing cancels: f'(v) is the imaginary part of f(v + ih) / h.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from copied import copied

import ssu_bridge
from ssu_bridge.testing.cases import Case

DTYPES = ("float32", "bfloat16", "float16")
# Where softplus changes its form; where exp leaves float32's normal numbers and all of them; where 1 + exp is 1.
SOFTPLUS = (20.0, 88.0, -88.0, -104.0, 17.0, -17.0, -25.0, 0.0)
# The same of exp(-z), and where z is so large that the sigmoid is 0 or 1.
SIGMOID = (0.0, 17.0, -17.0, 88.0, -88.0, 110.0, -110.0, 1.0)
STEP = 1e-30


def around(values, dtype):
    """Return numbers of a dtype with the next ones on either side."""
    there = np.array(values, dtype)
    sides = (np.nextafter(there, np.array(side, dtype)) for side in (np.inf, -np.inf))
    return np.concatenate([there, *sides]).astype(dtype)


def drawn(dtype, untied):
    """Draw a call's float arrays; dt + dt_bias, where there is one, and z take each of those values."""
    count = 3 * len(SOFTPLUS)
    case = Case("gradients", sequences=count, slots=count, nheads=2, ngroups=1, headdim=2, dstate=2, indices=None,
                dtypes={"*": dtype, "state": dtype}, untied=untied)  # fmt: skip
    arrays = case.arrays(seed=3)
    arrays["dt"][:] = around(SOFTPLUS, dtype).reshape(count, *[1] * (arrays["dt"].ndim - 1))
    arrays["z"][:, :, 0] = around(SIGMOID, dtype)[:, None]
    arrays["dt_bias"][:] = 0
    return arrays


def formula(a, weights, of_state):
    """Compute the sum of weighted outputs and states in any number type of NumPy."""
    per_channel = {
        n: a[n] if a[n].ndim == like else a[n][..., None] for n, like in (("dt", 3), ("D", 2), ("dt_bias", 2))
    }
    d = per_channel["dt"] + per_channel["dt_bias"]
    d, A = np.log1p(np.exp(d)), a["A"] if a["A"].ndim == 3 else a["A"][:, None, None]
    state = a["state"] * np.exp(A * d[..., None]) + (d * a["x"])[..., None] * a["B"][:, :, None]
    y = (state * a["C"][:, :, None]).sum(-1) + per_channel["D"] * a["x"]
    y = y * a["z"] / (1 + np.exp(-a["z"]))
    return (weights * y).sum() + (of_state * state).sum()


def difference(arrays, name, *rest):
    """Return the derivative of the formula by each element of an array."""
    wide = {n: array.astype(np.complex128) for n, array in arrays.items()}
    result = np.empty(arrays[name].shape)
    for place in np.ndindex(result.shape):
        moved = wide[name].copy()
        moved[place] += 1j * STEP
        result[place] = formula({**wide, name: moved}, *rest).imag / STEP
    return result


@pytest.mark.parametrize("untied", ((), ("A", "dt", "D", "dt_bias")), ids=("tied", "untied"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_at_and_around_each_switch(dtype, untied):
    arrays = drawn(dtype, untied)
    rng = np.random.default_rng(1)
    weights, of_state = (rng.choice([-2.0, -1.0, 1.0, 2.0], arrays[name].shape) for name in ("x", "state"))

    def loss(arrays):
        out, state = ssu_bridge.update(**arrays, dt_softplus=True, backend="xla")
        return (out.astype("float32") * weights).sum() + (state.astype("float32") * of_state).sum()

    got = jax.jit(jax.grad(loss))(copied(arrays))
    # The exponential of a rounded float32 is off by as many roundings as that is large, here about 100.
    eps, of_exp = float(jnp.finfo(dtype).eps), 128 * float(jnp.finfo("float32").eps)
    for name in arrays:
        expected = difference(arrays, name, weights, of_state)
        # What underflows on the way is zero; a sum over sequences is as exact as its largest parts are.
        least = {"float16": 2.0**-24}.get(dtype, 1e-33)
        summed = name in ("A", "D", "dt_bias")
        tolerance = {"rtol": 8 * eps + of_exp, "atol": 32 * eps * abs(expected).max() if summed else least}
        np.testing.assert_allclose(np.array(got[name]).astype("float64"), expected, **tolerance, err_msg=name)
