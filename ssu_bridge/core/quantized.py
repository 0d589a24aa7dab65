"""A state in few bits with a scale for each row, and the names that its two arrays have for kernels."""

import importlib
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ssu_bridge.core.arguments import CURSOR, RINGS
from ssu_bridge.core.arrays import framework_of
from ssu_bridge.core.replay import ReplayCursor, ReplayState
from ssu_bridge.core.rounding import LARGEST, nearest, scale_rows


class QuantizedState(NamedTuple):
    """A state stored in few bits: ``values * scale`` is the state, with one scale for each row along dstate.

    In JAX it is a pytree, as every named tuple is.

    Attributes:
        values: (slots, nheads, headdim, dstate), int16, int8 or float8_e4m3fn.
        scale: (slots, nheads, headdim), float32.
    """

    values: Any
    scale: Any

    @classmethod
    def quantize(cls, state: Any, dtype: Any) -> "QuantizedState":
        """Quantise a state as a step does when it stores one, rounding to nearest.

        Args:
            state: (..., dstate) float array of JAX (traced too), Torch or NumPy.
            dtype: int16, int8 or float8_e4m3fn, by name or as a dtype of any framework.

        Returns:
            A new state in the same framework and on the same device: values of the shape of ``state``, and a scale for
            each row, such that its largest magnitude becomes the largest number of the dtype. JAX on a CPU takes
            subnormal numbers for zero: a row that needs a scale below 2**-126 becomes zeros there, with the scale 1.

        Raises:
            TypeError: ``state`` is no array.
            ValueError: ``dtype`` is none of the three.
        """
        name = dtype_name(dtype)
        if name not in LARGEST:
            raise ValueError(f"dtype: expected {', '.join(LARGEST)}, got {name}")
        xp, cast = namespace(state)
        scaled, scales = scale_rows(xp, cast(state, "float32"), name)
        return cls(cast(nearest(xp, scaled, name), name), scales)

    def dequantize(self) -> Any:
        """Return ``values * scale`` in float32; with JAX on a CPU zeros where the scale is below 2**-126."""
        _, cast = namespace(self.values)
        with np.errstate(invalid="ignore"):  # an infinite scale times 0
            return cast(self.values, "float32") * self.scale[..., None]


# What may be quantised, and where kernels take its scales.
SCALES = {"state": "state_scale", "intermediate_states": "intermediate_state_scales"}


def paired(arrays: Mapping[str, Any], window: int = 0) -> dict[str, Any]:
    """Put arrays by the names that kernels have for them under those of ``update``: several into one argument.

    Args:
        arrays: quantised ones with their scale, and a checkpoint with its rings.
        window: that of the cursor, if they have one and it is to be made.
    """
    result = dict(arrays)
    for name, scale in SCALES.items():
        if scale in result:
            result[name] = QuantizedState(result[name], result.pop(scale))
    if RINGS[0] in result:
        result["state"] = ReplayState(result["state"], *map(result.pop, RINGS))
        if window:
            start, pending = map(result.pop, CURSOR)
            result["replay"] = ReplayCursor(start, pending, window, result["state"].dt.shape[-1] - window)
    return result


def unpaired(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arrays by kernels' names again: the inverse of ``paired``."""
    result = dict(arrays)
    if isinstance(state := result.get("state"), ReplayState):
        result |= zip(("state", *RINGS), state, strict=True)
    if (cursor := result.pop("replay", None)) is not None:
        result |= zip(CURSOR, (cursor.start, cursor.pending), strict=True)
    for name, scale in SCALES.items():
        if isinstance(pair := result.get(name), QuantizedState):
            result[name], result[scale] = pair
    return result


def dtype_name(dtype: Any) -> str:
    """Return NumPy's name for a dtype of any framework, or for its name."""
    return str(dtype).removeprefix("torch.") if "torch." in str(dtype) else np.dtype(dtype).name


def namespace(array: Any) -> tuple[Any, Any]:
    """Return the module that has the functions for an array, and one that casts it to a dtype by name."""
    framework = framework_of(array)
    if framework is None:
        raise TypeError(f"state: expected a JAX, Torch or NumPy array, got {type(array).__name__}")
    if framework == "torch":
        torch = sys.modules["torch"]
        return torch, lambda tensor, dtype: tensor.to(getattr(torch, dtype))
    xp = importlib.import_module("jax.numpy") if framework == "jax" else np
    return xp, lambda array, dtype: array.astype(dtype)
