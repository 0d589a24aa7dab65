"""The table of XLA FFI targets: one for each distinct kernel and platform, registered at its first lowering."""

import threading

from ssu_bridge.backends.base import DeviceKernel

# What jax-tvm-ffi has room for in a process.
CAPACITY = 1024
# JAX's name for a lowering platform and jax-tvm-ffi's.
_PLATFORMS = {"cpu": "cpu", "cuda": "gpu"}

_lock = threading.Lock()
# Held here, because XLA calls them as long as the process lives.
_registered: dict[tuple[str, str], DeviceKernel] = {}


def register(kernel: DeviceKernel, platform: str) -> str:
    """Register a kernel for a platform if it is not yet, and return the name that a program calls it by.

    Raises:
        RuntimeError: the process has as many kernels registered as jax-tvm-ffi has room for.
    """
    import jax_tvm_ffi  # the xla backend works without it

    key = (kernel.target, platform)
    with _lock:
        if key not in _registered:
            if jax_tvm_ffi.registered_count() >= CAPACITY:
                raise RuntimeError(
                    f"{CAPACITY} kernels are registered with XLA in this process, all that jax-tvm-ffi holds. One "
                    "is registered for each distinct set of optional arguments and flags: are they varied without need?"
                )
            jax_tvm_ffi.register_ffi_target(
                kernel.target, kernel.function, platform=_PLATFORMS[platform], allow_cuda_graph=platform == "cuda"
            )
            _registered[key] = kernel
    return kernel.target
