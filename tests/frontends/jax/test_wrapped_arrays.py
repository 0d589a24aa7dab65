"""Objects that stand for a JAX array by ``__jax_array__``, as the variables of flax do, in place of any argument."""

import jax
import numpy as np
import pytest
from copied import copied
from flax import nnx

import ssu_bridge
from ssu_bridge.testing.cases import Case

CASE = Case("wrapped", headdim=8, dstate=16)
TOKENS = Case("tokens", headdim=8, dstate=16, tokens=3, dtypes={"state": "int8"})


class Wrapped:
    def __init__(self, array):
        self.array = array

    def __jax_array__(self):
        return self.array


@pytest.fixture(params=[Wrapped, nnx.Variable])
def wrap(request):
    return request.param


def arrays(case=CASE):
    return copied(case.arrays(seed=3))


def expected():
    return ssu_bridge.update(**arrays(), **CASE.flags)


@pytest.mark.parametrize("backend", ["cpu", "xla", "reference"])
@pytest.mark.parametrize("which", ["one", "all"])
def test_eager(wrap, which, backend):
    given = arrays()
    wrapped = {name: wrap(given[name]) for name in (given if which == "all" else ["D"])}
    state = given["state"]
    before = state.unsafe_buffer_pointer()
    out, new = ssu_bridge.update(**{**given, **wrapped}, **CASE.flags, backend=backend)
    for got, right in zip((out, new), expected(), strict=True):
        assert isinstance(got, jax.Array)
        np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-6)
    assert state.is_deleted()
    if backend == "cpu":
        assert new.unsafe_buffer_pointer() == before


@pytest.mark.parametrize("name", ["state", "x", "state_batch_indices"])
def test_traced(wrap, name):
    given = arrays()

    def call(value, concrete):
        return ssu_bridge.update(**{**given, **concrete, name: wrap(value)}, **CASE.flags)

    for got in (
        jax.jit(call)(given[name], {}),
        jax.jit(lambda value: call(value, {"D": wrap(given["D"])}))(given[name]),
    ):
        for one, right in zip(got, expected(), strict=True):
            np.testing.assert_allclose(one, right, rtol=1e-5, atol=1e-6)


def test_quantised_states_and_check(wrap):
    given = TOKENS.arrays(seed=1)
    given = {name: wrap(copied(array)) for name, array in given.items()}
    given["state"] = ssu_bridge.QuantizedState(given["state"], given.pop("state_scale"))
    assert ssu_bridge.explain(**given, **TOKENS.flags).backend == "cpu"
    assert ssu_bridge.check(**given, **TOKENS.flags)
    ssu_bridge.warm_up(**given, **TOKENS.flags)
    _, state = ssu_bridge.update(**given, **TOKENS.flags)
    assert state.values.dtype == "int8"


def test_a_deleted_one_and_a_wrong_shape_are_named(wrap):
    given = arrays()
    given["D"] = wrap(given["D"][:1])
    with pytest.raises(ValueError, match="^D: expected"):
        ssu_bridge.update(**given, **CASE.flags)
    given = arrays()
    given["D"].delete()
    given["D"] = wrap(given["D"])
    with pytest.raises(ValueError, match="^D: expected a live array"):
        ssu_bridge.update(**given, **CASE.flags)


def test_an_update_that_keeps_the_state_returns_its_array(wrap):
    given = arrays()
    state = given["state"]
    given["state"] = wrap(state)
    _, after = ssu_bridge.update(**given, **CASE.flags, disable_state_update=True)
    np.testing.assert_array_equal(after, state)
