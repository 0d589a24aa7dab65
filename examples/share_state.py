"""One state, two frameworks: JAX reads a prompt, Torch goes on in the same memory, JAX takes the state back.

``to_torch`` and ``to_jax`` hand memory across through DLPack, once, not per step. Whether the first step after that is
in place is up to JAX: on the CPU it does not donate memory that it did not allocate, but moves the state once.

    python examples/share_state.py
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import ssu_bridge
from ssu_bridge.cases import Case

# Makes the inputs of a step from a seed: three sequences in a cache of six slots.
CASE = Case("shared", nheads=8, headdim=64, dstate=128)


def inputs(seed: int) -> dict[str, np.ndarray]:
    """Return the arrays of one step but the state."""
    return {name: array for name, array in CASE.arrays(seed).items() if name != "state"}


def in_jax(state: jax.Array, seeds: range) -> jax.Array:
    """Take a step for each seed; the state is donated to each."""
    for seed in seeds:
        _, state = ssu_bridge.update(state, **inputs(seed), **CASE.flags)
    return state


def in_torch(state: torch.Tensor, seeds: range) -> None:
    """Take a step for each seed; the state is changed in place."""
    for seed in seeds:
        tensors = {name: torch.from_numpy(array).to(state.device) for name, array in inputs(seed).items()}
        ssu_bridge.update(state, **tensors, **CASE.flags)


def main() -> None:
    """Pass a state to and fro, and compare with steps that were all taken in one framework."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ssu_bridge.add_cli_args(parser)
    ssu_bridge.set_config(ssu_bridge.SSUConfig.from_args(parser.parse_args()))
    start = CASE.arrays(0)["state"]
    places: list[tuple[str, Any]] = []

    state = in_jax(jnp.array(start), range(4))
    places.append(("after the prompt in JAX", state.unsafe_buffer_pointer()))

    tensor = ssu_bridge.to_torch(state)
    del state  # Torch writes to this memory from here on
    in_torch(tensor, range(4, 8))
    places.append(("after four tokens in Torch", tensor.data_ptr()))

    state = ssu_bridge.to_jax(tensor)
    places.append(("handed back to JAX", state.unsafe_buffer_pointer()))
    del tensor
    state = in_jax(state, range(8, 9))
    places.append(("after a token in JAX", state.unsafe_buffer_pointer()))
    state = in_jax(state, range(9, 12))
    places.append(("after three more", state.unsafe_buffer_pointer()))

    for what, address in places:
        print(f"{what:<28}{address:#x}")
    (_, first), (_, shared), (_, back), (_, moved), (_, last) = places
    assert first == shared == back
    assert moved == last
    alone = in_jax(jnp.array(start), range(12))
    assert np.array_equal(alone, state), "the bits must not depend on who took which step"
    print("the state has the bits of twelve steps in JAX alone")


if __name__ == "__main__":
    main()
