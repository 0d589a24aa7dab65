"""The rules of storing: Philox by its known answers, stochastic rounding by its definition, and that it is unbiased."""

import functools

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
import torch
from modes import GPU_PAIRS, PAIRS, bits, convert, skip_if_refused, step, to_host

import ssu_bridge
from ssu_bridge.api import explain
from ssu_bridge.core import rounding
from ssu_bridge.testing.check import results_by_name

ROUNDABLE = ("float16", "bfloat16", "int8", "float8_e4m3fn")

# From the file kat_vectors of Random123: rounds, counter, key, result.
KNOWN_ANSWERS = """
 7 00000000 00000000 00000000 00000000 00000000 00000000 5f6fb709 0d893f64 4f121f81 4f730a48
 7 ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 5207ddc2 45165e59 4d8ee751 8c52f662
 7 243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 4dfccaba 190a87f0 c47362ba b6b5242a
10 00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
10 ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
10 243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
"""


@pytest.mark.parametrize("line", KNOWN_ANSWERS.strip().splitlines())
def test_philox(line):
    rounds, *words = line.split()
    words = [int(word, 16) for word in words]
    assert rounding.philox(words[:4], tuple(words[4:6]), int(rounds)).tolist() == words[6:]


@pytest.mark.parametrize("slot", [0, 3, 2**33 + 1])
def test_which_word_an_element_has(slot):
    shape, key = (3, 2, 7), (1234567, 2**32 - 1)
    words = rounding.slot_words(slot, shape, token=5, kind=1, key=key, rounds=10)
    for place in np.ndindex(shape):
        e = slot * 42 + int(np.ravel_multi_index(place, shape))
        block = rounding.philox((e // 4 % 2**32, e // 4 >> 32, 5, 1), key)
        assert words[place] == block[e % 4]


@pytest.mark.parametrize(("seed", "key"), [(0, (0, 0)), (2**32 + 7, (7, 1)), (-1, (2**32 - 1, 2**32 - 1))])
def test_the_words_of_a_seed(seed, key):
    assert rounding.key_of(np.array(seed)) == key
    assert rounding.key_of(np.array([seed]).view("uint32")) == key


@functools.cache
def grid(dtype):
    """All numbers of a dtype from 0 on that a state may be rounded to, in order."""
    if dtype == "int8":
        return np.arange(128.0)
    kind = f"u{np.dtype(dtype).itemsize}"
    with np.errstate(invalid="ignore"):
        every = np.arange(2 ** (8 * np.dtype(dtype).itemsize - 1), dtype=kind).view(dtype).astype(np.float64)
    return np.sort(every[np.isfinite(every)])


def by_definition(values, dtype, words):
    """Stochastic rounding as the rule has it: from the list of all numbers of the dtype."""
    numbers, magnitude = grid(dtype), np.abs(values.astype(np.float64))
    place = np.searchsorted(numbers, magnitude, side="right") - 1
    lo = numbers[place]
    hi = np.append(numbers, np.inf)[place + 1]
    up = np.floor((magnitude - lo) / (hi - lo) * 2**24) > words >> 8
    return np.copysign(np.where(up, hi, lo), values).astype(dtype)


def samples(dtype, count, seed=0):
    """Float32 numbers over the whole range of a dtype, its subnormals, the numbers themselves and what is beyond."""
    rng = np.random.default_rng(seed)
    lowest, highest = np.log2(grid(dtype)[1]) - 4, np.log2(grid(dtype)[-1])
    values = 2 ** rng.uniform(max(lowest, -140), highest + 2 if highest < 126 else highest, count) * rng.choice(
        [-1, 1], count
    )
    values[: count // 4] = rng.choice(grid(dtype), count // 4)
    return np.concatenate([values, [0.0, -0.0, grid(dtype)[-1], -grid(dtype)[1]]]).astype(np.float32)


@pytest.mark.parametrize("dtype", ROUNDABLE)
def test_stochastic_rounding_is_what_it_is_defined_as(dtype):
    values = samples(dtype, 100_000)
    words = np.random.default_rng(1).integers(0, 2**32, values.size, dtype=np.uint32)
    for w in (words, np.zeros_like(words), np.full_like(words, 2**32 - 1)):
        got = rounding.rounded(values, dtype, w)
        assert got.dtype == dtype
        np.testing.assert_array_equal(bits(got), bits(by_definition(values, dtype, w)))


@pytest.mark.parametrize("dtype", ROUNDABLE)
def test_numbers_of_the_dtype_stay(dtype):
    numbers = np.concatenate([grid(dtype), -grid(dtype)]).astype(np.float32)
    for word in (0, 2**32 - 1):
        got = rounding.rounded(numbers, dtype, np.full(numbers.shape, word, np.uint32))
        np.testing.assert_array_equal(got.astype(np.float32), numbers)
        assert dtype == "int8" or (np.signbit(got) == np.signbit(numbers)).all()


def test_what_is_not_finite():
    odd, words = np.array([np.inf, -np.inf, np.nan, 3e38, -3e38], np.float32), np.zeros(5, np.uint32)
    for dtype in ("float16", "bfloat16"):
        got, largest = rounding.rounded(odd, dtype, words).astype(np.float64), grid(dtype)[-1]
        np.testing.assert_array_equal(got[:3], odd[:3])
        assert got[3:].tolist() == [min(largest, got[3]), max(-largest, got[4])]
        assert np.isfinite(got[3:]).all()
    assert rounding.rounded(odd, "float8_e4m3fn", words)[3:].tolist() == [448, -448]
    assert rounding.rounded(odd, "int8", words)[2:].tolist() == [0, 127, -127]


BANDS = {
    "float16": [(2.0**-24, 2.0**-22), (2.0**-16, 2.0**-14), (2.0**-14, 2.0**-13), (1.0, 2.0), (30000.0, 65504.0)],
    "bfloat16": [(2.0**-133, 2.0**-131), (2.0**-128, 2.0**-126), (1.0, 2.0), (1e30, 2e30)],
    "int8": [(0.0, 0.01), (0.0, 1.0), (1.0, 127.0)],
    "float8_e4m3fn": [(2.0**-12, 2.0**-9), (2.0**-9, 2.0**-6), (1.0, 2.0), (256.0, 448.0)],
}


@functools.cache
def four_million_words():
    return rounding.slot_words(11, (64, 512, 128), token=2, kind=0, key=(99, 3), rounds=10).ravel()


# By default a band of normal numbers of each dtype. What is rounded is held to the definition above, and random words to
# known answers.
DAILY = {(1.0, 2.0), (1.0, 127.0)}


@pytest.mark.parametrize(
    ("dtype", "band"),
    [
        pytest.param(dtype, band, marks=[pytest.mark.nightly] * (band not in DAILY))
        for dtype, bands in BANDS.items()
        for band in bands
    ],
)
def test_stochastic_rounding_is_unbiased(dtype, band):
    words = four_million_words()
    assert words.size == 2**22
    rng = np.random.default_rng(5)
    values = (rng.uniform(*band, words.size) * rng.choice([-1, 1], words.size)).astype(np.float32)
    errors = rounding.rounded(values, dtype, words).astype(np.float64) - values
    assert abs(errors.mean()) <= 4 * errors.std() / np.sqrt(errors.size)
    # Of either sign by itself too, or an error away from zero would pass.
    away = errors * np.sign(values)
    assert abs(away.mean()) <= 4 * away.std() / np.sqrt(away.size)
    assert errors.std() > 0


# --- The same bits on every backend ---

# What is stored is known to the bit: from a state of zeros, with A = 0 and x = 1, it is the product of dt and B.
SLOTS, HEADS, ROWS, COLUMNS = 5, 2, len(tiny.SCALES), 32


def products(dtype, seed, tokens):
    """Arguments of a call of two sequences, and the float32 states after each token, (2, tokens, H, P, N)."""
    rng = np.random.default_rng(seed)
    quantised = dtype in rounding.LARGEST
    shape = (2, 1, HEADS, ROWS)
    exponents = rng.uniform(-3, 3, shape) if quantised else rng.choice([-22.0, -14, -6, 0, 10], shape)
    dt = np.zeros((2, tokens, HEADS, ROWS), np.float32)  # of the tokens after the first: they change nothing
    dt[:, :1] = 2**exponents * rng.uniform(1, 2, shape)
    B = np.zeros((2, tokens, 1, COLUMNS), np.float32)
    B[:, 0] = rng.uniform(-1, 1, (2, 1, COLUMNS))
    if quantised:
        dt[:, 0, -1], B[:, 0, :, 0] = tiny.magnitudes(dtype), 1  # which is the largest of each row
    zeros = np.zeros((SLOTS, HEADS, ROWS, COLUMNS), "float32")
    state = ssu_bridge.QuantizedState.quantize(zeros, dtype) if quantised else zeros.astype(dtype)
    steps = np.zeros((SLOTS, tokens, HEADS, ROWS, COLUMNS), "float32")
    given = {
        "state": state,
        "x": np.ones((2, tokens, HEADS, ROWS), "float32"),
        "dt": dt,
        "A": np.zeros(HEADS, "float32"),
        "B": B,
        "C": np.zeros_like(B),
        "state_batch_indices": np.array([3, 1], "int32"),
        "intermediate_states": ssu_bridge.QuantizedState.quantize(steps, dtype) if quantised else steps.astype(dtype),
        "intermediate_state_indices": np.array([0, 4], "int32"),
    }
    first = dt[:, 0, :, :, None] * B[:, 0, :, None] + np.float32(0)  # 0 * decay + product makes 0 of -0
    return given, np.repeat(first[:, None], tokens, axis=1)


def stored(states, dtype, slot, token, kind, seed, rounds=10):
    """What has to be stored: values, and scales or None."""
    scales = None
    if dtype in rounding.LARGEST:
        states, scales = rounding.scale_rows(np, states, dtype)
    words = None
    if seed is not None:
        words = rounding.slot_words(slot, states.shape, token, kind, rounding.key_of(np.array(seed)), rounds)
    return rounding.rounded(states, dtype, words), scales


def run(given, mode, backend, seed):
    arguments = convert(given if seed is None else {**given, "rand_seed": np.array(seed)}, mode)
    skip_if_refused(explain(**arguments, backend=backend))
    return to_host(results_by_name(step(mode, arguments, backend=backend)), mode)


@pytest.mark.parametrize(
    ("mode", "backend"),
    [
        *(pair for pair in PAIRS if pair[0] != "jax.lax.scan"),
        *(pytest.param(*pair, marks=pytest.mark.gpu) for pair in GPU_PAIRS if pair[0] != "jax.lax.scan"),
    ],
)
@pytest.mark.parametrize("seed", [None, 0, 2**32 + 5, -3])
@pytest.mark.parametrize("dtype", [*rounding.LARGEST, "float16", "bfloat16"])
def test_the_same_bits(dtype, seed, mode, backend):
    if dtype == "int16" and seed is not None:
        pytest.skip("int16 is not rounded stochastically")
    given, states = products(dtype, seed=7, tokens=3)
    after = run(given, mode, backend, seed)
    for i, (slot, entry) in enumerate([(3, 0), (1, 4)]):
        places = [("state", (slot,), slot, 2, 0)]
        places += [("intermediate_states", (entry, t), entry, t, 1) for t in range(3)]
        for name, place, number, token, kind in places:
            values, scales = stored(states[i, token], dtype, number, token, kind, seed)
            np.testing.assert_array_equal(bits(after[name][place]), bits(values))
            if scales is not None:
                scale = {"state": "state_scale", "intermediate_states": "intermediate_state_scales"}[name]
                np.testing.assert_array_equal(after[scale][place], scales)


@pytest.mark.parametrize("rounds", [0, 1, 7])
def test_the_rounds_are_those_configured(rounds):
    given, states = products("float16", seed=7, tokens=1)
    with ssu_bridge.using(philox_rounds=rounds):
        after = run(given, "numpy", "reference", 5)
    np.testing.assert_array_equal(
        bits(after["state"][3]), bits(stored(states[0, 0], "float16", 3, 0, 0, 5, rounds or 10)[0])
    )


# --- Seeds ---


def test_a_seed_in_every_form():
    given, _ = products("bfloat16", seed=8, tokens=1)
    seed = 2**40 + 17
    key = np.array([seed]).view("uint32")
    expected = run(given, "numpy", "reference", seed)["state"]
    for form in (
        seed,
        np.int64(seed),
        np.array([seed]),
        torch.tensor(seed),
        torch.tensor([seed]),
        seed - 2**64 + 2**64,
    ):
        mode = "torch" if isinstance(form, torch.Tensor) else "numpy"
        _, state, _ = ssu_bridge.update(**convert(given, mode), rand_seed=form, backend="reference")
        np.testing.assert_array_equal(bits(to_host({"state": state}, mode)["state"]), bits(expected))
    for form in (key, jax.numpy.array(key), jax.random.wrap_key_data(key)):
        _, state, _ = ssu_bridge.update(**convert(given, "jax"), rand_seed=form, backend="reference")
        np.testing.assert_array_equal(bits(np.array(state)), bits(expected))


def test_seeds_beyond_64_bits():
    given, _ = products("bfloat16", seed=8, tokens=1)
    same = [ssu_bridge.update(**convert(given, "numpy"), rand_seed=s, backend="reference")[1] for s in (-1, 2**64 - 1)]
    np.testing.assert_array_equal(bits(same[0]), bits(same[1]))
    for mode in ("numpy", "torch"):
        for seed in (2**64, -(2**63) - 1):
            with pytest.raises(ValueError, match="rand_seed: expected an int of 64 bits"):
                ssu_bridge.update(**convert(given, mode), rand_seed=seed)
        with pytest.raises(TypeError, match="rand_seed: expected .* got bool"):
            ssu_bridge.update(**convert(given, mode), rand_seed=True)


@pytest.mark.parametrize("mode", ["numpy", "torch"])
def test_a_seed_is_drawn_in_each_call_where_that_is_configured(mode):
    given, _ = products("float16", seed=9, tokens=1)

    def results():
        torch.manual_seed(3)
        np.random.seed(3)
        with ssu_bridge.using(stochastic_rounding=True, backend="reference"):
            ssu_bridge.explain(**convert(given, mode))  # draws none
            return [to_host({"s": ssu_bridge.update(**convert(given, mode))[1]}, mode)["s"] for _ in range(2)]

    first, second = results()
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(results(), [first, second])  # by the framework's own generator


def test_jax_has_to_be_given_a_key():
    given, _ = products("float16", seed=9, tokens=1)
    with ssu_bridge.using(stochastic_rounding=True, backend="reference"):
        with pytest.raises(ValueError, match=r"rand_seed: expected a key.*jax\.random\.split"):
            ssu_bridge.update(**convert(given, "jax"))
        exact = convert({**given, "state": given["state"].astype("float32"), "intermediate_states": None}, "jax")
        del exact["intermediate_state_indices"]
        ssu_bridge.update(**exact)  # a state that is not rounded needs none


def test_the_largest_numbers():
    for dtype, largest in rounding.LARGEST.items():
        info = ml_dtypes.finfo if dtype.startswith("float") else np.iinfo
        assert largest == float(info(dtype).max)
