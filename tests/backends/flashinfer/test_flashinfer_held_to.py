"""What the flashinfer backend is held to: the reference, but for its own softplus and random numbers."""

import numpy as np
from flashinfer_calls import (
    problem_of,
    sized,
)
from modes import to_mode

import ssu_bridge
from ssu_bridge.config import Backend
from ssu_bridge.testing.check import judge


def judged(backend, case, spoil, **scales):
    """Whether the state passes that the reference leaves, spoilt; of arrays of which some are scaled."""
    arrays = case.arrays(seed=3)
    arrays |= {name: arrays[name] * arrays[name].dtype.type(scale) for name, scale in scales.items()}
    before = {name: array.copy() for name, array in arrays.items()}
    given = to_mode(arrays, "numpy")
    problem = ssu_bridge.explain(**given, **case.flags, backend="reference").choices[0].problem
    out, state = ssu_bridge.update(**given, **case.flags, backend="reference")
    spoil(before, state)
    rows = judge(problem, Backend(backend), before, {"out": out, "state": state})
    return next(row for row in rows if row.name == "state").passed


SMALL = sized(nheads=2, ngroups=1, headdim=4, dstate=8, dtypes={"state": "float16"}, seed=5, dt_softplus=False)
USED = [4, 0, 2]  # the slots that are written


def test_any_random_numbers_will_do_for_flashinfer():
    def other_words(arrays, state):
        other = to_mode({**arrays, "rand_seed": np.array(77)}, "numpy")
        ssu_bridge.update(**other, **SMALL.flags, backend="reference")
        state[...] = other["state"]

    def two_steps_off(arrays, state):
        state[USED] = (state[USED].view("uint16") + np.uint16(2)).view("float16")

    assert judged("flashinfer", SMALL, other_words)
    assert not judged("triton", SMALL, other_words)
    assert not judged("flashinfer", SMALL, two_steps_off)


def test_small_numbers_may_be_rounded_to_zero_by_flashinfer():
    def to_zero(arrays, state):
        assert state[USED].any()
        state[USED] = 0

    assert judged("flashinfer", SMALL, to_zero, state=1e-5, x=1e-6)
    assert not judged("triton", SMALL, to_zero, state=1e-5, x=1e-6)
    assert not judged("flashinfer", SMALL, to_zero, state=1e-2, x=1e-2)


def test_softplus_may_be_as_coarse_as_numbers_near_one_for_flashinfer():
    # Without a state and softplus of about -20 there is little but x B softplus(dt).
    case = sized(SMALL, dtypes={}, seed=None, dt_softplus=True, absent=("dt_bias", "z"), indices=(-1, 0, 2))
    problem = problem_of({**case.arrays(seed=3), **case.flags}).on("cpu")
    arrays = case.arrays(seed=3) | {"dt": np.full((3, 2), -17, "float32"), "state": np.zeros((6, 2, 4, 8), "float32")}
    given = to_mode({name: array.copy() for name, array in arrays.items()}, "numpy")
    out, state = ssu_bridge.update(**given, **case.flags, backend="reference")
    assert 0 < np.abs(state).max() < 1e-6

    def passes(backend, state):
        return all(row.passed for row in judge(problem, Backend(backend), arrays, {"out": out, "state": state}))

    assert passes("triton", state)
    assert passes("flashinfer", 0 * state)
    assert not passes("triton", 0 * state)
    assert not passes("flashinfer", state + np.float32(1e-3) * (state != 0))
