"""The matrix form on a GPU: the contract, its error against the loop's, bits, trees, long prompts."""

import dataclasses

import numpy as np
import pytest
import torch
from contract import assert_step
from gaps import WITH_GAPS, spread
from modes import GPU_PAIRS, bits, int64_as_it_is, skip_if_refused, to_host, to_mode

import ssu_bridge
from ssu_bridge.api import explain
from ssu_bridge.backends.triton import forms
from ssu_bridge.testing.cases import CASES, Case

pytestmark = pytest.mark.gpu

MODES = [mode for mode, backend in GPU_PAIRS if backend == "triton"]
LAYER = Case("layer", nheads=16, headdim=64, dstate=128, ngroups=8, indices=(4, 0, 2))
BFLOAT16 = {"*": "bfloat16", "A": "float32"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [case for case in CASES if case.tokens != 1], ids=lambda case: case.name)
def test_case(case, mode):
    arrays = case.arrays(seed=len(case.name))
    with int64_as_it_is(arrays):
        assert_step(case, arrays, mode, "triton", algorithm="matrix")


@pytest.mark.parametrize("state", ["float32", "bfloat16", "float16", "int8", "int16", "float8_e4m3fn"])
@pytest.mark.parametrize("tokens", [2, 16, 17, 300])
def test_a_layer(state, tokens):
    case = dataclasses.replace(LAYER, tokens=tokens, dtypes={**BFLOAT16, "state": state})
    assert_step(case, case.arrays(seed=tokens), "torch.cuda", "triton", algorithm="matrix")


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": 8, "seed": 7, "dtypes": {**BFLOAT16, "state": "bfloat16"}},
        {"tokens": 90, "seed": 7, "dtypes": {**BFLOAT16, "state": "int8"}},
        {"tokens": 90, "steps": 2, "intermediate_stride": 40},
        {"tokens": 70, "steps": 4, "intermediate_stride": 16, "dtypes": {**BFLOAT16, "state": "int8"}},
        {"tokens": 20, "has_initial_state": (True, False, True)},
        {"tokens": 90, "cu_seqlens": (0, 1, 40, 90)},
        {"tokens": 70, "headdim": 40, "dstate": 96},
        # With decays from another kernel: in one piece with tokens that fill no chunk, and in segments.
        {"tokens": 300, "has_initial_state": (True, False, True), "dtypes": BFLOAT16, "destinations": (1, -1, 3)},
        {"tokens": 320, "dtypes": BFLOAT16},
        {"tokens": 1100, "sequences": 1, "indices": (2,), "dtypes": BFLOAT16},
        {"tokens": 1120, "sequences": 1, "indices": (2,), "dtypes": BFLOAT16},
        {"tokens": 1100, "sequences": 1, "indices": (2,), "dtypes": {**BFLOAT16, "state": "int8"}, "absent": ("z",)},
        {"tokens": 64, "parents": tuple(tuple(t // 2 - 1 for t in range(64)) for _ in range(3))},
        {"tokens": 90, "cu_seqlens": (0, 3, 20, 90), "parents": tuple(t % 7 - 1 for t in range(90))},
    ],
    ids=str,
)
def test_what_a_call_can_ask_for(changes):
    case = dataclasses.replace(LAYER, **changes)
    assert_step(case, case.arrays(seed=11), "torch.cuda", "triton", algorithm="matrix")


@pytest.mark.parametrize("algorithm", ["loop", "matrix"])
@pytest.mark.parametrize("name", WITH_GAPS)
def test_rows_with_gaps_give_the_same_bits(name, algorithm):
    case = dataclasses.replace(LAYER, dtypes=BFLOAT16, **WITH_GAPS[name])
    arrays = case.arrays(seed=3)
    flags = {**case.flags, "backend": "triton", "algorithm": algorithm}
    skip_if_refused(explain(**to_mode(arrays, "torch.cuda"), **flags))
    expected = ssu_bridge.update(**to_mode(arrays, "torch.cuda"), **flags)
    got = ssu_bridge.update(**spread(case, to_mode(arrays, "torch.cuda")), **flags)
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)


def run(case, arrays, algorithm):
    given = to_mode(arrays, "torch.cuda")
    results = ssu_bridge.update(**given, **case.flags, backend="triton", algorithm=algorithm)
    return to_host(dict(zip(("out", "state"), results, strict=True)), "torch")


# What is written of an output in bfloat16 hides the error before.
@pytest.mark.parametrize(("other", "compared"), [("bfloat16", ("state",)), ("float32", ("state", "out"))])
@pytest.mark.parametrize("tokens", [2, 16, 256])
@pytest.mark.parametrize("dt", [-9.0, -4.0, 80.0])
def test_its_error_is_at_most_twice_that_of_the_loop(tokens, dt, other, compared):
    dtypes = {"*": other, "A": "float32", "state": "float32"}
    case = dataclasses.replace(LAYER, tokens=tokens, absent=("z", "D"), dtypes=dtypes)
    arrays = case.arrays(seed=tokens)
    arrays["dt"] = np.full_like(arrays["dt"], dt)
    right = exactly(case, arrays)
    errors = {}
    for algorithm in ("loop", "matrix"):
        got = run(case, arrays, algorithm)
        got["state"] = got["state"][list(case.indices)]
        errors[algorithm] = {name: np.linalg.norm(got[name] - right[name]) for name in compared}
    for name in compared:
        assert errors["matrix"][name] <= 2 * errors["loop"][name], errors


def exactly(case, arrays):
    """Return outputs and last states of a case without z and D, in float64."""
    names = ("state", "x", "dt", "A", "B", "C", "dt_bias")
    exact = {name: arrays[name].astype("float64") for name in names}
    state, outs = exact["state"][list(case.indices)], []
    for t in range(case.tokens):
        d = np.logaddexp(0, exact["dt"][:, t] + exact["dt_bias"])
        B, C = (np.repeat(exact[name][:, t], case.nheads // case.ngroups, axis=1) for name in "BC")
        added = (d[..., None] * exact["x"][:, t])[..., None] * B[:, :, None, :]
        state = state * np.exp(d * exact["A"])[..., None, None] + added
        outs.append(np.einsum("bhpn,bhn->bhp", state, C))
    return {"state": state, "out": np.stack(outs, 1)}


def test_bits_depend_on_neither_batch_nor_place():
    case = dataclasses.replace(LAYER, tokens=50, sequences=1, slots=1, indices=(0,), dtypes=BFLOAT16)
    arrays = case.arrays(seed=3)
    one = run(case, arrays, "matrix")
    batched = ("state", "x", "dt", "B", "C", "z")
    many = {n: np.repeat(a, 37, axis=0) if n in batched else a for n, a in arrays.items()}
    many["state_batch_indices"] = np.arange(37, dtype="int32")[::-1].copy()
    got = run(case, many, "matrix")
    for name in ("out", "state"):
        for i in range(37):
            np.testing.assert_array_equal(bits(got[name][i]), bits(one[name][0]))


@pytest.mark.parametrize("state", ["float32", "bfloat16", "float16", "int8", "int16", "float8_e4m3fn"])
@pytest.mark.parametrize(("other", "tolerance"), [("float32", 2e-5), ("bfloat16", 2**-7), ("float16", 2**-10)])
def test_a_tree_is_each_of_its_branches_alone(state, other, tolerance):
    parents = ((-1, 0, 1, 1, 0, -1, 5),) * 3
    case = dataclasses.replace(LAYER, tokens=7, parents=parents, dtypes={"*": other, "A": "float32", "state": state})
    arrays = case.arrays(seed=4)
    out = run(case, arrays, "matrix")["out"]
    for branch in ([0, 1, 2], [0, 1, 3], [0, 4], [5, 6]):
        alone = {n: a[:, branch] if n in ("x", "dt", "B", "C", "z") else a for n, a in arrays.items()}
        del alone["parent_tokens"]
        chain = run(dataclasses.replace(case, parents=None), alone, "matrix")["out"]
        got, right = (array.astype("float32") for array in (out[:, branch], chain))
        np.testing.assert_allclose(got, right, rtol=tolerance, atol=10 * tolerance)


def test_auto_runs_a_layer_in_the_matrix_form():
    case = dataclasses.replace(LAYER, tokens=16, dtypes={**BFLOAT16, "state": "bfloat16"})
    arrays = case.arrays(seed=1)
    problem = explain(**to_mode(arrays, "torch.cuda"), **case.flags, backend="triton").choices[0].problem
    assert forms.tile(problem).chunk == 16
    auto, matrix = run(case, arrays, "auto"), run(case, arrays, "matrix")
    assert torch.equal(*(torch.from_numpy(bits(r["state"]).astype("int64")) for r in (auto, matrix)))
