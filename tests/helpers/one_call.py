"""One call on cpu and the bits of its results, for processes that import no framework but the one that they call."""

import importlib

import numpy as np

import ssu_bridge
from ssu_bridge.testing.cases import Case

# Of several tokens, which threads of the kernel's own share; and the same bits in every framework on cpu.
CASE = Case(
    "at once",
    sequences=4,
    slots=8,
    indices=(4, 0, 2, 7),
    nheads=8,
    headdim=64,
    dstate=64,
    tokens=3,
    dtypes={"state": "int8"},
)
CONVERT = {"numpy": ("numpy", "asarray"), "torch": ("torch", "from_numpy"), "jax": ("jax.numpy", "array")}


def bits(framework="numpy"):
    """Return the bits of a call's results."""
    module, name = CONVERT[framework]
    convert = getattr(importlib.import_module(module), name)
    given = {name: convert(array) for name, array in CASE.arrays(seed=0).items()}
    state = ssu_bridge.QuantizedState(given.pop("state"), given.pop("state_scale"))
    out, state = ssu_bridge.update(state, **given, **CASE.flags, backend="cpu")
    return tuple(np.asarray(array).tobytes() for array in (out, *state))
