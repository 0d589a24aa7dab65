"""Calls of several tokens that the matrix form runs, with each argument that only they have."""

import functools

from ssu_bridge.testing.cases import Case

_layer = functools.partial(Case, nheads=4, headdim=16, dstate=16, ngroups=2)

MATRIX_CASES = {
    case.name: case
    for case in (
        _layer("trees", tokens=5, parents=((-1, 0, 0, 1, 1), (-1, 0, 1, 2, 0), (-1, -1, 0, 0, 3))),
        _layer("packed trees", tokens=9, parents=(-1, 0, 0, 1, -1, -1, 0, 0, 2), cu_seqlens=(0, 4, 5, 9)),
        _layer("fresh", tokens=20, has_initial_state=(True, False, True)),
        _layer("strides", tokens=40, steps=2, intermediate_stride=16),
        # On triton in segments, which run side by side.
        _layer("segments", sequences=1, indices=(4,), tokens=1100),
    )
}
