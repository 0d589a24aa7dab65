"""A state cache that JAX and Torch change in turn, in one memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from copied import copied
from modes import bits

import ssu_bridge
from ssu_bridge.testing.cases import Case

CASE = Case("shared", headdim=8, dstate=16)


def rounds(count, device):
    """Change a state in Torch and in JAX in turn while both allocate; compare with all steps in JAX."""
    first, second = CASE.arrays(seed=1), CASE.arrays(seed=2)  # steps that cannot be swapped
    state = copied(first.pop("state"))
    del second["state"]
    alone, place = jnp.copy(state), state.unsafe_buffer_pointer()
    in_torch = {name: torch.from_numpy(array).to(device) for name, array in first.items()}
    as_in_torch = copied(first)
    in_jax = copied(second)
    spoilt, busy = [], 64 if device == "cpu" else 2048
    for number in range(count):
        view = ssu_bridge.to_torch(state)
        work(torch, number, busy, device=device)
        ssu_bridge.update(view, **in_torch, **CASE.flags)
        del view
        state = ssu_bridge.after_torch(state)
        # What would take the state's memory if it were free, or write to it too late.
        size = 3072 + 64 * (number % 3)
        spoilt = [*spoilt[-4:], torch.full((size,), float("nan"), device=device), jnp.full((size,), jnp.nan)]
        work(jnp, number + 1, busy)
        _, state = ssu_bridge.update(state, **in_jax, **CASE.flags)
        assert state.unsafe_buffer_pointer() == place
    for _ in range(count):
        for given in (as_in_torch, in_jax):
            _, alone = ssu_bridge.update(alone, **given, **CASE.flags)
    np.testing.assert_array_equal(bits(np.array(state)), bits(np.array(alone)))
    assert all(
        bool(array.isnan().all() if isinstance(array, torch.Tensor) else jnp.isnan(array).all()) for array in spoilt
    )


def work(xp, number, size, **place):
    """Keep one framework's queue busy, sometimes: the step behind it runs late."""
    if number % 4 == 0:
        busy = xp.ones((size, size), **place)
        for _ in range(8):
            busy = busy @ busy


# Many rounds look for what goes wrong seldom.
@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.nightly)])
def test_in_turn_on_the_cpu(count):
    with ssu_bridge.using(strict_in_place=True):
        rounds(count, "cpu")


@pytest.mark.gpu
def test_in_turn_on_a_gpu():
    with jax.default_device(jax.devices("gpu")[0]), ssu_bridge.using(strict_in_place=True):
        rounds(5000, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="gpu: this machine has one GPU")
def test_in_turn_on_a_second_gpu():
    with jax.default_device(jax.devices("gpu")[1]), ssu_bridge.using(strict_in_place=True):
        rounds(500, "cuda:1")
