"""The native CPU kernel's arithmetic: special values, rounding and the accuracy of its functions."""

import numpy as np
import pytest
from native import BF16, F16, F32, ISAS, problem, run


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("state", [F32, BF16, F16], ids=str)
def test_special_values(rng, state, isa):
    arguments = problem(rng, rows=6, columns=33, state=state, slots=3, other=F32)
    values = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0], np.float32).astype(state)
    arguments["state"][:, :, 0, :5] = values
    arguments["state"][:, :, 1, 32] = np.nan
    out, new = run(arguments, isa)
    slots = arguments["state_batch_indices"]
    assert np.isnan(out[:, :, :2]).all()
    assert np.isfinite(out[:, :, 2:].astype(np.float32)).all()
    assert np.isnan(new[slots][:, :, 0, 0].astype(np.float32)).all()
    assert np.isnan(new[slots][:, :, 1, 32].astype(np.float32)).all()
    assert np.isinf(new[slots][:, :, 0, 1:3].astype(np.float32)).all()
    assert np.isfinite(new[slots][:, :, 2:].astype(np.float32)).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000])
def test_every_nan_stays_nan(rng, bits, isa):
    nan = np.uint32(bits).view(np.float32)
    for name in ("x", "B", "dt", "A"):
        for tied in ("A dt D", ""):
            arguments = problem(rng, state=BF16, tied=tied, columns=40)
            arguments[name].ravel().view(np.uint32)[:] = bits
            out, new = run(arguments, isa)
            assert np.isnan(new[arguments["state_batch_indices"]].astype(np.float32)).all(), (name, tied, nan)
            assert np.isnan(out).all()
    arguments = problem(rng, x=np.ones((3, 4, 8), BF16))
    arguments["state"].view(np.uint32)[:] = bits
    assert np.isnan(run(arguments, isa)[0].astype(np.float32)).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("state", [BF16, F16], ids=str)
def test_state_is_rounded_to_nearest_even(rng, state, isa):
    """With x = 0 and dt = 0 a float32 B does not matter, so feed the rounding through B: state = 0, d = x = 1."""
    columns = 4096
    value = np.concatenate(
        [
            rng.integers(0, 2**32, 3072, np.uint32).view(np.float32),
            (rng.integers(0, 2**16, 1024).astype(np.uint32) << 16 | 0x8000).view(np.float32),
        ]
    )
    value = np.where(np.isnan(value), np.float32(1), value)
    ones = np.ones((1, 1, 1), np.float32)
    arguments = {
        "state": np.zeros((1, 1, 1, columns), state),
        "x": ones,
        "dt": ones,
        "A": np.zeros(1, np.float32),
        "B": value.reshape(1, 1, columns),
        "C": np.zeros((1, 1, columns), np.float32),
    }
    _, new = run(arguments, isa, softplus=False)
    with np.errstate(over="ignore"):
        assert (new.ravel() == value.astype(state)).all()


@pytest.mark.parametrize("isa", ISAS)
def test_softplus_and_decay_keep_their_accuracy(isa):
    """State = 1 and x = 0 show exp(A d); state = 0 and x = B = 1 show d."""
    d = np.concatenate([np.linspace(-103, 30, 4001), [-87.5, -95.0, 20.0, 20.000002, 88.0]]).astype(np.float32)
    rows = len(d)
    arguments = {
        "state": np.zeros((1, 1, rows, 2), np.float32),
        "x": np.ones((1, 1, rows), np.float32),
        "dt": d.reshape(1, 1, rows),
        "A": np.zeros(1, np.float32),
        "B": np.ones((1, 1, 2), np.float32),
        "C": np.ones((1, 1, 2), np.float32),
    }
    _, state = run(arguments, isa)
    wanted = np.logaddexp(0.0, d.astype(np.float64))
    wanted = np.where(d < -30, np.exp(d.astype(np.float64)), wanted)
    np.testing.assert_allclose(state[0, 0, :, 0], wanted, rtol=3e-7, atol=1.5e-45)

    arguments.update(state=np.ones_like(state), x=np.zeros_like(arguments["x"]), A=np.ones(1, np.float32))
    for A in (np.ones(1, np.float32), np.ones((1, rows, 2), np.float32)):
        _, state = run({**arguments, "A": A}, isa, softplus=False)
        np.testing.assert_allclose(state[0, 0, :, 1], np.exp(d.astype(np.float64)), rtol=3e-7, atol=1.5e-45)


@pytest.mark.parametrize("isa", ISAS)
def test_exp_of_special_values(isa):
    d = np.array([np.inf, -np.inf, np.nan, 89.0, 1e30, -105.0, -1e30, 0.0], np.float32)
    arguments = {
        "state": np.ones((1, 1, 8, 3), np.float32),
        "x": np.zeros((1, 1, 8), np.float32),
        "dt": np.where(np.isinf(d), 0, d).reshape(1, 1, 8).astype(np.float32),
        "A": np.ones(1, np.float32),
        "B": np.zeros((1, 1, 3), np.float32),
        "C": np.ones((1, 1, 3), np.float32),
    }
    for A in (np.ones(1, np.float32), np.ones((1, 8, 3), np.float32)):
        out, state = run({**arguments, "A": A}, isa, softplus=False)
        np.testing.assert_array_equal(state[0, 0, :, 2], [1, 1, np.nan, np.inf, np.inf, 0, 0, 1])
        np.testing.assert_array_equal(out[0, 0], [3, 3, np.nan, np.inf, np.inf, 0, 0, 3])


@pytest.mark.parametrize("isa", ISAS)
def test_gate_of_large_numbers(rng, isa):
    z = np.tile(np.array([-1e30, -200.0, -90.0, -20.0, 0.0, 20.0, 200.0, 1e30], np.float32), (3, 4, 1))
    arguments = problem(rng, z=None)
    y, _ = run(arguments, isa)
    gated, _ = run({**problem(rng), **arguments, "z": z} | {"dt_bias": arguments["dt_bias"]}, isa)
    with np.errstate(over="ignore"):
        wanted = y.astype(np.float64) * z / (1 + np.exp(-z.astype(np.float64)))
    np.testing.assert_allclose(gated, wanted, rtol=1e-6, atol=1e-37)
