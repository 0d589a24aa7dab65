"""The cpu backend: the native library's own kernel, for JAX, Torch and NumPy arrays on the CPU."""

import functools

from ssu_bridge.backends.base import DeviceKernel, lacks_form, missing_jax_ffi
from ssu_bridge.backends.rows import row
from ssu_bridge.core.arguments import REQUIRED
from ssu_bridge.core.problem import Problem
from ssu_bridge.native import library

PLATFORM = "cpu"
CONFIG_FIELDS = ("philox_rounds", "round_each_token")
missing = missing_jax_ffi


def refusal(problem: Problem) -> str | None:
    """Refuse devices other than the CPU, and what the kernel lacks."""
    if problem.platform != PLATFORM:
        return f"it runs on CPU arrays only, and these are on {problem.platform}"
    return lacks_form(problem, "loop")


def settings(problem: Problem) -> str:
    """Return in which form several tokens are computed."""
    is_one = problem.layout == "single" or problem.tokens in (0, 1)
    return "" if is_one else "loop over the tokens, the only form that it has"


def load(problem: Problem) -> DeviceKernel:
    """Return the kernel: dtypes, sizes and strides are read in each call, the rest is compiled in."""
    options = problem.options
    rounds = options.config.philox_rounds if problem.stochastic_rounding else 0
    flags = (options.dt_softplus, options.pad_slot_id, rounds, options.intermediate_stride, problem.rounds_each_token)
    replay = (options.replay_window, options.replay_tokens)
    return _kernel(problem.names, "state" in problem.results, *flags, *replay)


@functools.lru_cache(maxsize=256)
def _kernel(
    names: tuple[str, ...],
    updates_state: bool,
    dt_softplus: bool,
    pad_slot_id: int,
    rounds: int,
    stride: int,
    round_each: bool,
    window: int,
    tokens: int,
) -> DeviceKernel:
    optional = ",".join(names[len(REQUIRED) :])
    flags = f"softplus={dt_softplus:d};pad={pad_slot_id};update={updates_state:d};philox={rounds}"
    if stride > 1:
        flags += f";stride={stride}"
    if round_each:
        flags += ";each=1"
    if window:
        flags += f";window={window};tokens={tokens}"
    rows = [row(name) for name in (*names, "out")]
    flags_of_kernel = (dt_softplus, pad_slot_id, rounds, stride, round_each, window, tokens)
    function = library().cpu_kernel(rows, updates_state, *flags_of_kernel, "auto")
    check = library().cpu_check(rows, updates_state, stride, window, tokens)
    return DeviceKernel(f"ssu_bridge.cpu({optional};{flags})", function, check)
