"""Wrong arguments: the right type of error, naming the argument, what was expected and what came; nothing written."""

import functools

import jax
import numpy as np
import pytest
import torch
from modes import bits, convert, poisoned, to_host
from wrong_arguments import TABLE

import ssu_bridge
from ssu_bridge.core.arrays import framework_of
from ssu_bridge.testing.cases import Case


def call(mode, arguments):
    """Call ``update`` in a mode; under jit the JAX arrays are traced."""
    if mode != "jax.jit":
        return ssu_bridge.update(**arguments)
    arrays = {name: value for name, value in arguments.items() if isinstance(value, jax.Array)}
    flags = {name: value for name, value in arguments.items() if name not in arrays}
    return jax.jit(functools.partial(ssu_bridge.update, **flags), donate_argnames="state")(**arrays)


def readable(array):
    """Whether a value is an array with values to look at, as some wrong ones are not."""
    if isinstance(array, torch.Tensor):
        plain = type(array) is torch.Tensor and array.layout == torch.strided and not array.is_neg()
        return plain and array.device.type == "cpu" and array.untyped_storage().nbytes() > 0
    if isinstance(array, jax.Array):
        return not array.is_deleted() and not jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)
    return isinstance(array, np.ndarray)


def values(arguments):
    """Copy the values of all arrays that have some, those of a quantised state too."""
    result = {}
    for name, value in arguments.items():
        if isinstance(value, ssu_bridge.QuantizedState):
            parts = values(value._asdict()).items()
            result |= {f"{name}.{part}": copy for part, copy in parts}
        elif readable(value):
            result |= to_host({name: value}, framework_of(value) or "numpy")
    return result


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize(
    ("row", "mode"),
    [pytest.param(row, mode, id=f"{row.name}-{mode}") for row in TABLE for mode in row.modes],
)
def test_wrong_argument(row, mode):
    right = {**row.case.arrays(seed=1), **row.case.flags}
    if mode != "jax.jit":  # which would trace both anew
        call(mode, convert(right, mode))  # a right call before it changes nothing
    given = convert(right, mode)
    arguments = row.spoil(dict(given)) if row.converted else convert(row.spoil(right), mode)
    if mode in ("numpy", "torch"):
        arguments = {"out": poisoned(given["x"]), **arguments}
    before = values(given), values(arguments)
    assert len(before[1]) >= 6

    with pytest.raises(row.error, match=row.message) as caught:
        call(mode, arguments)
    assert caught.type is row.error
    for held, now in zip(before, (values(given), values(arguments)), strict=True):
        assert held.keys() == now.keys()  # none was deleted
        for name, array in now.items():
            np.testing.assert_array_equal(bits(array), bits(held[name]), err_msg=name)


@pytest.mark.parametrize("name", ("dt", "A"))
@pytest.mark.parametrize("tokens", (None, 3))
@pytest.mark.parametrize("vmapped", (True, False))
def test_one_sequence_of_mamba_2_is_told_from_mamba_1(vmapped, tokens, name):
    """Inside jax.vmap over sequences arrays have no axis of sequences, and a state of three axes is one of Mamba-1."""
    case = Case("one each", sequences=2, slots=2, nheads=4, headdim=4, indices=None, tokens=tokens, absent=("z",))
    arrays = case.arrays(0)
    if name == "A":  # which is wrong where dt is as large as x
        arrays["dt"] = np.broadcast_to(arrays["dt"][..., None], arrays["x"].shape)
    shared = {n: arrays.pop(n) for n in ("A", "D", "dt_bias")}
    message = rf"^{name}: expected shape .*for one sequence of Mamba-2, inside jax\.vmap too, .*state\[None\]"

    def step(one):
        return ssu_bridge.update(**one, **shared, **case.flags)

    run = jax.vmap(step) if vmapped else lambda arrays: step({n: a[0] for n, a in arrays.items()})
    with pytest.raises(ValueError, match=message):
        run(arrays)


def test_a_wrong_shape_beside_a_state_of_mamba_1_is_no_sequence_of_mamba_2():
    arrays = Case("mamba1", nheads=0, ngroups=1, group_axis=False).arrays(0)
    arrays["dt"] = arrays["dt"][:, :-1]
    with pytest.raises(ValueError, match=r"^dt: expected shape \(3, 16\), got \(3, 15\), .*dstate\) \(6, 16, 32\)$"):
        ssu_bridge.update(**arrays)
