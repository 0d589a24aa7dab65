"""The Torch frontend: tensors go to the kernel as they are, through DLPack's C exchange."""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from ssu_bridge.arrays import ArrayInfo
from ssu_bridge.backends.base import DeviceKernel, HostKernel
from ssu_bridge.choose import Choice, consider_problem, load
from ssu_bridge.errors import UnsupportedError
from ssu_bridge.frontends import Arrays, Launch, named, refuse_copy, require_one_framework
from ssu_bridge.problem import ARGUMENTS, Options, Problem, describe

# The result is no function of these for autograd; of A, D and dt_bias neither, but models keep those as Parameters.
_NO_GRAD = ("state", "x", "dt", "B", "C", "z", "intermediate_states", "out")

# A subclass may hold no memory of its own, as a FakeTensor does.
_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)

# Dtypes that Torch and NumPy do not hand each other, and those of the same size that they do.
_BITS = {"bfloat16": torch.int16, "float8_e4m3fn": torch.int8}

# All that the check of a call looks at, for each tensor, out first: shape, dtype, strides, device, layout,
# requires_grad, type, and whether its values are those in memory with the sign changed.
Key = tuple[Any, ...]
_KEY_NAMES = ("out", *ARGUMENTS)


class _Plan(NamedTuple):
    """What a call comes down to once its arguments are checked."""

    kernel: DeviceKernel | HostKernel
    inputs: Callable[[Arrays], tuple[torch.Tensor, ...]]


def launcher(state_type: type, options: Options) -> Launch:
    """Return the function that runs a call with these options."""
    refuse_copy(options)
    return functools.partial(_update, options)


def _update(options: Options, arrays: Arrays, out: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the step; out is new unless it was given, the state is changed in place."""
    plan = _plan(_key(arrays, out), torch.is_grad_enabled(), options)
    state, x = arrays[:2]
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if isinstance(plan.kernel, HostKernel):
        _run_on_host(plan.kernel, arrays, out)
    else:
        plan.kernel.function(*plan.inputs(arrays), out, state)
    # Autograd must know of a write that it did not see, or it would use a saved tensor that has changed.
    torch.autograd.graph.increment_version((out, state))
    return out, state


def consider(arrays: Arrays, out: torch.Tensor | None, options: Options) -> tuple[Choice, ...]:
    """Return the choice for the device that the tensors are on."""
    return (consider_problem(_describe(_key(arrays, out), options)),)


def to_host(tensor: torch.Tensor) -> np.ndarray:
    """Return a NumPy copy."""
    host = tensor.detach().to("cpu", copy=True)
    name = _name(host.dtype)
    return host.view(_BITS[name]).numpy().view(name) if name in _BITS else host.numpy()


def from_host(array: np.ndarray, like: torch.Tensor | None = None) -> torch.Tensor:
    """Return a tensor with a copy of the values."""
    copy, name = np.array(array), array.dtype.name
    if name in _BITS:
        host = torch.from_numpy(copy.view(f"i{copy.itemsize}")).view(getattr(torch, name))
    else:
        host = torch.from_numpy(copy)
    return host if like is None else host.to(like.device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _key(arrays: Arrays, out: torch.Tensor | None) -> Key:
    try:
        return tuple(
            [
                None
                if a is None
                else (a.shape, a.dtype, a.stride(), a.device, a.layout, a.requires_grad, type(a), a.is_neg())
                for a in (out, *arrays)
            ]
        )
    except (AttributeError, RuntimeError, TypeError):
        require_one_framework(arrays, out)
        if any(isinstance(array, int) for array in arrays):  # a seed
            return _key(tuple(torch.tensor(a) if isinstance(a, int) else a for a in arrays), out)
        raise


@functools.lru_cache(maxsize=4096)
def _plan(key: Key, grad_enabled: bool, options: Options) -> _Plan:
    problem = _describe(key, options)
    for name, entry in zip(_KEY_NAMES, key, strict=False):
        if grad_enabled and name in _NO_GRAD and entry is not None and entry[5]:
            raise UnsupportedError(f"{name}: it requires grad, and no gradient goes through here; use torch.no_grad()")
    kernel = load(problem)
    assert isinstance(kernel, DeviceKernel | HostKernel)
    return _Plan(kernel, operator.itemgetter(*[i for i, entry in enumerate(key[1:]) if entry is not None]))


def _describe(key: Key, options: Options) -> Problem:
    given = {name: entry for name, entry in zip(_KEY_NAMES, key, strict=False) if entry is not None}
    infos = {}
    for name, (shape, dtype, strides, device, layout, _, kind, negated) in given.items():
        if layout != torch.strided:
            raise ValueError(f"{name}: expected a strided tensor, got layout {layout}")
        if kind not in _PLAIN:
            raise TypeError(
                f"{name}: expected a plain torch.Tensor, whose memory a kernel can use, got {kind.__name__}"
            )
        if negated:
            raise ValueError(f"{name}: expected a tensor that holds its values, got a lazy negation; use resolve_neg()")
        infos[name] = ArrayInfo(tuple(shape), _name(dtype), strides, str(device))
    device = given["state"][3]
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return describe(infos, options, framework="torch", platform=device.type, capability=capability)


def _run_on_host(kernel: HostKernel, arrays: Arrays, out: torch.Tensor) -> None:
    host = {name: to_host(array) for name, array in named(arrays).items()}
    host_out = np.empty(tuple(out.shape), host["x"].dtype)
    kernel.function(host, host_out)
    with torch.no_grad():
        out.copy_(from_host(host_out))
        arrays[0].copy_(from_host(host["state"]))
