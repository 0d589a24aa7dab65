"""JAX's computations made to wait for Torch's, on the GPU: an XLA FFI call that waits for an event and does no more."""

import functools
from typing import Any

import jax
import torch

from ssu_bridge.frontends.jax_targets import register_function
from ssu_bridge.library import library

_TARGET = "ssu_bridge.wait_for_recorded_work"


def behind_torch(arrays: tuple[jax.Array, ...], device: jax.Device) -> tuple[jax.Array, ...]:
    """Return arrays, in the same memory, that are there when what Torch's current stream has been given is done.

    They are arguments and results of the call that waits, so that no computation with them can come before it.
    """
    ordinal = device.local_hardware_id
    library().record_work(ordinal, torch.cuda.current_stream(ordinal).cuda_stream)
    try:
        after: tuple[jax.Array, ...] = _waiting()(arrays)
    except Exception as error:
        if "external reference" not in str(error):
            raise
        raise ValueError("state: expected one that nobody views, got one with a live Torch view; drop it") from error
    return after


@functools.cache
def _waiting() -> Any:
    register_function(_TARGET, library().waiting_kernel(), "cuda", in_graphs=False)

    @functools.partial(jax.jit, donate_argnums=0)
    def wait(arrays: tuple[jax.Array, ...]) -> Any:
        types = [jax.typeof(array) for array in arrays]
        aliases = {i: i for i in range(len(arrays))}
        return tuple(jax.ffi.ffi_call(_TARGET, types, input_output_aliases=aliases)(*arrays))

    return wait
