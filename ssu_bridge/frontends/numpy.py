"""The NumPy frontend: arrays on the host, handed to kernels by their addresses."""

from typing import Any

import numpy as np

from ssu_bridge.arrays import ArrayInfo
from ssu_bridge.backends.base import DeviceKernel, HostKernel
from ssu_bridge.choose import Choice, consider_problem, load
from ssu_bridge.frontends import Arrays, require_one_framework
from ssu_bridge.library import library
from ssu_bridge.problem import ARGUMENTS, Options, Problem, describe


def update(arrays: Arrays, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """Run the step; out is new unless it was given, the state is changed in place."""
    problem = _describe(arrays, options)
    kernel = load(problem)
    given = {name: array for name, array in zip(ARGUMENTS, arrays, strict=True) if array is not None}
    state, x = given["state"], given["x"]
    out = given.pop("out", None)
    if out is None:
        out = np.empty(x.shape, x.dtype)
    if isinstance(kernel, HostKernel):
        kernel.function(given, out)
    else:
        assert isinstance(kernel, DeviceKernel)
        kernel.function(*map(_view, given.values()), _view(out), _view(state))
    return out, state


def consider(arrays: Arrays, options: Options) -> tuple[Choice, ...]:
    """Return the choice for the one platform there is."""
    return (consider_problem(_describe(arrays, options)),)


def to_host(array: np.ndarray) -> np.ndarray:
    """Return a copy."""
    return np.array(array)


def from_host(array: np.ndarray, like: np.ndarray | None = None) -> np.ndarray:
    """Return a copy."""
    return np.array(array)


def _describe(arrays: Arrays, options: Options) -> Problem:
    require_one_framework(arrays)
    infos = {name: _info(name, array) for name, array in zip(ARGUMENTS, arrays, strict=True) if array is not None}
    return describe(infos, options, framework="numpy", platform="cpu")


def _info(name: str, array: Any) -> ArrayInfo:
    if isinstance(array, int):  # a seed
        return ArrayInfo((), "int64")
    if not array.flags.aligned or any(stride % array.itemsize for stride in array.strides):
        raise ValueError(f"{name}: expected elements aligned to their size, got byte strides {array.strides}")
    # A dtype of foreign byte order has the native one's name; its code, such as >f4, is refused with the dtypes.
    dtype = array.dtype.name if array.dtype.isnative else array.dtype.str
    return ArrayInfo(array.shape, dtype, _strides(array), writeable=array.flags.writeable)


def _strides(array: np.ndarray) -> tuple[int, ...]:
    return tuple(stride // array.itemsize for stride in array.strides)


def _view(array: np.ndarray) -> Any:
    """Hand an array over by its address: NumPy's own DLPack takes neither bfloat16 nor read-only arrays."""
    return library().view(array.ctypes.data, array.shape, _strides(array), array.dtype.name)
