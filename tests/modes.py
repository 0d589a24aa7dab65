"""The ways in which a caller can run one step, and running a case in each."""

import functools

import jax
import numpy as np
import torch

import ssu_bridge
from ssu_bridge.frontends import frontend
from ssu_bridge.frontends import jax as jax_frontend

# The framework of each mode, and the backends that run in it on a machine without a GPU.
MODES = {
    "numpy": ("numpy", ("cpu", "reference")),
    "torch": ("torch", ("cpu", "reference")),
    "jax": ("jax", ("cpu", "xla", "reference")),
    "jax.jit": ("jax", ("cpu", "xla")),
    "jax.lax.scan": ("jax", ("cpu", "xla")),
}
GPU_MODES = {
    "torch.cuda": ("torch", ("triton",)),
    "jax": ("jax", ("triton",)),
    "jax.jit": ("jax", ("triton",)),
    "jax.lax.scan": ("jax", ("triton",)),
}
PAIRS = [(mode, backend) for mode, (_, backends) in MODES.items() for backend in backends]
GPU_PAIRS = [(mode, backend) for mode, (_, backends) in GPU_MODES.items() for backend in backends]


def int64_as_it_is(arrays):
    """JAX makes int32 of int64 unless told not to: a context in which it does not, for arrays that have some."""
    return jax.enable_x64(any(array.dtype == np.int64 for array in arrays.values()))


def framework(mode):
    return {**MODES, **GPU_MODES}[mode][0]


def to_mode(arrays, mode):
    """Copy a case's NumPy arrays into the framework of a mode."""
    side = frontend(framework(mode))
    like = torch.empty(0, device="cuda") if mode == "torch.cuda" else None
    return {name: side.from_host(array, like) for name, array in arrays.items()}


def convert(arguments, mode):
    """Put a call's NumPy arrays into the framework of a mode, inside a QuantizedState too, and leave the rest."""
    result = {}
    for name, value in arguments.items():
        if isinstance(value, ssu_bridge.QuantizedState):
            value = ssu_bridge.QuantizedState(**convert(value._asdict(), mode))
        result[name] = to_mode({name: value}, mode)[name] if isinstance(value, np.ndarray) else value
    return result


def to_host(arrays, mode):
    side = frontend(framework(mode))
    return {name: side.to_host(array) for name, array in arrays.items()}


def step(mode, arrays, **flags):
    """Run ``update`` in a mode; return what it returns. Torch and NumPy get an output full of NaN to write to."""
    if framework(mode) != "jax":
        arrays = {**arrays, "out": poisoned(arrays["x"])}
    if mode == "jax.jit":
        jitted = jax.jit(functools.partial(ssu_bridge.update, **flags), donate_argnames="state")
        return jitted(**arrays)
    if mode == "jax.lax.scan":
        return _scanned(arrays, flags)
    return ssu_bridge.update(**arrays, **flags)


def poisoned(x):
    full_like = np.full_like if isinstance(x, np.ndarray) else torch.full_like
    return full_like(x, float("nan"))


def _scanned(arrays, flags):
    """One step inside a scan whose carry is the state."""

    @functools.partial(jax.jit, donate_argnames="state")
    def run(state, rest):
        def body(state, _):
            out, state = ssu_bridge.update(state, **rest, **flags)
            return state, out

        state, outs = jax.lax.scan(body, state, None, length=1)
        return outs[0], state

    rest = dict(arrays)
    return run(rest.pop("state"), rest)


def address(array):
    if isinstance(array, np.ndarray):
        return array.ctypes.data
    return array.data_ptr() if hasattr(array, "data_ptr") else jax_frontend._address(array)


def bits(array):
    """View an array so that equal means the same bits, of NaN and of negative zero too."""
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")
