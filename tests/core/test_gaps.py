"""Rows of tokens with gaps between them, for every layout: the bits that rows without gaps have."""

import pytest
import torch
from gaps import WITH_GAPS, spread
from modes import to_mode

import ssu_bridge
from ssu_bridge.testing.cases import Case


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", WITH_GAPS)
def test_rows_with_gaps_give_the_same_bits(name, backend):
    case = Case(name, nheads=4, headdim=8, dstate=16, ngroups=2, indices=(4, 0, 2), **WITH_GAPS[name])
    arrays = case.arrays(seed=3)
    flags = {**case.flags, "backend": backend}
    expected = ssu_bridge.update(**to_mode(arrays, "torch"), **flags)
    got = ssu_bridge.update(**spread(case, to_mode(arrays, "torch")), **flags)
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)
