"""The ways in which a caller can run one step, and running a case in each."""

import functools
import itertools

import jax
import numpy as np
import pytest
import torch

import ssu_bridge
from ssu_bridge.core.quantized import SCALES, paired, unpaired
from ssu_bridge.frontends.base import frontend
from ssu_bridge.frontends.jax.metadata import address as jax_address
from ssu_bridge.testing.cases import arguments
from ssu_bridge.testing.check import results_by_name

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


def in_turns(cases):
    """Return named cases in each mode on each backend as parameters.

    By default a case is run in one of JAX's modes on cpu, in one on xla and in one mode on reference, by turns; marked
    nightly are those in which the same numbers are computed in the same way in another program.
    """
    params = []
    for (number, (name, case)), (mode, backend) in itertools.product(enumerate(cases.items()), PAIRS):
        alike = [m for m, b in PAIRS if b == backend and (b != "cpu" or framework(m) == "jax")]
        marks = [pytest.mark.nightly] if mode in alike and mode != alike[number % len(alike)] else []
        params.append(pytest.param(case, mode, backend, id=f"{name}-{mode}-{backend}", marks=marks))
    return params


# Those that run JAX arrays on a GPU, for tests that name a backend.
GPU_BACKENDS = [pytest.param(backend, marks=pytest.mark.gpu) for backend in ("triton", "flashinfer")]


def int64_as_it_is(arrays):
    """JAX makes int32 of int64 unless told not to: a context in which it does not, for arrays that have some."""
    return jax.enable_x64(any(array.dtype == np.int64 for name, array in arrays.items() if name != "rand_seed"))


def framework(mode):
    return {**MODES, **GPU_MODES}[mode][0]


def to_mode(arrays, mode, window=0):
    """Put a case's NumPy arrays into the framework of a mode, as arguments of ``update``; ``window`` is the case's."""
    like = torch.empty(0, device="cuda") if mode == "torch.cuda" else None
    return arguments(arrays, framework(mode), lambda array: frontend(framework(mode)).from_host(array, like), window)


def convert(given, mode):
    """Put a call's NumPy arrays into the framework of a mode, inside a QuantizedState too, and leave the rest."""
    arrays = {name: value for name, value in unpaired(given).items() if isinstance(value, np.ndarray)}
    return paired({**unpaired(given), **unpaired(to_mode(arrays, mode))})


def to_host(arrays, mode):
    """Copy arguments of ``update`` or results to NumPy, by the names that kernels have for them."""
    side = frontend(framework(mode))
    return {name: side.to_host(array) for name, array in unpaired(arrays).items()}


# What a call can write in place, as arguments of ``update``.
WRITTEN = tuple(SCALES)


def step(mode, given, **flags):
    """Run ``update`` in a mode; return what it returns. Torch and NumPy get an output full of NaN to write to."""
    return stepper(mode, **flags)(given)


def stepper(mode, **flags):
    """Return what runs ``update`` in a mode, as ``step`` does; JAX compiles it once for all calls of a shape."""
    if mode == "jax.jit":
        return _jitted(flags)
    if mode == "jax.lax.scan":
        return _scanned(flags)

    def run(given):
        given = given if framework(mode) == "jax" else {**given, "out": poisoned(given["x"])}
        return ssu_bridge.update(**given, **flags)

    return run


def skip_if_refused(explanation):
    """Skip what a backend says that it cannot do: the contract tests hold it to that."""
    if explanation.backend is None:
        pytest.skip(str(explanation.choices[0].answers[0].refusal))


def poisoned(x):
    full_like = np.full_like if isinstance(x, np.ndarray) else torch.full_like
    return full_like(x, float("nan"))


# What has an entry for each token, on an axis of tokens or in packed rows.
TOKENWISE = ("x", "dt", "B", "C", "z")


def run(arrays, mode, backend, **flags):
    """Run ``update`` on copies of NumPy arrays; return its results by name, or skip what the backend does not support."""
    given = convert(arrays, mode)
    skip_if_refused(ssu_bridge.explain(**given, **flags, backend=backend))
    return to_host(results_by_name(ssu_bridge.update(**given, **flags, backend=backend)), mode)


def _jitted(flags):
    """A step whose states are donated, and come first: JAX gives their memory to the first results like them."""

    @functools.partial(jax.jit, donate_argnames=WRITTEN)
    def run(**given):
        out, *results = ssu_bridge.update(**given, **flags)
        return *results, out

    def step(given):
        *results, out = run(**given)
        return out, *results

    return step


def _scanned(flags):
    """A step inside a scan whose carry is what it writes."""

    @functools.partial(jax.jit, donate_argnums=0)
    def run(written, rest):
        def body(written, _):
            out, *results = ssu_bridge.update(**written, **rest, **flags)
            return dict(zip(WRITTEN, results, strict=False)), out

        written, outs = jax.lax.scan(body, written, None, length=1)
        return written, outs[0]

    def step(given):
        rest = dict(given)
        written, out = run({name: rest.pop(name) for name in WRITTEN if name in rest}, rest)
        return out, *(written[name] for name in WRITTEN if name in written)

    return step


def address(array):
    if isinstance(array, np.ndarray):
        return array.ctypes.data
    return array.data_ptr() if hasattr(array, "data_ptr") else jax_address(array)


def bits(array):
    """View an array so that equal means the same bits, of NaN and of negative zero too."""
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")
