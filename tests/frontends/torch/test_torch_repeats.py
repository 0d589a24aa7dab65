"""Torch calls that look like one that was checked: they are compared, and what is wrong with one is still found."""

import numpy as np
import pytest
import torch
from modes import to_mode

import ssu_bridge
from ssu_bridge.frontends.torch import frontend
from ssu_bridge.testing.cases import Case

CASE = Case("repeats", headdim=8, dstate=16)


@pytest.fixture
def tensors():
    """The arguments of a call, after one like it."""
    given = to_mode(CASE.arrays(seed=1), "torch")
    ssu_bridge.update(**given, **CASE.flags)
    return to_mode(CASE.arrays(seed=1), "torch")


def expected(**changes):
    return ssu_bridge.update(**{**to_mode(CASE.arrays(seed=1), "torch"), **changes}, **CASE.flags, backend="reference")


@pytest.mark.parametrize(
    "changes",
    [
        {"D": None},
        {"z": None},
        {"dt_bias": None},
        {"state_batch_indices": torch.tensor([1, 2, 3])},
        {"dt": torch.ones(3, 4, 8)},
        {"B": torch.ones(3, 2, 32)[..., :16].contiguous().to(torch.bfloat16)},
        {"x": torch.ones(3, 4, 16)[..., :8].contiguous().half()},
        {"C": torch.ones(3, 4, 16)[:, ::2].contiguous()},
        {"C": torch.ones(6, 2, 16)[::2]},
        {"out": torch.zeros(3, 4, 8)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_call_of_the_same_sizes(tensors, changes):
    for _ in range(2):
        tensors = to_mode(CASE.arrays(seed=1), "torch")
        out, state = ssu_bridge.update(**{**tensors, **changes}, **CASE.flags)
        wanted_out, wanted_state = expected(**changes)
        torch.testing.assert_close(out, wanted_out, rtol=2e-3, atol=1e-4)
        torch.testing.assert_close(state, wanted_state, rtol=1e-4, atol=1e-4)
    tensors = to_mode(CASE.arrays(seed=1), "torch")
    torch.testing.assert_close(ssu_bridge.update(**tensors, **CASE.flags)[0], expected()[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"A": np.ones(4, "float32")}, TypeError, "A: expected a torch array"),
        ({"dt": None}, TypeError, "dt: expected an array, got None"),
        ({"x": None}, TypeError, "x: expected an array, got None"),
        ({"B": torch.ones(3, 2, 17)}, ValueError, "B: expected shape"),
        ({"D": torch.ones(4, dtype=torch.float64)}, ValueError, "D: expected dtype"),
        ({"z": torch.ones(3, 4, 16)[..., ::2]}, ValueError, "z: expected .* dense"),
        ({"z": torch.ones(3, 4, 8).to_sparse()}, ValueError, "z: expected a strided tensor"),
        (
            {"C": torch.ones(3, 2, 16, requires_grad=True)},
            ssu_bridge.UnsupportedError,
            "C: it requires grad, but backend cpu has",
        ),
        (
            {"out": torch.ones(3, 4, 8, requires_grad=True)},
            ssu_bridge.UnsupportedError,
            "out: it requires grad, but backend cpu has",
        ),
    ],
    ids=str,
)
def test_what_is_wrong_is_still_found(tensors, changes, error, message):
    held = tensors["state"].clone()
    with pytest.raises(error, match=message):
        ssu_bridge.update(**{**tensors, **changes}, **CASE.flags)
    assert torch.equal(tensors["state"], held)


def test_grad_mode_and_parameters(tensors):
    tensors["A"] = torch.nn.Parameter(tensors["A"])
    tensors["x"].requires_grad_()
    with torch.no_grad():
        ssu_bridge.update(**tensors, **CASE.flags)
    with pytest.raises(ssu_bridge.UnsupportedError, match="x: it requires grad, but backend cpu has"):
        ssu_bridge.update(**tensors, **CASE.flags)


@pytest.mark.parametrize("count", [16])
def test_problems_in_turn_do_not_evict_each_other(count, monkeypatch):
    """Problems of one size that differ in dtypes, strides and in which options are there."""
    dtypes = (torch.float32, torch.bfloat16)
    problems = [
        {"x": x, "z": z, "D": D, "B": B} for x in dtypes for z in (True, False) for D in (True, False) for B in dtypes
    ]
    assert len(problems) == count

    def call(problem):
        given = to_mode(CASE.arrays(seed=1), "torch")
        absent = {name: None for name in ("z", "D") if not problem[name]}
        cast = {name: given[name].to(problem[name]) for name in ("x", "B")}
        if cast["x"].dtype is torch.bfloat16:
            absent["dt"] = given["dt"].repeat(2, 1)[::2]
        return ssu_bridge.update(**{**given, **cast, **absent}, **CASE.flags)

    first = [call(problem) for problem in problems]
    monkeypatch.setattr(frontend, "key_of", lambda *_: pytest.fail("a repeated call was checked from Python"))
    for problem, expected in zip(problems, first, strict=True):
        for got, wanted in zip(call(problem), expected, strict=True):
            assert torch.equal(got, wanted)


def test_arguments_that_come_and_go():
    case = Case("more and less", sequences=2, slots=3, indices=(2, 0), tokens=2, steps=2)
    arrays = to_mode(case.arrays(seed=1), "torch")
    buffer, more = arrays.pop("intermediate_states"), arrays
    fewer = {name: tensor for name, tensor in arrays.items() if name != "z"}
    expected = [ssu_bridge.update(**copied(given), **case.flags, backend="reference") for given in (more, fewer)]
    for _ in range(3):
        for given, right in zip((more, fewer), expected, strict=True):
            for extra in ({}, {"intermediate_states": buffer.clone()}):
                results = ssu_bridge.update(**copied(given), **extra, **case.flags)
                for got, wanted in zip(results, right, strict=False):
                    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
                assert len(results) == 2 + len(extra)


def copied(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}
