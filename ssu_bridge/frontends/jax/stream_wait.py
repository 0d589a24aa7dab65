"""An XLA FFI call that makes JAX's stream wait, on the GPU, for what Torch's stream was given."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import torch

from ssu_bridge.frontends.jax.ffi_targets import register_function
from ssu_bridge.frontends.jax.xla_errors import is_viewed
from ssu_bridge.native import library

_TARGET = "ssu_bridge.wait_for_recorded_work"


def after_torch(arrays: tuple[jax.Array, ...], device: jax.Device) -> tuple[jax.Array, ...]:
    """Return arrays, in the same memory, that are there when what Torch's current stream has been given is done.

    They are arguments and results of the call that waits, so that no computation with them can come before it.
    """
    if isinstance(jax.numpy.zeros(()), jax.core.Tracer):  # what is made while JAX traces is traced
        raise ValueError("state: expected a call outside of jit, got one while JAX traces, when nothing can wait")
    ordinal = device.local_hardware_id
    with torch.cuda.device(ordinal):
        if torch.cuda.is_current_stream_capturing():
            raise ValueError("state: expected Torch's stream to run, got one that is captured in a CUDA graph")
    library().record_work(ordinal, torch.cuda.current_stream(ordinal).cuda_stream)
    try:
        with _only_on(device):
            after: tuple[jax.Array, ...] = _waiting()(arrays)
    except Exception as error:
        if not is_viewed(error):
            raise
        raise ValueError("state: expected one without views, got one with a live Torch view; drop it") from error
    return after


# Unbounded: it has no arguments, and so holds one function.
@functools.cache
def _waiting() -> Any:
    register_function(_TARGET, library().waiting_kernel(), "cuda", in_graphs=False)

    @functools.partial(jax.jit, donate_argnums=0)
    def wait(arrays: tuple[jax.Array, ...]) -> Any:
        types = [jax.typeof(array) for array in arrays]
        aliases = {i: i for i in range(len(arrays))}
        return tuple(jax.ffi.ffi_call(_TARGET, types, input_output_aliases=aliases)(*arrays))

    return wait


@contextlib.contextmanager
def _only_on(device: jax.Device) -> Iterator[None]:
    """Keep JAX from moving or copying an array before it is waited for, whatever the caller has set."""
    no_mesh = jax.sharding.Mesh(np.empty((), object), ())
    with jax.set_mesh(no_mesh), jax.default_device(device), jax.disable_jit(False):
        yield
