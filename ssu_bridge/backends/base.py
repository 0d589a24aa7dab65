"""What a backend is, what it loads, and the refusals that several share."""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from ssu_bridge.problem import Problem


class DeviceKernel(NamedTuple):
    """A kernel on the arrays' own memory, called with DLTensors.

    ``function(*inputs, out, new_state)`` takes the arrays that ``problem.names`` lists, then the results; the new state
    has the state's own memory. It launches on the stream that TVM-FFI's environment names. ``target`` spells out all
    that was compiled into it, the same in every process, and is its name as an XLA FFI target.
    """

    target: str
    function: Any


class HostKernel(NamedTuple):
    """A kernel that works on NumPy arrays: ``function(arrays, out)`` by name, writing out and the state in place."""

    function: Callable[[dict[str, Any], Any], None]


class TracedKernel(NamedTuple):
    """A kernel in jax.numpy: ``function(arrays)`` takes them by name and returns ``(out, new_state)``."""

    function: Callable[[dict[str, Any]], tuple[Any, Any]]


Kernel = DeviceKernel | HostKernel | TracedKernel


class BackendModule(Protocol):
    """The functions that each module of this package has. None of them touches an array."""

    def missing(self, framework: str) -> str | None:
        """Say what is not installed, for arrays of a framework, and which command installs it; or None."""

    def refusal(self, problem: Problem) -> str | None:
        """Say in a sentence why this backend cannot run the problem, or None if it can."""

    def settings(self, problem: Problem) -> str:
        """Say how it would run a problem that it does not refuse, where there is a choice; else nothing."""

    def load(self, problem: Problem) -> Kernel:
        """Return the kernel for a problem that is not refused, compiled and ready to be launched."""


def missing_jax_ffi(framework: str) -> str | None:
    """Say what a device kernel needs to be called by XLA and lacks, or None."""
    if framework == "jax" and importlib.util.find_spec("jax_tvm_ffi") is None:
        return 'JAX arrays need jax-tvm-ffi, which is not installed: pip install "ssu-bridge[jax]"'
    return None


_NOT_YET = {
    "num_accepted_tokens": "accepted token counts",
    "cu_seqlens": "packed sequences (cu_seqlens)",
    "intermediate_states": "intermediate states",
    "parent_tokens": "trees of draft tokens (parent_tokens)",
    "state_scale": "quantised states",
}


def not_yet(problem: Problem) -> str | None:
    """Refuse what ``update`` describes but no backend computes yet."""
    given = [what for name, what in _NOT_YET.items() if name in problem.names]
    if problem.form == "multi":
        given.append("several tokens in one call")
    if problem.tables:
        given.append("slot tables with a column for each token")
    if problem.stochastic_rounding:
        given.append("stochastic rounding")
    if problem.options.disable_state_update:
        given.append("disable_state_update")
    if problem.options.check_indices:
        given.append("check_indices")
    return f"it cannot do {', '.join(given)} yet" if given else None
