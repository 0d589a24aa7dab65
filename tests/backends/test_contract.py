"""Every case on every backend in every mode: right against float64, in place, and nothing else changed."""

import itertools

import pytest
from contract import assert_step
from modes import GPU_PAIRS, PAIRS, int64_as_it_is, to_mode

from ssu_bridge.api import explain
from ssu_bridge.testing.cases import CASES


def in_each_mode():
    """Return each case with each mode and backend; by default jitted cases are by turns in a scan and in none."""
    params = []
    for (number, case), (mode, backend) in itertools.product(enumerate(CASES), PAIRS):
        other = ("jax.jit", "jax.lax.scan")[number % 2]
        marks = [pytest.mark.nightly] if mode == other else []
        params.append(pytest.param(case, mode, backend, id=f"{case.name}-{mode}-{backend}", marks=marks))
    return params


@pytest.mark.parametrize(("case", "mode", "backend"), in_each_mode())
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
