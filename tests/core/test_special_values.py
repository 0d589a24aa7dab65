"""NaN and infinities stay in their sequence, head and rows: all else has the bits that it has without them."""

import dataclasses

import numpy as np
import pytest
from modes import GPU_PAIRS, bits, in_turns, skip_if_refused, stepper, to_host, to_mode

from ssu_bridge.api import explain
from ssu_bridge.backends import reference
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


# A form is selected by name where there are several tokens.
FORMS = {
    f"{name}, {form}": (case, form)
    for name, case in CASES.items()
    for form in (("auto",) if case.tokens is None else ("loop", "matrix"))
}


@pytest.mark.parametrize(
    ("case", "mode", "backend"),
    [
        *in_turns(FORMS),
        *(pytest.param(case, *pair, marks=pytest.mark.gpu) for case in FORMS.values() for pair in GPU_PAIRS),
    ],
)
def test_they_stay_in_their_sequence_head_and_rows(case, mode, backend):
    case, form = case
    arrays = case.arrays(seed=3)
    flags = {**case.flags, "backend": backend, "algorithm": form}
    skip_if_refused(explain(**to_mode(arrays, mode), **flags))
    step = stepper(mode, **flags)  # one program for all values

    def run(arrays):
        return to_host(results_by_name(step(to_mode(arrays, mode))), mode)

    for value in (np.nan, np.inf, -np.inf):
        assert_apart(case, run(arrays), run(spoiled(arrays, case, value)))


def assert_apart(case, clean, after):
    """Assert that results differ in two rows of one head of one sequence alone, and that those are not finite."""
    out = after["out"][rows_of(case)][..., HEAD, :2].astype("float64")
    assert not np.isfinite(out[..., -1:, :] if case.tokens is None else out.reshape(-1, 2)[-1]).all()
    for results in (clean, after):
        results["out"][rows_of(case)][..., HEAD, :2] = 0
    slot, two = case.indices[SEQUENCE], (HEAD, slice(2))
    for name in clean:
        rows = {"state": (slot, *two), "state_scale": (slot, *two), "intermediate_states": (slot, slice(None), *two)}
        for results in (clean, after):
            if name in rows:
                results[name][rows[name]] = 0
        np.testing.assert_array_equal(bits(after[name]), bits(clean[name]), name)


D = np.array([np.inf, 1.5, -np.inf, np.nan], "float32")


@pytest.mark.parametrize(
    ("case", "mode", "backend"),
    [
        *in_turns(FORMS),
        *(pytest.param(case, *pair, marks=pytest.mark.gpu) for case in FORMS.values() for pair in GPU_PAIRS),
    ],
)
def test_a_skip_that_is_not_finite_is_added_to_its_head(case, mode, backend):
    case, form = case
    case = dataclasses.replace(case, nheads=4, ngroups=2)
    arrays = {**case.arrays(seed=3), "D": D}
    flags = {**case.flags, "backend": backend, "algorithm": form}
    explanation = explain(**to_mode(arrays, mode), **flags)
    skip_if_refused(explanation)
    got = to_host(results_by_name(stepper(mode, **flags)(to_mode(arrays, mode))), mode)
    exact = reference.compute(explanation.choices[0].problem, arrays)
    out, right = got["out"].astype("float64"), exact.out.reshape(got["out"].shape)
    assert (np.isinf(right).sum(), np.isnan(right).sum()) == (right.size // 2, right.size // 4)
    np.testing.assert_array_equal(np.where(np.isfinite(right), 0, out), np.where(np.isfinite(right), 0, right))
    assert np.isfinite(out[np.isfinite(right)]).all()


LATE = 12
LONG = {
    "tokens": dataclasses.replace(SINGLE, tokens=20, headdim=8),
    "packed": dataclasses.replace(SINGLE, tokens=25, headdim=8, cu_seqlens=(0, 2, 22, 25)),
}


@pytest.mark.parametrize(
    ("case", "mode", "backend"),
    [
        *in_turns({f"{name}, {form}": (case, form) for name, case in LONG.items() for form in ("loop", "matrix")}),
        *(
            pytest.param((case, form), *pair, marks=pytest.mark.gpu)
            for case in LONG.values()
            for form in ("loop", "matrix")
            for pair in GPU_PAIRS
        ),
    ],
)
def test_they_reach_no_earlier_token(case, mode, backend):
    """In the matrix form x is an exception: where it is not finite, its row's outputs of earlier tokens are NaN as well."""
    case, form = case
    arrays = case.arrays(seed=3)
    flags = {**case.flags, "backend": backend, "algorithm": form}
    skip_if_refused(explain(**to_mode(arrays, mode), **flags))
    step = stepper(mode, **flags)
    place = (rows_of(case).start + LATE,) if case.cu_seqlens else (SEQUENCE, LATE)

    def out_of(arrays):
        return bits(to_host(results_by_name(step(to_mode(arrays, mode))), mode)["out"])

    clean = out_of(arrays)
    sequence = slice(*case.cu_seqlens[SEQUENCE : SEQUENCE + 2]) if case.cu_seqlens else SEQUENCE
    for name in ("dt", "B", "C", "z") if form == "matrix" else ("x", "dt", "B", "C", "z"):
        for value in (np.nan, np.inf, -np.inf):
            spoiled = {**arrays, name: arrays[name].copy()}
            spoiled[name][place] = value
            after = out_of(spoiled)
            assert (after[sequence][LATE] != clean[sequence][LATE]).any(), name
            for results in (after, held := clean.copy()):
                results[sequence][LATE:] = 0
            np.testing.assert_array_equal(after, held, name)
