"""NumPy's arrays of every kind, beside JAX arrays and alone: a repeated call checks what a first call checks."""

import tempfile

import jax
import numpy as np
import pytest
from copied import copied
from modes import bits, to_mode

import ssu_bridge
from ssu_bridge.testing.cases import Case

CASE = Case("host", sequences=2, slots=4, nheads=2, headdim=4, dstate=8, ngroups=1, indices=(1, 3), absent=("z",))
MODES = [
    ("jax", "cpu"),
    ("jax", "xla"),
    ("jax.jit", "cpu"),
    ("jax.jit", "xla"),
    ("numpy", "cpu"),
    ("numpy", "reference"),
]
PLAIN = CASE.arrays(seed=1)
TABLE = "state_batch_indices"


def memmap(array):
    # The file goes with its last handle, which the array keeps.
    with tempfile.TemporaryFile() as file:
        mapped = np.memmap(file, array.dtype, "w+", shape=array.shape)
    mapped[...] = array
    return mapped


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def swapped(array):
    return array.astype(array.dtype.newbyteorder())


EQUAL = {
    "memmap": memmap,
    "recarray": lambda array: array.view(np.recarray),
    "read-only": read_only,
}
WRONG = {
    "byte order": (swapped, ValueError, "(this machine's byte order|expected dtype).*, got .*[<>]"),
    "masked": (np.ma.masked_array, TypeError, "got numpy.*MaskedArray"),
    "matrix": (lambda array: array.reshape(len(array), -1).view(np.matrix), TypeError, "got numpy.*matrix"),
    "structured": (lambda array: array.view([("number", array.dtype)]), ValueError, "expected dtype .*, got .*"),
    "object": (lambda array: array.astype(object), ValueError, "expected dtype .*, got object"),
}


def call(arrays, mode, backend, **flags):
    """Return the output and the state of a call with NumPy arrays, but for the state where JAX computes."""
    arrays = {name: array.copy() if name == "state" else array for name, array in arrays.items()}
    state = arrays.pop("state")
    if mode == "numpy":
        return ssu_bridge.update(state, **arrays, backend=backend, **flags)[:2]

    def step(state):
        return ssu_bridge.update(state, **arrays, backend=backend, **flags)[:2]

    return (jax.jit(step) if mode == "jax.jit" else step)(copied(state))


def same(got, expected):
    for array, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(bits(np.array(array)), bits(np.array(other)))


@pytest.mark.parametrize(("mode", "backend"), MODES)
def test_arrays_of_every_kind_after_a_plain_call(mode, backend):
    expected = call(PLAIN, mode, backend)
    for name in ("x", "dt", "B", TABLE):
        for convert in EQUAL.values():
            same(call({**PLAIN, name: convert(PLAIN[name])}, mode, backend), expected)
        for convert, error, message in WRONG.values():
            with pytest.raises(error, match=f"^{name}: .*{message}"):
                call({**PLAIN, name: convert(PLAIN[name])}, mode, backend)
    same(call(PLAIN, mode, backend), expected)


FAR = 2**32
TABLES = {
    "state_batch_indices": (Case("far slots", indices=(1, 3), sequences=2), [FAR + 1, 3 - FAR]),
    "dst_state_batch_indices": (Case("far destinations", sequences=2, indices=(1, 3), destinations=(0, 2)), [FAR, 2]),
    "num_accepted_tokens": (
        Case("far counts", sequences=2, tokens=3, indices=((1, 2, 3), (4, 5, 0)), accepted=(1, 2), slots=6),
        [FAR + 1, 2 - FAR],
    ),
    "cu_seqlens": (Case("far edges", sequences=2, tokens=5, indices=(1, 3), cu_seqlens=(0, 2, 5)), [-FAR, 2, FAR + 1]),
    "intermediate_state_indices": (
        Case("far entries", sequences=2, tokens=2, indices=(1, 3), steps=2, entries=(0, 1)),
        [FAR, 1],
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_numbers_beyond_32_bits_in_every_table(name):
    case, numbers = TABLES[name]
    arrays = case.arrays(seed=2)
    assert name in arrays
    arrays[name] = np.array(numbers, np.int64)
    expected = call(arrays, "numpy", "reference", **case.flags)
    for mode, backend in MODES[:-2]:
        plain = call(arrays, mode, backend, **case.flags)
        np.testing.assert_allclose(np.array(plain[1]), expected[1], rtol=1e-5, atol=1e-5)
        same(call({**arrays, name: memmap(arrays[name])}, mode, backend, **case.flags), plain)


def aligned(array):
    """Return a copy that begins at a multiple of 64 bytes, whose memory JAX takes as it is."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    first = -memory.ctypes.data % 64
    copy = memory[first : first + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@pytest.mark.parametrize("backend", ["cpu", "xla"])
def test_what_is_overwritten_after_a_call_was_read_before(backend):
    case = Case("overwritten", sequences=32, slots=32, nheads=16, headdim=64, dstate=64, indices=tuple(range(32)))
    arrays = case.arrays(seed=3)
    given = to_mode(arrays, "jax")
    expected = np.array(ssu_bridge.update(**to_mode(arrays, "jax"), backend=backend)[0])
    for _ in range(10):
        x = aligned(arrays["x"])
        out, given["state"] = ssu_bridge.update(**{**given, "state": copied(arrays["state"]), "x": x}, backend=backend)
        x[...] = np.nan
        np.testing.assert_array_equal(bits(np.array(out)), bits(expected))
