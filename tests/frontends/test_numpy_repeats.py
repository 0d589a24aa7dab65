"""Repeated NumPy calls: what they look up, what they check again."""

import jax
import numpy as np
import pytest
from modes import bits

import ssu_bridge
from ssu_bridge.core.bounded import Bounded
from ssu_bridge.frontends import numpy as frontend
from ssu_bridge.testing.cases import CASES, Case, arguments

CASE = Case("repeats", headdim=4, dstate=8)


def test_a_repeated_call_describes_and_chooses_nothing(monkeypatch):
    arrays = CASE.arrays(seed=1)
    ssu_bridge.update(**arrays, **CASE.flags)
    described = []
    monkeypatch.setattr(frontend, "describe", lambda *args, **kwargs: described.append(args))
    ssu_bridge.update(**arrays, **CASE.flags)
    ssu_bridge.update(**{**CASE.arrays(seed=2), "state": arrays["state"]}, **CASE.flags)
    assert described == []


@pytest.mark.parametrize("case", CASES[::7], ids=lambda case: case.name)
def test_a_repeated_call_computes_what_a_first_one_does(case):
    results = []
    for _ in range(2):
        given = arguments(case.arrays(seed=3), "numpy", np.array, case.window)
        try:
            # Rows that belong to no sequence are left as they are.
            result = ssu_bridge.update(**given, **case.flags, out=np.zeros_like(given["x"]))
        except ssu_bridge.UnsupportedError as refusal:
            pytest.skip(str(refusal))
        results.append(jax.tree.leaves(result))
    for array, other in zip(*results, strict=True):
        np.testing.assert_array_equal(bits(array), bits(other))


CHANGED = {
    "shape": ("x", lambda a: a[:, :-1], "x: expected shape"),
    "strides": ("A", lambda a: np.asfortranarray(np.repeat(a, 2))[::2], "A: expected .* dense"),
    "dtype": ("B", lambda a: a.astype("float64"), "B: expected dtype"),
    "alignment": ("dt", lambda a: odd(a), "dt: expected elements aligned"),
    "writeable": ("state", lambda a: read_only(a), "state: expected a writeable"),
    "none": ("C", lambda a: None, "C: expected a JAX, Torch or NumPy array, got None"),
    "list": ("D", lambda a: a.tolist(), "D: expected a JAX, Torch or NumPy array, got list"),
    "scalar": ("D", lambda a: a.flat[0], "D: expected a JAX, Torch or NumPy array, got numpy.float32"),
}


def odd(array):
    memory = np.zeros(array.nbytes + 1, np.uint8)[1:]
    copy = memory.view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("what", CHANGED)
def test_what_differs_from_the_first_call_is_checked(what):
    name, change, message = CHANGED[what]
    ssu_bridge.update(**CASE.arrays(seed=1), **CASE.flags)
    arrays = CASE.arrays(seed=1)
    arrays[name] = change(arrays[name])
    state = arrays["state"].copy()
    with pytest.raises((TypeError, ValueError), match=message):
        ssu_bridge.update(**arrays, **CASE.flags)
    np.testing.assert_array_equal(bits(arrays["state"]), bits(state))


def test_a_given_out_is_part_of_what_is_checked():
    arrays = CASE.arrays(seed=1)
    out = np.empty_like(arrays["x"])
    expected, _ = ssu_bridge.update(**CASE.arrays(seed=1), **CASE.flags)
    for _ in range(2):
        arrays = CASE.arrays(seed=1)
        got, state = ssu_bridge.update(**arrays, **CASE.flags, out=out)
        assert got is out
        assert state is arrays["state"]
        np.testing.assert_array_equal(bits(got), bits(expected))
    with pytest.raises(ValueError, match="out: expected shape"):
        ssu_bridge.update(**arrays, **CASE.flags, out=out[:, :-1])


def test_a_bounded_table_does_not_grow():
    table = Bounded(3)
    for number in range(10):
        table[number] = number
        assert table[number] == number
        assert len(table) <= 3
    table[9] = 0
    assert table == {9: 0}
