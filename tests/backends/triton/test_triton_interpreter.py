"""Triton's kernels in its interpreter: they agree with the reference, and serve a model."""

import dataclasses

import pytest
import torch
from compiled_kernels import computed_values, problem_of
from interpreter import interpret, mend_interpreter, run_in_interpreter, run_interpreted
from replays import CONFIGS, serve

from ssu_bridge.backends import reference
from ssu_bridge.backends.base import HostKernel
from ssu_bridge.backends.triton import forms
from ssu_bridge.backends.triton.compile import specialise
from ssu_bridge.testing.cases import CASES


# By default each value of a field of a specialisation that changes what is computed is in some case of few heads.
@pytest.mark.parametrize("first", [True, pytest.param(False, marks=pytest.mark.nightly)], ids=["first", "others"])
def test_the_interpreter_agrees_with_the_reference(first):
    run_in_interpreter(__file__, f"interpreted_cases({first})")


# The interpreter takes about a second for the programs of a head.
MOST_HEADS_AT_FIRST = 8


def interpreted_cases(first):
    mend_interpreter()
    seen = set()
    for case in CASES:
        arrays = case.arrays(seed=len(case.name))
        # The interpreter cuts bfloat16 off where a GPU rounds: what is stored in it is tested on a GPU.
        cut_off = arrays["x"].dtype.name == "bfloat16" or (arrays["state"].dtype.name == "bfloat16" and not case.seed)
        if cut_off or case.nheads > 24:
            continue
        # From 9.0 on it waits for other kernels: none here.
        problems = [problem_of(case, (8, 0), algorithm=algorithm) for algorithm in ("loop", "matrix")]
        # One token has one form.
        distinct = {specialise(p, forms.tile(p)): p for p in problems if forms.refusal(p) is None}
        for specialisation, problem in distinct.items():
            own = computed_values(specialisation)
            if (not own <= seen and case.nheads <= MOST_HEADS_AT_FIRST) == first:
                interpret(case, arrays, problem)
            seen |= own


# Of one token, and of several in packed sequences.
@pytest.mark.parametrize("number", [1, pytest.param(4, marks=pytest.mark.nightly)])
def test_a_server_decodes_in_the_interpreter(number):
    run_in_interpreter(__file__, f"interpreted_schedule({number})")


def interpreted_schedule(number):
    """Run a short schedule whose steps the reference backend leaves to the interpreter."""
    mend_interpreter()
    steps = []

    def load(problem):
        def run(arrays, out):
            steps.append(problem)
            tensors = {name: torch.from_numpy(array) for name, array in {**arrays, "out": out}.items()}
            run_interpreted(problem.on("cuda", (8, 0)), tensors)

        return HostKernel(run)

    reference.load = load
    serve(dataclasses.replace(CONFIGS[number], window=5, steps=12), "numpy", "reference", prompts="cpu")
    assert len(steps) == 12
