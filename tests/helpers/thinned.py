"""What ``make test`` runs of many combinations; the others are marked nightly."""

import itertools

import pytest


def thinned(*axes, one_in, first=0):
    """Return the product of some axes as parameters, of which all but one in so many are marked nightly.

    Those kept are the ones whose positions along the axes sum to a multiple of ``one_in`` and ``first`` more: along
    each axis every value is among them as long as the other axes together have that many positions.
    """
    params = []
    for chosen in itertools.product(*map(enumerate, axes)):
        positions, values = zip(*chosen, strict=True)
        params.append(pytest.param(*values, marks=[pytest.mark.nightly] if sum(positions) % one_in != first else []))
    return params


def covering(cases, facts):
    """Return named cases as parameters, marked nightly where ones before have had all facts of a case, in some case."""
    seen, params = set(), []
    for name, case in cases.items():
        own = facts(case)
        params.append(pytest.param(case, id=name, marks=[pytest.mark.nightly] if own <= seen else []))
        seen |= own
    return params
