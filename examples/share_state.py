"""One state cache, two frameworks: JAX allocates it, Torch fills slots of it and JAX decodes on them, in one memory.

A server that reads prompts in Torch and decodes in JAX (or the other way round) needs no copy of the cache.
``to_torch`` gives Torch a view of the memory. While the view lives, JAX does not donate the cache: drop it, and
``after_torch`` gives the cache back to JAX, which waits on the GPU for what Torch was doing with it.

    python examples/share_state.py
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import torch

import ssu_bridge
from command_line import mistakes_in_one_line, positive
from ssu_bridge.testing.cases import Case

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


def in_torch(state: jax.Array, seeds: range) -> jax.Array:
    """Take a step for each seed in the memory of a JAX array, which must not be in use elsewhere."""
    view = ssu_bridge.to_torch(state)  # Torch's stream waits for the array to be computed
    for seed in seeds:
        tensors = {name: torch.from_numpy(array).to(view.device) for name, array in inputs(seed).items()}
        ssu_bridge.update(view, **tensors, **CASE.flags)
    del view
    return ssu_bridge.after_torch(state)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=3, help="how often the state goes to and fro")
    ssu_bridge.add_cli_args(parser)
    arguments = parser.parse_args()
    # An error, rather than a warning, where a step of JAX would move the state.
    config = ssu_bridge.SSUConfig.from_args(arguments)
    ssu_bridge.set_config(dataclasses.replace(config, strict_in_place=True))
    with mistakes_in_one_line(parser):
        show(arguments.rounds)


def show(rounds: int) -> None:
    """Pass a state back and forth, and compare it with the same steps in one framework."""
    state = jnp.array(CASE.arrays(0)["state"])
    alone = jnp.copy(state)
    place = state.unsafe_buffer_pointer()
    for number in range(rounds):
        first = 8 * number
        state = in_torch(state, range(first, first + 4))
        state = in_jax(state, range(first + 4, first + 8))
        assert state.unsafe_buffer_pointer() == place, "JAX moved the state: this backend does not work in place"
        print(f"round {number}: four tokens in Torch, four in JAX, in the memory at {place:#x}")
    alone = in_jax(alone, range(8 * rounds))
    assert np.array_equal(alone, state), "the bits must not depend on who took which step"
    print(f"the state has the bits of {8 * rounds} steps in JAX alone")


if __name__ == "__main__":
    main()
