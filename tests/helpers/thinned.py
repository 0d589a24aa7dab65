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


def covering(cases, facts, weight=lambda name: 1):
    """Return named cases as parameters, marked nightly but for a few that have all facts of a case between them.

    Taken is each time the case with the most facts that those before have not, multiplied by a weight.
    """
    of_cases = {name: facts(case) for name, case in cases.items()}
    left, taken = set().union(*of_cases.values()), set()
    while left:
        best = max(
            (name for name, own in of_cases.items() if own & left), key=lambda n: weight(n) * len(of_cases[n] & left)
        )
        taken.add(best)
        left -= of_cases[best]
    return [
        pytest.param(case, id=name, marks=[] if name in taken else [pytest.mark.nightly])
        for name, case in cases.items()
    ]
