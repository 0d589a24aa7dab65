"""The protocol of a backend, the kernels that it loads, and the refusals that several backends share."""

import enum
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from ssu_bridge.config import FORMS
from ssu_bridge.core.problem import Problem


class DeviceKernel(NamedTuple):
    """A kernel that works on the arrays' own memory, called with DLTensors.

    ``function(*inputs, *results)`` takes the arrays that ``problem.names`` lists, then those of ``problem.results``; a
    result other than out has the very memory of the input of that name. It launches on the stream that TVM-FFI's
    environment names. ``check``, of the same tensors, raises ValueError unless the kernel is one for their shapes,
    dtypes, strides and devices; it reads no memory. A frontend calls it before it runs the kernel on tensors of a new
    signature: what is donated is lost when a kernel raises. ``function`` of a GPU kernel checks again only what can
    differ within a signature, which is where tensors lie. ``target`` spells out all that was compiled into it, the same
    in every process, and is its name as an XLA FFI target.

    ``scratch`` returns how many float32 of memory the kernel needs for a call besides; None: it never needs any.
    ``function`` allocates it with Torch's allocator, or takes it after the results, from XLA.
    """

    target: str
    function: Any
    check: Callable[..., object]
    scratch: Callable[[Problem], Any] | None = None


class HostKernel(NamedTuple):
    """A kernel that works on NumPy arrays: ``function(arrays, out)`` by name, writing all results in place."""

    function: Callable[[dict[str, Any], Any], None]


class TracedKernel(NamedTuple):
    """A kernel in jax.numpy: ``function(arrays)`` takes them by name and returns what ``problem.results`` lists."""

    function: Callable[[dict[str, Any]], tuple[Any, ...]]


Kernel = DeviceKernel | HostKernel | TracedKernel


class BackendModule(Protocol):
    """The interface of a backend's module. None of its functions touches an array.

    Attributes:
        PLATFORM: the platform that its kernels run on; None: any.
        CONFIG_FIELDS: the fields of SSUConfig that its kernels depend on, of which philox_rounds only where they round
            stochastically. Programs are compiled, named and kept by these alone.
    """

    PLATFORM: str | None
    CONFIG_FIELDS: tuple[str, ...]

    def missing(self, framework: str) -> str | None:
        """Return what is not installed, for arrays of a framework, and the command that installs it; or None."""

    def refusal(self, problem: Problem) -> str | None:
        """Return the reason why this backend does not support the problem, as a sentence; None if it does."""

    def settings(self, problem: Problem) -> str:
        """Return how it would run a supported problem, in words; "" where it has no choice."""

    def load(self, problem: Problem) -> Kernel:
        """Return the kernel for a supported problem, compiled and ready to be launched."""


def nothing_missing(framework: str) -> None:
    """Return None: the backend needs nothing besides the dependencies of this package and of the caller."""


def no_settings(problem: Problem) -> str:
    """Return "": the backend has one way to run a problem."""
    return ""


def missing_jax_ffi(framework: str) -> str | None:
    """Return what is not installed of what XLA needs to call a device kernel, or None."""
    if framework == "jax" and importlib.util.find_spec("jax_tvm_ffi") is None:
        return "JAX arrays need jax-tvm-ffi, which is not installed: pip install jax-tvm-ffi"
    return None


_LEAST_CAPABILITY = (8, 0)


def cannot_run_there(problem: Problem) -> str | None:
    """Refuse devices other than NVIDIA GPUs of a supported compute capability."""
    if problem.platform != "cuda":
        return f"it runs on CUDA arrays only, and these are on {problem.platform}"
    if problem.capability is None:
        return (
            "it compiles for one compute capability, and the GPUs of this process have none or several; make those of "
            "one kind visible (CUDA_VISIBLE_DEVICES)"
        )
    if problem.capability < _LEAST_CAPABILITY:
        capability = ".".join(map(str, problem.capability))
        return f"it needs a GPU of compute capability 8.0 or higher, and this one has {capability}"
    return None


class Feature(enum.StrEnum):
    """What a call can request beyond one token per sequence and a float state that is rounded to nearest."""

    TOKENS = "several tokens in one call"
    PACKED = "packed sequences (cu_seqlens)"
    TABLES = "slot tables with a column for each token"
    ACCEPTED = "accepted token counts"
    INTERMEDIATE = "intermediate states"
    NO_UPDATE = "disable_state_update"
    QUANTIZED = "quantised states"
    STOCHASTIC = "stochastic rounding"
    TREES = "trees of draft tokens (parent_tokens)"
    FRESH = "sequences that start from zeros (has_initial_state)"
    STRIDE = "the states after every k-th token (intermediate_stride)"
    ROUND_EACH = "a state that is rounded after each of several tokens (round_each_token)"
    REPLAY = "a checkpoint with the tokens since (ReplayState)"


def features(problem: Problem) -> tuple[Feature, ...]:
    """Return the features that a problem needs."""
    needed = {
        Feature.TOKENS: problem.layout == "multi",
        Feature.PACKED: problem.layout == "packed",
        Feature.TABLES: bool(problem.tables),
        Feature.ACCEPTED: "num_accepted_tokens" in problem.names,
        Feature.INTERMEDIATE: "intermediate_states" in problem.names,
        Feature.NO_UPDATE: problem.options.disable_state_update,
        Feature.QUANTIZED: "state_scale" in problem.names,
        Feature.STOCHASTIC: problem.stochastic_rounding,
        Feature.TREES: "parent_tokens" in problem.names,
        Feature.FRESH: "has_initial_state" in problem.names,
        Feature.STRIDE: problem.options.intermediate_stride > 1,
        Feature.ROUND_EACH: problem.rounds_each_token,
        Feature.REPLAY: problem.replays,
    }
    return tuple(feature for feature, is_needed in needed.items() if is_needed)


def cannot(problem: Problem, *lacking: Feature) -> str | None:
    """Refuse the features that a backend lacks."""
    needed = [str(feature) for feature in features(problem) if feature in lacking]
    return f"it does not support {', '.join(needed)}" if needed else None


def lacks_form(problem: Problem, *forms: str) -> str | None:
    """Refuse a form of computing several tokens that was selected by name, if the backend has only others."""
    selected = problem.options.config.algorithm
    # A symbolic number of tokens is neither. One token satisfies every form.
    if selected not in FORMS or selected in forms or problem.tokens in (0, 1):
        return None
    return f'it does not support the {selected} form of several tokens (algorithm="{selected}")'
