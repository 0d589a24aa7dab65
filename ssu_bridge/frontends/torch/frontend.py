"""The Torch frontend: tensors go to the kernel as they are, through DLPack's C exchange."""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from ssu_bridge.backends.base import DeviceKernel, HostKernel
from ssu_bridge.core.arguments import ARGUMENTS, VECTOR_BYTES
from ssu_bridge.core.arrays import ArrayInfo
from ssu_bridge.core.problem import Options, Problem
from ssu_bridge.core.validate import describe
from ssu_bridge.dispatch import Choice, consider_problem, load
from ssu_bridge.errors import UnsupportedError
from ssu_bridge.frontends.base import (
    SEED,
    Arrays,
    Launch,
    named,
    refuse_copy,
    require_one_framework,
    returned,
    with_seed,
)
from ssu_bridge.frontends.torch.custom_op import trace
from ssu_bridge.native import library

# The result is no function of these for autograd; of A, D and dt_bias neither, but models keep those as Parameters.
_NO_GRAD = ("state", "x", "dt", "B", "C", "z", "intermediate_states", "out")

# A subclass may hold no memory of its own, as a FakeTensor does.
_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
_PLAIN_TYPES = set(_PLAIN)

_is_neg = torch.Tensor.is_neg

# Dtypes that Torch and NumPy do not hand each other, and those of the same size that they do.
_BITS = {"bfloat16": torch.int16, "float8_e4m3fn": torch.int8}

# All that the check of a call looks at, for each tensor, out first: shape, dtype, strides, device, layout,
# requires_grad, type, whether its values are those in memory with the sign changed, and on a GPU how far its address is
# from a multiple of VECTOR_BYTES.
Key = tuple[Any, ...]
_KEY_NAMES = ("out", *ARGUMENTS)


_Pick = Callable[[Arrays], tuple[torch.Tensor, ...]]


class _Step(NamedTuple):
    """What a call that was checked once takes to be run again.

    Attributes:
        run: runs a call, and returns whether it did: not if the tensors look otherwise than those of the first.
        given: picks those of a call's arrays that there are.
        graded: picks those whose gradient would be lost.
        written: the places of those that are written besides state, none where state is not.
    """

    run: Callable[..., bool]
    given: _Pick
    graded: _Pick
    written: tuple[int, ...] | None


def launcher(state_type: type, options: Options) -> Launch:
    """Return the function that runs a call with these options.

    A call that looks like the last one of its sizes is not checked again: the native library compares them, at a
    fraction of what it costs to look at each tensor from Python.
    """
    refuse_copy(options)
    steps: dict[Any, _Step] = {}  # by the shapes of state and x
    seeds = options.config.stochastic_rounding

    def launch(arrays: Arrays, out: torch.Tensor | None) -> tuple[Any, ...]:
        if seeds or len(arrays) > SEED:
            arrays = seeded(arrays, options)
        if torch.compiler.is_compiling():
            return trace(options, arrays, out)
        grad, ready = torch.is_grad_enabled(), False
        try:
            state, x = arrays[0], arrays[1]
            run, pick_given, pick_graded, written = steps[state.shape, x.shape]
            result = _new_out(x) if out is None else out
            # What the native library does not see; and it would take arrays of other frameworks too.
            given = (result, *pick_given(arrays))
            graded = [a.requires_grad for a in (result, *pick_graded(arrays))] if grad else ()
            special = any(map(_is_neg, given)) or any(graded)
            ready = not special and _PLAIN_TYPES.issuperset(map(type, given))
        except (LookupError, AttributeError, TypeError, ValueError, RuntimeError):
            pass  # the first of its sizes; or else the check below says what is wrong
        try:
            if not (ready and run(*arrays, result)):
                return check_and_launch(arrays, out, grad)
        except Exception:
            if ready:  # to say what is wrong with a tensor, if that is why
                _kernel(_key(arrays, out), grad, options)
            raise
        if written is None:
            return _written(result, state)
        _written(result, *[arrays[place] for place in written])
        return returned(named(arrays, result))

    def check_and_launch(arrays: Arrays, out: torch.Tensor | None, grad: bool) -> tuple[Any, ...]:
        kernel, results = _kernel(_key(arrays, out), grad, options)
        given = named(arrays)
        state, x = given["state"], given["x"]
        given["out"] = _new_out(x) if out is None else out
        written = [given[name] for name in results]
        if isinstance(kernel, HostKernel):
            _run_on_host(kernel, results, given)
        else:
            step = _step(kernel, results, arrays)
            step.run(*arrays, given["out"])
            if len(steps) >= 1024:  # sizes that vary without end must not fill the memory
                steps.clear()
            steps[state.shape, x.shape] = step
        _written(*written)
        return returned(given)

    return launch


def _new_out(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _written(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Tell autograd of a write that it did not see, or it would use a saved tensor that has changed."""
    torch.autograd.graph.increment_version(tensors)
    return tensors


def _step(kernel: DeviceKernel, results: tuple[str, ...], arrays: Arrays) -> _Step:
    names = [name for name, _ in zip(ARGUMENTS, arrays, strict=False)]
    places = [place for place, array in enumerate(arrays) if array is not None]
    graded = [place for place in places if names[place] in _NO_GRAD]
    written = tuple(names.index(name) for name in results if name != "out")
    run = library().guarded(kernel.function, written)
    return _Step(run, operator.itemgetter(*places), operator.itemgetter(*graded), None if written == (0,) else written)


def consider(arrays: Arrays, out: torch.Tensor | None, options: Options) -> tuple[Choice, ...]:
    """Return the choice for the device that the tensors are on."""
    with_any_seed = with_seed(arrays, options, lambda _: torch.zeros((), dtype=torch.int64, device=arrays[0].device))
    return (consider_problem(_describe(_key(with_any_seed, out), options)),)


def seeded(arrays: Arrays, options: Options) -> Arrays:
    """Return the arrays with the seed in one on the state's device; if it has to be drawn, by Torch's generator there.

    In a CUDA graph that generator gives each replay a seed of its own.
    """

    def make(value: int | None) -> torch.Tensor:
        state, narrow = arrays[0], torch.iinfo(torch.int64)
        if value is None:
            return torch.randint(narrow.min, narrow.max, (), dtype=torch.int64, device=state.device)
        return torch.full((), value, dtype=torch.int64, device=state.device)

    return with_seed(arrays, options, make)


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


def _entry(a: torch.Tensor) -> tuple[Any, ...]:
    offset = a.is_cuda and a.data_ptr() % VECTOR_BYTES
    return a.shape, a.dtype, a.stride(), a.device, a.layout, a.requires_grad, type(a), a.is_neg(), offset


def _key(arrays: Arrays, out: torch.Tensor | None) -> Key:
    try:
        return tuple([None if a is None else _entry(a) for a in (out, *arrays)])
    except (AttributeError, RuntimeError, TypeError):
        require_one_framework(arrays, out)
        raise


@functools.lru_cache(maxsize=4096)
def _kernel(key: Key, grad_enabled: bool, options: Options) -> tuple[DeviceKernel | HostKernel, tuple[str, ...]]:
    problem = _describe(key, options)
    for name, entry in zip(_KEY_NAMES, key, strict=False):
        if grad_enabled and name in _NO_GRAD and entry is not None and entry[5]:
            raise UnsupportedError(f"{name}: it requires grad, and no gradient goes through here; use torch.no_grad()")
    kernel = load(problem)
    assert isinstance(kernel, DeviceKernel | HostKernel)
    return kernel, problem.results


def _describe(key: Key, options: Options) -> Problem:
    given = {name: entry for name, entry in zip(_KEY_NAMES, key, strict=False) if entry is not None}
    infos = {}
    for name, (shape, dtype, strides, device, layout, _, kind, negated, offset) in given.items():
        if layout != torch.strided:
            raise ValueError(f"{name}: expected a strided tensor, got layout {layout}")
        if kind not in _PLAIN:
            raise TypeError(
                f"{name}: expected a plain torch.Tensor, whose memory a kernel can use, got {kind.__name__}"
            )
        if negated:
            raise ValueError(f"{name}: expected a tensor that holds its values, got a lazy negation; use resolve_neg()")
        infos[name] = ArrayInfo(tuple(shape), _name(dtype), strides, str(device), aligned=not offset)
    device = given["state"][3]
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return describe(infos, options, framework="torch", platform=device.type, capability=capability)


def _run_on_host(kernel: HostKernel, results: tuple[str, ...], given: dict[str, torch.Tensor]) -> None:
    host = {name: to_host(tensor) for name, tensor in given.items()}
    kernel.function(host, host["out"])
    with torch.no_grad():
        for name in results:
            given[name].copy_(from_host(host[name]))
