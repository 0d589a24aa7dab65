"""The frontends, a module for each framework, and which of them a call belongs to.

Each module has the functions of :class:`Frontend`; it is imported when the first arrays of its framework arrive.
"""

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ssu_bridge.arrays import framework_of
from ssu_bridge.choose import Choice
from ssu_bridge.problem import ARGUMENTS, REQUIRED, Options

# The array arguments of one call, in the order of ARGUMENTS; None stands for one that was not given.
Arrays = tuple[Any, ...]


class Frontend(Protocol):
    """What each frontend can do."""

    def update(self, arrays: Arrays, options: Options) -> tuple[Any, ...]:
        """Check the call, choose a backend, launch its kernel and return (out, state)."""

    def consider(self, arrays: Arrays, options: Options) -> tuple[Choice, ...]:
        """Check the call and return the choice for each platform that it could run on."""

    def to_host(self, array: Any) -> np.ndarray:
        """Return a NumPy copy."""

    def from_host(self, array: np.ndarray, like: Any = None) -> Any:
        """Return an array of the framework with a copy of the values, on the device of ``like`` if there is one."""


_by_type: dict[type, Frontend] = {}


def frontend_of(arrays: Arrays) -> Frontend:
    """Return the frontend of a call: that of its state's framework.

    Raises:
        TypeError: an argument is no array, or the arrays are of several frameworks.
    """
    kind = type(arrays[0])
    if kind not in _by_type:
        require_one_framework(arrays)
        _by_type[kind] = frontend(framework_of(arrays[0]) or "")
    return _by_type[kind]


def frontend(framework: str) -> Frontend:
    """Return the frontend of a framework, "jax", "torch" or "numpy"."""
    return importlib.import_module(f"ssu_bridge.frontends.{framework}")


def require_one_framework(arrays: Arrays) -> None:
    """Check that every argument is an array, and all are of one framework.

    NumPy arrays may stand beside JAX arrays, as JAX takes them, except for the state.

    Raises:
        TypeError: naming the argument.
    """
    named = dict(zip(ARGUMENTS, arrays, strict=True))
    for name, array in named.items():
        if array is None and name not in REQUIRED:
            continue
        if framework_of(array) is None and not (name == "rand_seed" and isinstance(array, int)):
            raise TypeError(f"{name}: expected a JAX, Torch or NumPy array, got {_type_name(array)}")
    expected = _framework_of_all(list(named.values()))
    for name, array in named.items():
        framework = framework_of(array)
        if framework in (None, expected) or (framework == "numpy" and expected == "jax" and name != "state"):
            continue
        raise TypeError(
            f"{name}: expected a {expected} array, as the other arguments are, got a {framework} one; "
            "ssu_bridge.to_jax and to_torch hand arrays across"
        )


def _framework_of_all(values: Sequence[Any]) -> str | None:
    """Return the framework that a mixture was probably meant to be of: NumPy only if nothing else is there."""
    found = [framework for framework in map(framework_of, values) if framework]
    return next((framework for framework in found if framework != "numpy"), "numpy")


def _type_name(value: object) -> str:
    return "None" if value is None else f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
