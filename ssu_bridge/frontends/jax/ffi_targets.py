"""The table of XLA FFI targets: one for each distinct kernel and platform, registered at its first lowering."""

import re
import threading
from collections.abc import Collection
from typing import Any, NamedTuple

from ssu_bridge.backends.base import DeviceKernel
from ssu_bridge.config import Backend, SSUConfig
from ssu_bridge.core.arguments import ARGUMENTS, REQUIRED
from ssu_bridge.core.problem import Options, Problem, options_of
from ssu_bridge.dispatch import module
from ssu_bridge.errors import TooManyKernelsError

# The capacity of jax-tvm-ffi's table of targets in a process.
CAPACITY = 1024
# JAX's name for a lowering platform and jax-tvm-ffi's.
_PLATFORMS = {"cpu": "cpu", "cuda": "gpu"}

_lock = threading.Lock()
# Held here, because XLA calls them as long as the process lives. No more than CAPACITY, nor below.
_functions: dict[tuple[str, str], Any] = {}
# The names of those that are kernels.
_kernels: dict[str, None] = {}


def register(name: str, kernel: DeviceKernel, platform: str) -> str:
    """Register a kernel for a platform if it is not yet, and return the name that a program calls it by.

    Raises:
        TooManyKernelsError: the process has as many kernels registered as jax-tvm-ffi has room for.
    """
    register_function(name, kernel.function, platform, in_graphs=True)
    with _lock:
        _kernels[name] = None
    return name


def register_function(name: str, function: Any, platform: str, in_graphs: bool) -> None:
    """Register a TVM-FFI function under a name if it is not yet. XLA may put it into CUDA graphs, if ``in_graphs``."""
    import jax_tvm_ffi  # the xla backend works without it

    key = (name, platform)
    with _lock:
        if key not in _functions:
            if jax_tvm_ffi.registered_count() >= CAPACITY:
                raise TooManyKernelsError(
                    f"{CAPACITY} kernels are registered with XLA in this process, all that jax-tvm-ffi holds, and "
                    f"{name} is another. There is one for each distinct set of optional arguments and flags, such as "
                    'pad_slot_id: vary fewer of them, or pass backend="xla", which needs none'
                )
            allow = in_graphs and platform == "cuda"
            jax_tvm_ffi.register_ffi_target(name, function, platform=_PLATFORMS[platform], allow_cuda_graph=allow)
            _functions[key] = function


def registered() -> list[str]:
    """Return the names of all targets that are kernels."""
    with _lock:
        return [*_kernels]


# A target's name is that of the kernel, and in brackets what of the call is compiled into it: enough, with the types of
# the operands in a program, to describe the call again.


def spell(kernel: DeviceKernel, problem: Problem) -> str:
    """Return the name of a target."""
    used = {*module(_backend(kernel.target)).CONFIG_FIELDS}
    if not problem.rounds_each_token:
        used -= {"round_each_token"}
    return f"{kernel.target}[{_spell(problem.names, problem.options, used)}]"


def _spell(names: tuple[str, ...], options: Options, used: Collection[str]) -> str:
    """Spell a call, and of the configuration those fields that are used."""
    config = options.config
    fields = {
        "arrays": ",".join(names),
        "softplus": int(options.dt_softplus),
        "pad": options.pad_slot_id,
        "update": int(not options.disable_state_update),
        "rounds": config.philox_rounds if "rand_seed" in names else 0,
        # Said only where they are selected, so that programs of versions without them are still known.
        "stride": "" if options.intermediate_stride == 1 else options.intermediate_stride,
        # These only where the backend uses them, too.
        "each": int(config.round_each_token) or "" if "round_each_token" in used else "",
        "algorithm": config.algorithm if "algorithm" in used and config.algorithm != "auto" else "",
        "tile": ",".join(map(str, config.triton_tile or ())) if "triton_tile" in used else "",
        "replay": f"{options.replay_window},{options.replay_tokens}" if options.replay_window else "",
    }
    return ";".join(f"{name}={value}" for name, value in fields.items() if value != "")


def _backend(target: str) -> Backend:
    """Return the backend that a kernel is of, by its target."""
    return Backend.parse(target.partition("(")[0].removeprefix("ssu_bridge."))


# The fields of the configuration that a name can spell; older versions spelt those that a backend does not use, too.
_CONFIGURED = ("algorithm", "round_each_token", "triton_tile")


class Call(NamedTuple):
    """What a target's name says of a call: the kernel's own target, the arrays in their order, and the options."""

    kernel: str
    names: tuple[str, ...]
    options: Options


def parse(target: str) -> Call | None:
    """Return what the name of a target says; None if it is none of ours, or of a version that spelt it otherwise."""
    match = re.fullmatch(r"(ssu_bridge\..*\))\[(.*)\]", target)
    if match is None:
        return None
    kernel = match[1]
    fields = dict(field.partition("=")[::2] for field in match[2].split(";"))
    try:
        config = SSUConfig(
            backend=_backend(kernel),
            algorithm=fields.get("algorithm", "auto"),
            round_each_token=fields.get("each") == "1",
            philox_rounds=int(fields["rounds"]),
            triton_tile=tuple(map(int, fields["tile"].split(","))) if "tile" in fields else None,  # type: ignore[arg-type]
        )
        flags = (fields["softplus"] == "1", int(fields["pad"]), fields["update"] == "0", True, False)
        replay = map(int, fields.get("replay", "0,0").split(","))
        options = options_of(*flags, int(fields.get("stride", 1)), None, None, None, config, *replay)
        call = Call(kernel, tuple(fields["arrays"].split(",")), options)
    except (KeyError, TypeError, ValueError):
        return None
    known = [name for name in ARGUMENTS if name in call.names]
    if known != [*call.names] or not {*REQUIRED} <= {*known}:
        return None
    # What is spelt otherwise, was left out or stands there twice means something else than it was read as.
    return call if _spell(call.names, options, _CONFIGURED) == match[2] else None
