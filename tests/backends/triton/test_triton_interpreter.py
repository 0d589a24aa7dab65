"""Triton's kernels in its interpreter: they agree with the reference, and serve a model."""

import dataclasses

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from compiled_kernels import computed_values, problem_of
from interpreter import interpret, mend_interpreter, run_in_interpreter, run_interpreted
from replays import CONFIGS, serve

from ssu_bridge.backends import reference
from ssu_bridge.backends.base import HostKernel
from ssu_bridge.backends.triton import forms
from ssu_bridge.backends.triton.kernels.replay_token import sequence_at
from ssu_bridge.backends.triton.specialisation import specialise
from ssu_bridge.frontends.torch.host import from_host, to_host
from ssu_bridge.testing.cases import CASES, Case


# By default each value of a field of a specialisation that changes what is computed is in some case of few heads.
@pytest.mark.parametrize("first", [True, pytest.param(False, marks=pytest.mark.nightly)], ids=["first", "others"])
def test_the_interpreter_agrees_with_the_reference(first):
    # In one process, which takes seconds to begin.
    run_in_interpreter(__file__, f"interpreted_cases({first})", *(["interpreted_skips()"] if first else []))


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
        if first and case.name == "packed":  # as where rows have gaps, whose strides are read at run time
            for problem in distinct.values():
                interpret(case, arrays, dataclasses.replace(problem, strided=("x",)))
        for specialisation, problem in distinct.items():
            own = computed_values(specialisation)
            if (not own <= seen and case.nheads <= MOST_HEADS_AT_FIRST) == first:
                interpret(case, arrays, problem)
            seen |= own


def interpreted_skips():
    """A D that is not finite is added to its own head, and to no other."""
    mend_interpreter()
    dtypes = {"*": "float16", "A": "float32", "D": "float32", "state": "float32"}
    case = Case("skips", tokens=5, nheads=4, ngroups=2, headdim=16, dstate=16, absent=("z",), dtypes=dtypes)
    arrays = {**case.arrays(seed=3), "D": np.array([np.inf, 1.5, -np.inf, np.nan], "float32")}
    problem = problem_of(case, (8, 0), algorithm="matrix")
    tensors = {name: from_host(array.copy()) for name, array in {**arrays, "out": arrays["x"]}.items()}
    run_interpreted(problem, tensors)
    out, right = to_host(tensors["out"]), reference.compute(problem, arrays).out.reshape(arrays["x"].shape)
    assert np.isinf(right).sum() == right.size // 2
    np.testing.assert_allclose(out, right, rtol=1e-2, atol=1e-2)


# Replay of one token, with a checkpoint that a flush reads twice and once, and of several in packed sequences. A process
# takes seconds to begin.
@pytest.mark.parametrize(
    "calls",
    [
        [
            "placed_sequences()",
            "interpreted_schedule(1, {})",
            "interpreted_schedule(1, {'state_dtype': 'float16', 'tolerance': 2e-3})",
        ],
        pytest.param(["interpreted_schedule(4, {})"], marks=pytest.mark.nightly),
    ],
    ids=["one token", "several"],
)
def test_a_server_decodes_in_the_interpreter(calls):
    run_in_interpreter(__file__, *calls)


def interpreted_schedule(number, changes):
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
    serve(dataclasses.replace(CONFIGS[number], window=5, steps=9, **changes), "numpy", "reference", prompts="cpu")
    assert len(steps) == 9


def placed_sequences():
    """Each sequence of a replay step has one place, and those that flush come first, for cursors that are drawn."""
    mend_interpreter()
    rng = np.random.default_rng(0)
    for sequences in (1, 2, 7, 16):
        for _ in range(4):
            table = rng.permutation(20)[:sequences].astype("int32")
            table[rng.random(sequences) < 0.2] = rng.choice([-1, 99])
            cursor = rng.choice([0, 3, 4, 99, -7], 20, p=[0.2, 0.2, 0.3, 0.2, 0.1]).astype("int32")
            tensors = [torch.from_numpy(array) for array in (table, np.arange(20, dtype="int32"), cursor)]
            results = torch.zeros(4, sequences, dtype=torch.int64)
            placed[(sequences,)](results, *tensors, sequences, 20)
            order, slots, first, count = results.numpy()
            assert sorted(order) == list(range(sequences))
            read = np.where((table >= 0) & (table < 20), table, -1)[order]
            assert (slots == read).all()
            assert (first == np.where(read >= 0, read % 5, 0)).all()
            assert (count == np.where(read >= 0, cursor[read].clip(0, 4), 0)).all()
            flushes, half = count == 4, sequences // 2
            # One in the later half flushes only where its partner does.
            assert (flushes[:half] >= flushes[half : 2 * half]).all()


@triton.jit
def placed(results, table, start, pending, sequences, slots):
    place = tl.program_id(0)
    found = sequence_at(place.to(tl.int64), sequences, table, 1, slots, start, pending, 1, 1, -1, 4, 5, True)
    for i in tl.static_range(4):
        tl.store(results + i * sequences + place, found[i])
