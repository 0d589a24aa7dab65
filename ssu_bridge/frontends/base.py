"""The frontends, a module for each framework, and which of them a call belongs to.

Each module has the functions of :class:`Frontend`; it is imported when the first arrays of its framework arrive.
"""

import functools
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ssu_bridge.core.arguments import ARGUMENTS, REQUIRED, ROUNDABLE, TABLES
from ssu_bridge.core.arrays import framework_of
from ssu_bridge.core.problem import Options
from ssu_bridge.core.quantized import SCALES, paired
from ssu_bridge.core.slots import require_valid
from ssu_bridge.dispatch import Choice

# The array arguments of one call, in the order of ARGUMENTS and without out. None stands for one that was not given;
# a shorter tuple leaves out the rest.
Arrays = tuple[Any, ...]


# Runs one call, of a type of state and options that are fixed, from its arrays and out; returns what ``update`` does.
Launch = Callable[[Arrays, Any], tuple[Any, ...]]


class Frontend(Protocol):
    """The interface of a frontend."""

    def launcher(self, state_type: type, options: Options) -> Launch:
        """Return the function that checks the arrays of a call, chooses a backend and launches its kernel."""

    def consider(self, arrays: Arrays, out: Any, options: Options) -> tuple[Choice, ...]:
        """Check the call and return the choice for each platform that it could run on."""

    def seeded(self, arrays: Arrays, options: Options) -> Arrays:
        """Return the arrays with a seed for stochastic rounding as kernels take it, drawn if there has to be one."""

    def to_host(self, array: Any) -> np.ndarray:
        """Return a NumPy copy."""

    def from_host(self, array: np.ndarray, like: Any = None) -> Any:
        """Return an array of the framework with a copy of the values, on the device of ``like`` if there is one."""


def frontend_of(arrays: Arrays, out: Any) -> Frontend:
    """Return the frontend of a call: that of its state's framework.

    Raises:
        TypeError: an argument is no array, or the arrays are of several frameworks.
    """
    require_one_framework(arrays, out)
    return frontend(framework_of(arrays[0]) or "")


def frontend(framework: str) -> Frontend:
    """Return the frontend of a framework, "jax", "torch" or "numpy"."""
    return importlib.import_module(f"ssu_bridge.frontends.{framework}")


def launcher_of(arrays: Arrays, out: Any, options: Options) -> Launch:
    """Return the function that runs a call with these options for states of this one's type.

    Raises:
        TypeError: as :func:`frontend_of`.
    """
    side = frontend_of(arrays, out)
    launch = side.launcher(type(arrays[0]), options)
    return functools.partial(_check_and_launch, side, launch, options) if options.check_indices else launch


def _check_and_launch(side: Frontend, launch: Launch, options: Options, arrays: Arrays, out: Any) -> tuple[Any, ...]:
    """Check the index tables on the host, then launch the call."""
    problem = side.consider(arrays, out, options)[0].problem
    if problem.traced:
        if any(name in problem.names for name in TABLES):
            raise ValueError(
                "check_indices: expected False while JAX traces, where indices have no values yet, got True; "
                "check them outside of jit"
            )
        return launch(arrays, out)
    given = named(arrays)
    looked_at = (*TABLES, "intermediate_states")
    require_valid(problem, {n: a if n not in TABLES else side.to_host(a) for n, a in given.items() if n in looked_at})
    return launch(arrays, out)


def named(arrays: Arrays, out: Any = None) -> dict[str, Any]:
    """Return the arrays that were given, by name."""
    return {name: array for name, array in (*zip(ARGUMENTS, arrays, strict=False), ("out", out)) if array is not None}


def returned(arrays: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the results of ``update``, from the arrays of a call by name after it, out among them."""
    results = paired(arrays)
    return results["out"], *(results[name] for name in SCALES if name in results)


SEED = list(ARGUMENTS).index("rand_seed")


def draws_seed(arrays: Arrays, options: Options) -> bool:
    """Return whether a seed has to be drawn for a call: rounding is configured, and it has none."""
    missing = options.config.stochastic_rounding and (len(arrays) <= SEED or arrays[SEED] is None)
    return missing and _dtype_name(arrays[0]) in ROUNDABLE


def with_seed(arrays: Arrays, options: Options, make: Callable[[int | None], Any]) -> Arrays:
    """Give a call the array that its seed travels in.

    A seed that has to be drawn is drawn into it when nothing can refuse the call any more: one that raises leaves the
    framework's generator as it was.

    Args:
        arrays: of the call; its seed may be an int, an array of one number with any axes, or missing where stochastic
            rounding is configured.
        options: the configuration is theirs.
        make: returns an array of one int64, with the bits of the int that it is given; for None with any.
    """
    seed: Any = arrays[SEED] if len(arrays) > SEED else None
    if isinstance(seed, int | np.integer) and not isinstance(seed, bool):
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"rand_seed: expected an int of 64 bits, got {seed}")
        seed = make((int(seed) + 2**63) % 2**64 - 2**63)
    elif draws_seed(arrays, options):
        seed = make(None)
    elif len(shape := getattr(seed, "shape", ())) > 1 and math.prod(shape) == 1:
        seed = seed.reshape(())
    else:
        return arrays
    before = (*arrays, *[None] * (SEED - len(arrays)))[:SEED]
    return (*before, seed, *arrays[SEED + 1 :])


def _dtype_name(array: Any) -> str:
    return str(getattr(array, "dtype", "")).removeprefix("torch.")


def require_one_framework(arrays: Arrays, out: Any = None) -> None:
    """Check that every argument is an array, and all are of one framework.

    NumPy arrays may be passed along with JAX arrays, converted as JAX does, except for the state.

    Raises:
        TypeError: naming the argument.
    """
    given = {**dict.fromkeys(REQUIRED), **named(arrays, out)}
    for name, array in given.items():
        if framework_of(array) is None and not (name == "rand_seed" and type(array) is int):
            raise TypeError(f"{name}: expected a JAX, Torch or NumPy array, got {_type_name(array)}")
    expected = _framework_of_all(list(given.values()))
    for name, array in given.items():
        framework = framework_of(array)
        if framework in (None, expected) or (framework == "numpy" and expected == "jax" and name != "state"):
            continue
        raise TypeError(f"{name}: expected a {expected} array, as the other arguments are, got a {framework} one")


def refuse_copy(options: Options) -> None:
    """Raise the error for ``donate=False`` where it would have to copy the state and does not."""
    if not options.donate:
        raise TypeError("donate: expected True with Torch and NumPy arrays, whose state is changed in place; got False")


def _framework_of_all(values: Sequence[Any]) -> str | None:
    """Return the framework that a mixture was probably meant to be of: NumPy only if nothing else is there."""
    found = [framework for framework in map(framework_of, values) if framework]
    return next((framework for framework in found if framework != "numpy"), "numpy")


def _type_name(value: object) -> str:
    return "None" if value is None else f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
