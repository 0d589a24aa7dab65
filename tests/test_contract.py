"""Every case on every backend in every mode: right against float64, in place, and nothing else changed."""

import numpy as np
import pytest
from modes import GPU_PAIRS, PAIRS, address, bits, framework, int64_as_it_is, step, to_host, to_mode

from ssu_bridge.backends import reference
from ssu_bridge.cases import CASES
from ssu_bridge.check import compare
from ssu_bridge.update import explain


def assert_step(case, arrays, mode, backend, **flags):
    """Run one step and hold it against the reference: results, addresses, and everything that must not change."""
    given = to_mode(arrays, mode)
    flags = {**case.flags, **flags, "backend": backend}
    problem = explain(**given, **flags).choices[0].problem
    exact = reference.compute(problem, arrays)
    state, before = given["state"], address(given["state"])
    out, new_state = step(mode, given, **flags)

    host_out, host_state = to_host({"out": out, "state": new_state}, mode).values()
    assert host_out.dtype == arrays["x"].dtype
    assert host_out.shape == arrays["x"].shape
    rows = compare(exact, host_out, arrays["state"], host_state)
    assert all(row.passed for row in rows), rows
    if framework(mode) != "jax":
        assert new_state is state
    elif backend != "reference":
        assert state.is_deleted()
    if arrays["state"].size and (mode, backend) != ("jax", "reference"):
        assert address(new_state) == before
    others = {name: array for name, array in given.items() if name != "state"}
    for name, after in to_host(others, mode).items():
        np.testing.assert_array_equal(bits(after), bits(arrays[name]), err_msg=name)


@pytest.mark.parametrize(("mode", "backend"), PAIRS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case, mode, backend):
    arrays = case.arrays(seed=len(case.name))
    with int64_as_it_is(arrays):
        assert_step(case, arrays, mode, backend)


@pytest.mark.gpu
@pytest.mark.parametrize(("mode", "backend"), GPU_PAIRS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case_on_a_gpu(case, mode, backend):
    test_case(case, mode, backend)


@pytest.mark.parametrize(
    ("mode", "backend"), [*PAIRS, *(pytest.param(*pair, marks=pytest.mark.gpu) for pair in GPU_PAIRS)]
)
def test_auto_takes_the_best(mode, backend):
    case = CASES[0]
    given = to_mode(case.arrays(seed=1), mode)
    assert explain(**given, **case.flags).backend == ("triton" if backend == "triton" else "cpu")
    assert explain(**given, **case.flags, backend=backend).backend == backend
