"""The cpu backend: the native library's own kernel, for JAX, Torch and NumPy arrays on the CPU."""

import functools

from ssu_bridge.backends.base import DeviceKernel, missing_jax_ffi, not_yet
from ssu_bridge.library import library
from ssu_bridge.problem import Problem


def missing(framework: str) -> str | None:
    """Only JAX needs more than the package itself, where the kernel is."""
    return missing_jax_ffi(framework)


def refusal(problem: Problem) -> str | None:
    """Refuse other devices than the CPU, and what is not written yet."""
    if problem.platform != "cpu":
        return f"it runs on CPU arrays only, and these are on {problem.platform}"
    return not_yet(problem)


def settings(problem: Problem) -> str:
    """There are none."""
    return ""


def load(problem: Problem) -> DeviceKernel:
    """Return the kernel: dtypes, sizes and strides are read in each call, the rest is built in."""
    return _kernel(problem.names, problem.options.dt_softplus, problem.options.pad_slot_id)


@functools.lru_cache(maxsize=256)
def _kernel(names: tuple[str, ...], dt_softplus: bool, pad_slot_id: int) -> DeviceKernel:
    # The first six arrays are always there, so the rest tell one kernel from another.
    optional = ",".join(names[6:])
    target = f"ssu_bridge.cpu({optional};softplus={int(dt_softplus)};pad={pad_slot_id})"
    return DeviceKernel(target, library().cpu_kernel(names, dt_softplus, pad_slot_id, "auto"))
