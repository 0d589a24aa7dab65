"""NaN and infinities stay in their sequence and head: all else has the bits that it has without them."""

import dataclasses

import numpy as np
import pytest
from modes import GPU_PAIRS, bits, in_turns, skip_if_refused, stepper, to_host, to_mode

from ssu_bridge.api import explain
from ssu_bridge.testing.cases import Case
from ssu_bridge.testing.check import results_by_name

SINGLE = Case("single", indices=(4, 0, 2))
CASES = {
    "single": SINGLE,
    "several tokens": dataclasses.replace(SINGLE, tokens=4),
    "many tokens": dataclasses.replace(SINGLE, tokens=20, headdim=8),
    "packed": dataclasses.replace(SINGLE, tokens=9, cu_seqlens=(0, 4, 5, 9)),
    "int8 state": dataclasses.replace(SINGLE, tokens=4, dtypes={"state": "int8"}),
    "a tree": dataclasses.replace(SINGLE, tokens=3, parents=((-1, 0, 0),) * 3, steps=3),
}
SEQUENCE, HEAD = 1, 2


def rows_of(case):
    """Return the rows of the sequence, as an index of arrays with a row for each token."""
    return slice(*case.cu_seqlens[SEQUENCE : SEQUENCE + 2]) if case.cu_seqlens else slice(SEQUENCE, SEQUENCE + 1)


def spoiled(arrays, case, value):
    """Put a value into x and the state of one head of one sequence."""
    arrays = {name: array.copy() for name, array in arrays.items()}
    arrays["x"][rows_of(case)][..., HEAD, 0] = value
    arrays["state_scale" if "state_scale" in arrays else "state"][case.indices[SEQUENCE], HEAD, 1] = value
    return arrays


@pytest.mark.parametrize(
    ("case", "mode", "backend"),
    [
        *in_turns(CASES),
        *(pytest.param(case, *pair, marks=pytest.mark.gpu) for case in CASES.values() for pair in GPU_PAIRS),
    ],
)
def test_they_stay_in_their_sequence_and_head(case, mode, backend):
    arrays = case.arrays(seed=3)
    skip_if_refused(explain(**to_mode(arrays, mode), **case.flags, backend=backend))
    step = stepper(mode, **case.flags, backend=backend)  # one program for all values

    def run(arrays):
        return to_host(results_by_name(step(to_mode(arrays, mode))), mode)

    for value in (np.nan, np.inf, -np.inf):
        assert_apart(case, run(arrays), run(spoiled(arrays, case, value)))


def assert_apart(case, clean, after):
    """Assert that results differ in one head of one sequence alone, and that it is not finite."""
    out = after["out"][rows_of(case)][..., HEAD, :2].astype("float64")
    assert not np.isfinite(out[..., -1:, :] if case.tokens is None else out.reshape(-1, 2)[-1]).all()
    for results in (clean, after):
        results["out"][rows_of(case)][..., HEAD, :] = 0
    slot = case.indices[SEQUENCE]
    for name in clean:
        heads = {"state": (slot, HEAD), "state_scale": (slot, HEAD), "intermediate_states": (slot, slice(None), HEAD)}
        for results in (clean, after):
            if name in heads:
                results[name][heads[name]] = 0
        np.testing.assert_array_equal(bits(after[name]), bits(clean[name]), name)
