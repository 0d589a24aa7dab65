"""The NumPy frontend: arrays on the host, handed to kernels by their addresses."""

import functools
from typing import Any

import numpy as np

from ssu_bridge.backends.base import DeviceKernel, HostKernel
from ssu_bridge.core.aliasing import needs_fresh_output
from ssu_bridge.core.arrays import ArrayInfo
from ssu_bridge.core.problem import Options, Problem
from ssu_bridge.core.validate import describe
from ssu_bridge.dispatch import Choice, consider_problem, load
from ssu_bridge.frontends.base import Arrays, Launch, named, refuse_copy, require_one_framework, returned, with_seed
from ssu_bridge.native import library


def launcher(state_type: type, options: Options) -> Launch:
    """Return the function that runs a call with these options."""
    refuse_copy(options)
    return functools.partial(_update, options)


def _update(options: Options, arrays: Arrays, out: np.ndarray | None) -> tuple[Any, ...]:
    """Run the step; out is new unless it was given, all other results are changed in place."""
    arrays = seeded(arrays, options)
    problem = _describe(arrays, out, options)
    kernel = load(problem)
    fresh_output = needs_fresh_output(problem, named(arrays, out))
    given = named(arrays)
    x = given["x"]
    result = np.empty(x.shape, x.dtype) if out is None or fresh_output else out
    if isinstance(kernel, HostKernel):
        kernel.function(given, result)
    else:
        assert isinstance(kernel, DeviceKernel)
        results = ({**given, "out": result}[name] for name in problem.results)
        kernel.function(*map(_view, (*given.values(), *results)))
    if out is None:
        out = result
    elif fresh_output:
        out[...] = result
    return returned({**given, "out": out})


def consider(arrays: Arrays, out: np.ndarray | None, options: Options) -> tuple[Choice, ...]:
    """Return the choice for the one platform there is."""
    with_any_seed = with_seed(arrays, options, lambda _: np.zeros((), np.int64))
    return (consider_problem(_describe(with_any_seed, out, options)),)


def seeded(arrays: Arrays, options: Options) -> Arrays:
    """Return the arrays with the seed in one; if it has to be drawn, by NumPy's global generator."""
    return with_seed(arrays, options, _seed)


def _seed(value: int | None) -> np.ndarray:
    narrow = np.iinfo(np.int64)
    return np.asarray(np.random.randint(narrow.min, narrow.max, dtype=np.int64) if value is None else value, np.int64)


def to_host(array: np.ndarray) -> np.ndarray:
    """Return a copy."""
    return np.array(array)


def from_host(array: np.ndarray, like: np.ndarray | None = None) -> np.ndarray:
    """Return a copy."""
    return np.array(array)


def _describe(arrays: Arrays, out: np.ndarray | None, options: Options) -> Problem:
    require_one_framework(arrays, out)
    infos = {name: _info(name, array) for name, array in named(arrays, out).items()}
    return describe(infos, options, framework="numpy", platform="cpu")


def _info(name: str, array: Any) -> ArrayInfo:
    if not array.flags.aligned or any(array.itemsize and stride % array.itemsize for stride in array.strides):
        raise ValueError(f"{name}: expected elements aligned to their size, got byte strides {array.strides}")
    # A dtype of foreign byte order has the native one's name; its code, such as >f4, is refused with the dtypes.
    dtype = array.dtype.name if array.dtype.isnative else array.dtype.str
    return ArrayInfo(array.shape, dtype, _strides(array), writeable=array.flags.writeable)


def _strides(array: np.ndarray) -> tuple[int, ...]:
    return tuple(stride // array.itemsize for stride in array.strides)


def _view(array: np.ndarray) -> Any:
    """Hand an array over by its address: NumPy's own DLPack takes neither bfloat16 nor read-only arrays."""
    return library().view(array.ctypes.data, array.shape, _strides(array), array.dtype.name)
