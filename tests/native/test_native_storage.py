"""How the native CPU kernel stores a state: quantised and by stochastic rounding, to the bit."""

import mmap

import numpy as np
import pytest
import tiny
from native import BF16, F16, FP8, INT8, INT16, ISAS, ROUNDABLE, cpu_kernel, run_all, stored, view

from ssu_bridge.core.rounding import slot_words

QUANTISED = (INT16, INT8, FP8)


def store(value, dtype, isa="auto", seed=None, place=0, token=0, intermediate=False, rounds=10):
    """Store a float32 state (rows, columns) as the state after a token in a slot or an entry; return values and scales.

    It comes in through B, one group a row: the state is -0 before, and A = 0, dt = x = 1. So even a zero keeps its sign.
    """
    rows, columns = value.shape
    kinds = ("intermediate_states", "intermediate_state_scales") if intermediate else ("state", "state_scale")
    shape, entries = (rows, 1, columns), (place + 2, token + 1) if intermediate else (place + 2,)
    B = np.full((1, token + 1, rows, columns), -0.0, np.float32)
    B[0, token] = value
    arguments = {
        "x": np.ones((1, token + 1, rows, 1), np.float32),
        "dt": np.ones((1, token + 1, rows), np.float32),
        "A": np.zeros(rows, np.float32),
        "B": B,
        "C": np.zeros_like(B),
        "state": np.full((1, *shape), -0.0).astype(dtype),
        "state_batch_indices": np.zeros(1, np.int32),
        kinds[0]: np.full((*entries, *shape), -0.0).astype(dtype),
    }
    if dtype in QUANTISED:
        arguments["state_scale"] = np.ones((len(arguments["state"]), rows, 1), np.float32)
        arguments[kinds[1]] = np.ones((*entries, rows, 1), np.float32)
    if seed is not None:
        arguments["rand_seed"] = np.array(seed, np.uint32)
    where = {"intermediate_state_indices": np.array([place])} if intermediate else {}
    arguments |= where if intermediate else {"dst_state_batch_indices": np.array([place])}
    results = run_all(arguments, isa, softplus=False, rounds=rounds)
    at = (place, token) if intermediate else (place,)
    scale = results[kinds[1]][at].reshape(rows) if dtype in QUANTISED else None
    return results[kinds[0]][at].reshape(rows, columns), scale


def assert_stored(value, dtype, isa, seed=None, place=0, token=0, intermediate=False, rounds=10):
    words = None
    if seed is not None:
        words = slot_words(place, value.shape, token, intermediate, seed, rounds)
    values, scale = store(value, dtype, isa, seed, place, token, intermediate, rounds)
    wanted, wanted_scale = stored(value, dtype, words)
    assert_same_numbers(values, wanted)
    if scale is not None:
        np.testing.assert_array_equal(scale, wanted_scale)


def assert_same_numbers(values, wanted):
    """To the bit, but for the bits of a NaN."""
    np.testing.assert_array_equal(np.isnan(values), np.isnan(wanted))
    np.testing.assert_array_equal(
        np.where(np.isnan(wanted), 0, bits(values)), np.where(np.isnan(wanted), 0, bits(wanted))
    )


def bits(array):
    return array.view(f"u{array.itemsize}")


def any_floats(rng, *shape):
    """Draw float32 numbers by their bits: every magnitude, infinities and NaNs too."""
    return rng.integers(0, 2**32, shape, np.uint32).view(np.float32)


def rows_of_all_sizes(rng, rows, columns):
    value = rng.standard_normal((rows, columns), dtype=np.float32)
    return (value * np.exp2(rng.integers(-140, 120, (rows, 1)))).astype(np.float32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("columns", "place", "token", "intermediate", "rounds"),
    [(4, 0, 0, False, 10), (301, 5, 3, False, 10), (129, 3, 2, True, 7), (64, 70, 0, False, 1), (30, 2, 9, True, 0)],
)
def test_the_words_themselves(rng, columns, place, token, intermediate, rounds, isa):
    """A subnormal float16 holds no part of k 2**-48, of which 2**24 reach the smallest one: k is held against the word."""
    seeds = [(0, 0), (0xA4093822, 0x299F31D0), (0xFFFFFFFF, 0xFFFFFFFF)]
    for seed in seeds:
        words = slot_words(place, (3, columns), token, intermediate, seed, rounds or 10)
        if columns == 4 and seed == (0, 0):
            assert words[0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # the published ones
        for more in (0, 1):
            parts = (words >> 8) + np.uint32(more)
            value = parts.astype(np.float32) * np.float32(2.0**-48)
            values, _ = store(value, F16, isa, seed, place, token, intermediate, rounds)
            np.testing.assert_array_equal(bits(values), more)


def test_elements_far_into_the_state():
    """Counted in 64 bits: in a state of 2**35 elements, of which the system gives memory to those that are touched."""
    slots, rows, columns, place = 2**20, 8, 4096, 2**20 - 5
    no_reserve = 0x4000  # mmap has no name for it before Python 3.13
    memory = mmap.mmap(-1, slots * rows * columns * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    state = np.frombuffer(memory, F16).reshape(slots, 1, rows, columns)
    value = np.full((1, 1, columns), 0.5 * 2.0**-24, np.float32)
    ones, out = np.ones((1, 1, rows), np.float32), np.zeros((1, 1, rows), np.float32)
    arrays = (state, ones, ones, np.zeros(1, np.float32), value, value, np.array([place]), np.array([1, 2], np.uint32))
    names = ["state", "x", "dt", "A", "B", "C", "state_batch_indices", "rand_seed"]
    kernel = cpu_kernel(names, ["out", "state"], softplus=False)
    kernel(*map(view, (*arrays, out, state)))
    words = slot_words(place, (rows, columns), 0, 0, (1, 2), 10)
    np.testing.assert_array_equal(bits(state[place, 0]), ((words >> 8) < 2**23).astype(np.uint16))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ROUNDABLE, ids=str)
def test_stochastic_rounding(rng, dtype, isa):
    for columns in (1, 3, 16, 77, 512):
        value = rows_of_all_sizes(rng, 40, columns)
        assert_stored(value, dtype, isa, seed=(3, 4))
        assert_stored(value, dtype, isa, seed=(2**32 - 1, 0), place=3, token=2, intermediate=True, rounds=4)
    for scale in (1e-30, 1e-7, 1e-5, 1e-3, 1.0, 1e3, 1e5):
        value = rng.standard_normal((8, 333), dtype=np.float32) * np.float32(scale)
        assert_stored(value, dtype, isa, seed=(5, 6), place=1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("seed", [None, (1, 2)], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", (F16, BF16), ids=str)
def test_any_float(rng, dtype, seed, isa):
    """Subnormal numbers, infinities, NaNs, numbers past the largest, every number that is on the grid or half way."""
    assert_stored(any_floats(rng, 64, 1024), dtype, isa, seed)
    grid = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float32).reshape(64, 1024)
    assert_stored(grid, dtype, isa, seed)
    # A pattern of a NaN need not be kept.
    np.testing.assert_array_equal(store(grid, dtype, isa, seed)[0].astype(np.float32), grid)
    with np.errstate(over="ignore", invalid="ignore"):
        for factor in (1 + 2.0**-12, 1 + 2.0**-9, 1 - 2.0**-13):
            assert_stored(grid * np.float32(factor), dtype, isa, seed)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("seed", [None, (1, 2)], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_quantised_rows(rng, dtype, seed, isa):
    if seed and dtype not in ROUNDABLE:
        return
    for columns in (1, 5, 16, 100, 513):
        assert_stored(rows_of_all_sizes(rng, 200, columns), dtype, isa, seed)
    grid = np.arange(-448, 449, dtype=np.float32)[None] * np.float32(0.5)
    assert_stored(np.concatenate([grid, grid * 2, grid / 7]), dtype, isa, seed)
    zeros = np.zeros((3, 8), np.float32)
    zeros[1, 3], zeros[2, 5] = -0.0, 1e-45
    assert_stored(zeros, dtype, isa, seed)
    assert store(zeros, dtype, isa, seed)[1].tolist() == [1, 1, 1]
    assert_stored(tiny.rows(dtype.name), dtype, isa, seed)
    np.testing.assert_array_equal(store(tiny.rows(dtype.name), dtype, isa, seed)[1], tiny.stored_scales(dtype.name))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("seed", [None, (1, 2)], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_rows_that_are_not_finite(rng, dtype, seed, isa):
    """Such a row reads back as NaN, whatever stands beside it."""
    if seed and dtype not in ROUNDABLE:
        return
    for columns in (3, 40):
        value = rng.standard_normal((6, columns), dtype=np.float32)
        value[0, 1] = np.nan
        value[1, 2] = np.inf
        value[2, 0] = -np.inf
        value[3, :3] = np.nan, np.inf, 0
        values, scale = store(value, dtype, isa, seed)
        wanted, wanted_scale = stored(value, dtype, seed and slot_words(0, value.shape, 0, 0, seed, 10))
        np.testing.assert_array_equal(scale, wanted_scale)
        assert_same_numbers(values, wanted)
        with np.errstate(invalid="ignore"):
            assert np.isnan(values[:4].astype(np.float32) * scale[:4, None]).all()
        assert np.isfinite(scale[4:]).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_every_value_is_read(rng, dtype, isa):
    """The kernel reads what it stores: after a step that adds nothing, y = S . C with C = 1 at one column."""
    count = 2 ** (8 * dtype.itemsize)
    values = np.arange(count).astype(f"u{dtype.itemsize}").view(dtype).reshape(1, 1, count // 16, 16)
    scale = rng.uniform(0.1, 2, values.shape[:-1]).astype(np.float32)
    rows = values.shape[2]
    for column in range(16):
        arguments = {
            "state": values,
            "x": np.zeros((1, 1, rows), np.float32),
            "dt": np.ones((1, 1), np.float32),
            "A": np.zeros(1, np.float32),
            "B": np.zeros((1, 1, 16), np.float32),
            "C": np.eye(16, dtype=np.float32)[column].reshape(1, 1, 16),
            "state_scale": scale,
        }
        out = run_all(arguments, isa, softplus=False)["out"][0, 0]
        others = np.isnan(values[0, 0].astype(np.float32)).any(-1)
        wanted = values[0, 0, :, column].astype(np.float32) * scale[0, 0]
        np.testing.assert_array_equal(out, np.where(others, np.float32(np.nan), wanted))


def test_int16_is_never_rounded_stochastically(rng):
    with pytest.raises(ValueError, match="rand_seed goes with"):
        store(rng.standard_normal((1, 4), dtype=np.float32), INT16, seed=(1, 2))
