"""How much Python a repeated call runs on the host, in each framework."""

import sys

import pytest
from modes import to_mode

import ssu_bridge
from ssu_bridge.testing.cases import Case

CASE = Case("warm", headdim=4, dstate=8)
# Functions of Python, update among them. Each costs about as much as a small operator.
FRAMES = {"jax": 6, "torch": 8, "numpy": 9}


def frames(function):
    """Return how many functions of Python a call runs."""
    ran = []

    def trace(frame, event, argument):
        if event == "call":
            ran.append(frame.f_code.co_qualname)

    sys.setprofile(trace)
    try:
        function()
    finally:
        sys.setprofile(None)
    return ran


@pytest.mark.parametrize("mode", FRAMES)
def test_a_repeated_call_runs_few_functions_of_python(mode):
    given = {**to_mode(CASE.arrays(seed=1), mode), **CASE.flags, "backend": "cpu"}

    def call():
        _, given["state"] = ssu_bridge.update(**given)

    for _ in range(3):
        call()
    _, *ran = frames(call)
    assert len(ran) <= FRAMES[mode], ran
