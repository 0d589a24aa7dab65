"""Every case on every backend in every mode: right against float64, in place, and nothing else changed."""

import pytest
from contract import assert_step
from modes import GPU_PAIRS, PAIRS, in_turns, int64_as_it_is, to_mode

from ssu_bridge.api import explain
from ssu_bridge.testing.cases import CASES


@pytest.mark.parametrize(("case", "mode", "backend"), in_turns({case.name: case for case in CASES}))
def test_case(case, mode, backend):
    arrays = case.arrays(seed=len(case.name))
    with int64_as_it_is(arrays):
        assert_step(case, arrays, mode, backend)


@pytest.mark.gpu
@pytest.mark.parametrize(("mode", "backend"), [*GPU_PAIRS, ("jax.jit", "xla")])
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
