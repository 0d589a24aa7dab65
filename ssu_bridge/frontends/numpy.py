"""The NumPy frontend: arrays on the host, handed to kernels by their addresses."""

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ssu_bridge.backends.base import DeviceKernel, HostKernel
from ssu_bridge.core.aliasing import needs_fresh_output
from ssu_bridge.core.arrays import ArrayInfo
from ssu_bridge.core.bounded import Bounded
from ssu_bridge.core.problem import Options, Problem
from ssu_bridge.core.validate import describe
from ssu_bridge.dispatch import Choice, consider_problem, load
from ssu_bridge.frontends.base import (
    SEED,
    Arrays,
    Launch,
    draws_seed,
    named,
    refuse_copy,
    require_one_framework,
    returned,
    with_seed,
)
from ssu_bridge.native import library


class _ArrayStruct(ctypes.Structure):
    """NumPy's C-struct array interface, which gives an address in a quarter of the time of ``__array_interface__``."""

    _fields_ = (
        ("two", ctypes.c_int),
        ("nd", ctypes.c_int),
        ("typekind", ctypes.c_char),
        ("itemsize", ctypes.c_int),
        ("flags", ctypes.c_int),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("data", ctypes.c_size_t),
    )


# A function object of our own: ctypes.pythonapi's is shared, and others may set its types.
_pointer = ctypes.PYFUNCTYPE(ctypes.c_size_t, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class _Step(NamedTuple):
    """What a call that was checked once takes to be run again, with arrays like those of the first.

    Attributes:
        run: the kernel, from whether to look for arrays that share memory, and the addresses of the arrays in their
            order and of out; it returns False and does nothing where it finds some.
        apart: the same, but it runs nothing.
        host: what runs it on the arrays instead, by name.
        state_alone: it returns out and the state as it was passed, and nothing else.
        problem: the description of the call.
    """

    run: Callable[..., bool]
    apart: Callable[..., bool]
    host: Callable[[dict[str, Any], Any], None] | None
    state_alone: bool
    problem: Problem


def launcher(state_type: type, options: Options) -> Launch:
    """Return the function that runs calls with these options; it checks each signature of the arrays once."""
    refuse_copy(options)
    seeds = options.config.stochastic_rounding
    steps: Bounded[tuple[Any, ...], _Step] = Bounded(256)

    def launch(arrays: Arrays, out: np.ndarray | None) -> tuple[Any, ...]:
        draws = seeds and draws_seed(arrays, options)
        if draws or len(arrays) > SEED:
            arrays = with_seed(arrays, options, _seed)
        try:
            # All that the check looks at. A flag of NumPy says whether an array is aligned, and one whether writeable.
            signature = tuple(
                [a if a is None else (type(a), a.shape, a.strides, a.dtype, a.flags.num) for a in (out, *arrays)]
            )
        except AttributeError:
            require_one_framework(arrays, out)
            raise
        step = steps.get(signature)
        if step is None:
            step = steps[signature] = _step(arrays, out, options)
        result = np.empty(arrays[1].shape, arrays[1].dtype) if out is None else out
        holders = [a.__array_struct__ for a in (*arrays, result) if a is not None]
        addresses = [_ArrayStruct.from_address(_pointer(holder, None)).data for holder in holders]
        if draws:  # when nothing can refuse the call any more
            if not step.apart(True, *addresses):
                needs_fresh_output(step.problem, named(arrays, out))
            _draw(arrays[SEED])
        if not step.run(True, *addresses):
            if needs_fresh_output(step.problem, named(arrays, out)):
                # A copy: rows that belong to no sequence keep what they have.
                result[...] = launch(arrays, np.array(result, order="C"))[0]
            elif step.host is None:
                step.run(False, *addresses)
            else:
                step.host(named(arrays), result)
        return (result, arrays[0]) if step.state_alone else returned(named(arrays, result))

    return launch


def _step(arrays: Arrays, out: np.ndarray | None, options: Options) -> _Step:
    """Check a call and load its kernel."""
    problem = _describe(arrays, out, options)
    kernel = load(problem)
    given = named(arrays)
    state_alone = not ({"state_scale", "intermediate_states", "replay_x"} & given.keys())
    if isinstance(kernel, HostKernel):
        return _Step(_unknown, _unknown, kernel.function, state_alone, problem)
    assert isinstance(kernel, DeviceKernel)
    given["out"] = np.empty(given["x"].shape, given["x"].dtype) if out is None else out
    in_place = [list(given).index(name) for name in problem.results[1:]]
    tensors = [*map(_view, given.values())]
    kernel.check(*tensors, *(tensors[place] for place in in_place))
    run, apart = (library().at_addresses(function, tensors, in_place) for function in (kernel.function, kernel.check))
    return _Step(run, apart, None, state_alone, problem)


def _unknown(*addresses: Any) -> bool:
    return False


def consider(arrays: Arrays, out: np.ndarray | None, options: Options) -> tuple[Choice, ...]:
    """Return the choice for the one platform there is."""
    return (consider_problem(_describe(with_seed(arrays, options, _seed), out, options)),)


def seeded(arrays: Arrays, options: Options) -> Arrays:
    """Return the arrays with the seed in one; if it has to be drawn, by NumPy's global generator."""
    with_one = with_seed(arrays, options, _seed)
    if draws_seed(arrays, options):
        _draw(with_one[SEED])
    return with_one


def _seed(value: int | None) -> np.ndarray:
    return np.array(value or 0, np.int64)


def _draw(seed: np.ndarray) -> None:
    narrow = np.iinfo(np.int64)
    seed[...] = np.random.randint(narrow.min, narrow.max, dtype=np.int64)


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
    # The strides of single entries and of empty arrays mean nothing.
    steps = [stride for n, stride in zip(array.shape, array.strides, strict=True) if n > 1 and array.size]
    if not array.flags.aligned or any(array.itemsize and step % array.itemsize for step in steps):
        raise ValueError(f"{name}: expected elements aligned to their size, got byte strides {array.strides}")
    # A dtype of foreign byte order has the native one's name; its code, such as >f4, is refused with the dtypes.
    dtype = array.dtype.name if array.dtype.isnative else array.dtype.str
    return ArrayInfo(array.shape, dtype, _strides(array), writeable=array.flags.writeable)


def _strides(array: np.ndarray) -> tuple[int, ...]:
    return tuple(stride // array.itemsize for stride in array.strides)


def _view(array: np.ndarray) -> Any:
    """Return a tensor like the array: NumPy's own DLPack takes neither bfloat16 nor read-only arrays."""
    return library().view(array.ctypes.data, array.shape, _strides(array), array.dtype.name)
