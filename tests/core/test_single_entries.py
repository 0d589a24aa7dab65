"""The stride of an axis of one entry means nothing, whatever it is."""

import dataclasses

import numpy as np
import pytest
import torch
from contract import assert_step
from modes import to_host, to_mode

import ssu_bridge
from ssu_bridge.compat import mamba_ssm
from ssu_bridge.core import aliasing
from ssu_bridge.core.arguments import TIED_AXES
from ssu_bridge.testing.cases import Case

ONE_CHANNEL = Case("one channel", sequences=2, slots=3, nheads=4, ngroups=2, headdim=1, dstate=8, indices=(2, 0),
                   untied=("A", "dt", "D", "dt_bias"))  # fmt: skip
ONE_OF_ALL = Case("one", sequences=1, slots=1, nheads=1, ngroups=1, headdim=1, dstate=1, indices=(0,),
                  untied=("A", "dt", "D", "dt_bias"))  # fmt: skip


def with_strides(array, stride):
    """The same elements, with another stride, in elements, along the axes of one entry."""
    if isinstance(array, np.ndarray):
        steps = [stride * array.itemsize if n == 1 else s for n, s in zip(array.shape, array.strides, strict=True)]
        return np.lib.stride_tricks.as_strided(array, array.shape, steps)
    steps = [stride if n == 1 else s for n, s in zip(array.shape, array.stride(), strict=True)]
    return array.as_strided(array.shape, steps)


@pytest.mark.parametrize("stride", [0, 5])
@pytest.mark.parametrize("case", [ONE_CHANNEL, ONE_OF_ALL], ids=lambda case: case.name)
@pytest.mark.parametrize("mode", ["numpy", "torch"])
def test_results_and_problems_do_not_depend_on_it(mode, case, stride):
    dense = to_mode(case.arrays(seed=1), mode)
    problem = ssu_bridge.explain(**dense, **case.flags).choices[0].problem
    expected = to_host(dict(zip(("out", "state"), ssu_bridge.update(**dense, **case.flags), strict=True)), mode)
    given = {name: with_strides(array, stride) for name, array in to_mode(case.arrays(seed=1), mode).items()}
    out = with_strides(dense["x"] * 0, stride)
    assert ssu_bridge.explain(**given, **case.flags).choices[0].problem == problem
    for _ in range(2):
        state = given["state"].copy() if mode == "numpy" else given["state"].clone()
        results = ssu_bridge.update(**{**given, "state": with_strides(state, stride)}, out=out, **case.flags)
        for name, array in to_host(dict(zip(("out", "state"), results, strict=True)), mode).items():
            np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_one_number_a_head_is_tied_in_every_framework():
    for case, tied in ((ONE_CHANNEL, ("dt", "D", "dt_bias")), (ONE_OF_ALL, tuple(TIED_AXES))):
        for mode in ("numpy", "torch", "jax"):
            problem = ssu_bridge.explain(**to_mode(case.arrays(seed=1), mode)).choices[0].problem
            assert problem.tied == tied, (mode, case.name)


@pytest.mark.parametrize("tokens", [None, 3, 9])
@pytest.mark.parametrize("case", [ONE_CHANNEL, ONE_OF_ALL], ids=lambda case: case.name)
@pytest.mark.parametrize("backend", ["xla", "cpu"])
def test_jax_computes_tied_parameters_that_have_all_axes(backend, case, tokens):
    case = dataclasses.replace(case, tokens=tokens)
    assert_step(case, case.arrays(seed=1), "jax.jit", backend)


def test_byte_strides_that_are_no_elements():
    """NumPy: one row of a structure whose size is no multiple of the element's."""
    case = Case("a row", sequences=1, slots=1, nheads=2, ngroups=1, headdim=3, dstate=4, indices=(0,))
    given = case.arrays(seed=1)
    expected = ssu_bridge.update(**case.arrays(seed=1), **case.flags)
    x = np.lib.stride_tricks.as_strided(given["x"], given["x"].shape, (13, *given["x"].strides[1:]))
    out, state = ssu_bridge.update(**{**given, "x": x}, **case.flags)
    np.testing.assert_array_equal(out, expected[0])
    np.testing.assert_array_equal(state, expected[1])
    two = Case("two rows", sequences=2, slots=2, nheads=2, ngroups=1, headdim=3, dstate=4, indices=(0, 1))
    given = two.arrays(seed=1)
    wide = np.zeros((2, 25), np.uint8)
    x = np.ndarray(given["x"].shape, "f4", wide, 0, (25, *given["x"].strides[1:]))
    with pytest.raises(ValueError, match="x: expected elements aligned to their size"):
        ssu_bridge.update(**{**given, "x": x}, **two.flags)


def test_out_that_is_x_is_computed_in_place():
    x = np.zeros((1, 4, 8), "f4")
    assert aliasing._same_elements(x, with_strides(x, 7))
    assert not aliasing._same_elements(x[:, ::2], with_strides(x, 7)[:, ::2][:, :, ::-1])


def test_a_drop_in_takes_such_a_view_as_it_is(monkeypatch):
    a = to_mode(ONE_CHANNEL.arrays(seed=1), "torch")
    given = {name: with_strides(a[name], 5) for name in TIED_AXES} | {n: t for n, t in a.items() if n not in TIED_AXES}
    monkeypatch.setattr(torch.Tensor, "contiguous", None)  # nothing is copied
    mamba_ssm.selective_state_update(**given)
