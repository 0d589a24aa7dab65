"""What every step must keep: results right against float64, in place, and nothing else changed."""

import numpy as np
import pytest
from modes import address, bits, framework, step, to_host, to_mode

import ssu_bridge
from ssu_bridge.api import explain
from ssu_bridge.core.arguments import RINGS
from ssu_bridge.core.quantized import SCALES, unpaired
from ssu_bridge.testing.check import judge, results_by_name


def assert_step(case, arrays, mode, backend, **flags):
    """Run one step and hold it against the reference: results, addresses, and everything that must not change.

    A step that the backend refuses has to raise, and then nothing must have changed.
    """
    given = to_mode(arrays, mode, case.window)
    flags = {**case.flags, **flags, "backend": backend}
    choice = explain(**given, **flags).choices[0]
    if choice.backend is None:
        with pytest.raises(ssu_bridge.UnsupportedError) as caught:
            step(mode, given, **flags)
        assert choice.answers[0].refusal in str(caught.value)
        assert_same(given, arrays, mode)
        return
    held, before = unpaired(given), {**arrays}
    addresses = {name: address(held[name]) for name in choice.problem.results[1:]}
    results = results_by_name(step(mode, given, **flags))
    after = to_host(results, mode)
    assert after["out"].dtype == arrays["x"].dtype
    assert after["out"].shape == arrays["x"].shape
    if framework(mode) != "jax":
        before["out"] = np.full_like(arrays["x"], np.nan)
    rows = judge(choice.problem, choice.backend, before, after)
    assert all(row.passed for row in rows), rows
    assert_in_place(held, addresses, results, mode, backend)
    assert_same({name: array for name, array in held.items() if name not in addresses}, arrays, mode)


def assert_in_place(given, addresses, results, mode, backend):
    """Assert that each array which the step writes is where it was, and no other is gone."""
    for name in (n for n in (*SCALES, *SCALES.values(), *RINGS) if n in given):
        if framework(mode) != "jax":
            assert results[name] is given[name]
        elif backend != "reference":
            assert given[name].is_deleted() == (name in addresses or mode != "jax")
        if name in addresses and given[name].size and (mode, backend) != ("jax", "reference"):
            assert address(results[name]) == addresses[name], name
    if framework(mode) == "jax":
        assert not any(a.is_deleted() for n, a in given.items() if n not in addresses and n not in results)


def assert_same(given, arrays, mode):
    """Assert that arrays are what they were made from, apart from those that were handed to a jitted function."""
    live = {n: a for n, a in unpaired(given).items() if framework(mode) != "jax" or not a.is_deleted()}
    for name, after in to_host(live, mode).items():
        np.testing.assert_array_equal(bits(after).ravel(), bits(arrays[name]).ravel().view(bits(after).dtype), name)
