"""Arrays of any framework: whose they are, what they are, and handing them across without a copy.

Nothing here imports a framework: an array of one can only arrive where that framework has been imported already.
"""

import importlib
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ssu_bridge.errors import BackendNotAvailableError
from ssu_bridge.rounding import LARGEST, nearest, scale_rows


class ArrayInfo(NamedTuple):
    """What :class:`ssu_bridge.problem.Problem` needs to know of one array.

    Attributes:
        shape: its sizes.
        dtype: its dtype by NumPy's name, "bfloat16" and "float8_e4m3fn" included.
        strides: in elements; None for a dense row-major array.
        device: of any spelling, as long as two arrays on one device have the same. None: not placed yet.
        writeable: whether it may be written in place.
        aligned: whether it begins at a multiple of the bytes that a GPU loads at once, as every fresh array does.
    """

    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...] | None = None
    device: str | None = None
    writeable: bool = True
    aligned: bool = True


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
            each row, such that its largest magnitude becomes the largest number of the dtype.

        Raises:
            TypeError: ``state`` is no array.
            ValueError: ``dtype`` is none of the three.
        """
        name = str(dtype).removeprefix("torch.") if "torch." in str(dtype) else np.dtype(dtype).name
        if name not in LARGEST:
            raise ValueError(f"dtype: expected {', '.join(LARGEST)}, got {name}")
        xp, cast = _namespace(state)
        scaled, scales = scale_rows(xp, cast(state, "float32"), name)
        return cls(cast(nearest(xp, scaled, name), name), scales)

    def dequantize(self) -> Any:
        """Return ``values * scale`` in float32."""
        _, cast = _namespace(self.values)
        with np.errstate(invalid="ignore"):  # an infinite scale times 0
            return cast(self.values, "float32") * self.scale[..., None]


# What may be quantised, and where kernels take its scales.
SCALES = {"state": "state_scale", "intermediate_states": "intermediate_state_scales"}


def paired(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Put arrays by the names that kernels have for them under those of ``update``, quantised ones with their scale."""
    result = dict(arrays)
    for name, scale in SCALES.items():
        if scale in result:
            result[name] = QuantizedState(result[name], result.pop(scale))
    return result


def unpaired(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Undo :func:`paired`."""
    result = dict(arrays)
    for name, scale in SCALES.items():
        if isinstance(pair := result.get(name), QuantizedState):
            result[name], result[scale] = pair
    return result


def _namespace(array: Any) -> tuple[Any, Any]:
    """Return the module that has the functions for an array, and one that casts it to a dtype by name."""
    framework = framework_of(array)
    if framework is None:
        raise TypeError(f"state: expected a JAX, Torch or NumPy array, got {type(array).__name__}")
    if framework == "torch":
        torch = sys.modules["torch"]
        return torch, lambda tensor, dtype: tensor.to(getattr(torch, dtype))
    xp = importlib.import_module("jax.numpy") if framework == "jax" else np
    return xp, lambda array, dtype: array.astype(dtype)


def framework_of(array: object) -> str | None:
    """Return "jax" (tracers and references too), "torch" or "numpy" for an array of one, None for anything else."""
    if isinstance(array, np.ndarray):
        # Neither is what kernels and JAX take it for: a mask would be ignored, a matrix has axes of its own mind.
        return None if isinstance(array, np.ma.MaskedArray | np.matrix) else "numpy"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return "torch"
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(array, jax.Array | jax.Ref):
        return "jax"
    return None


def to_jax(tensor: Any) -> Any:
    """Return a ``jax.Array`` over the memory of a Torch tensor, without a copy.

    Args:
        tensor: a dense (row-major, contiguous) ``torch.Tensor`` on the CPU or a CUDA device that does not require
            grad. On the CPU its memory must be aligned as XLA asks, to 64 bytes: a fresh tensor is, a slice may not be.

    Returns:
        An array of the same shape, dtype, device and address.

    Raises:
        TypeError: ``tensor`` is not a Torch tensor.
        BackendNotAvailableError: JAX is not installed.
        ValueError: it has gaps, requires grad or is lazily negated or conjugated, or JAX could only copy it.

    Lifetime: the array keeps the tensor's memory alive. JAX takes its arrays for immutable, so write to the tensor no
    more while the array, or a computation on it that has not finished, is alive. Streams: what Torch's current stream
    was given before is done before JAX reads the array. Donation: on a GPU ``update`` changes such a state in the
    tensor's own memory, which then lives as long as the tensor or the new state; on the CPU, JAX does not donate memory
    that it did not allocate, and the new state has other memory.
    """
    if framework_of(tensor) != "torch":
        raise TypeError(f"tensor: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.requires_grad:
        raise ValueError("tensor: expected one that does not require grad, got one that does; pass tensor.detach()")
    if tensor.is_neg() or tensor.is_conj():
        raise ValueError(
            "tensor: expected one that holds its values, got a lazy one; use resolve_neg() or resolve_conj()"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"tensor: expected a dense row-major tensor, got strides {tuple(tensor.stride())}")
    try:
        import jax
    except ImportError:
        raise BackendNotAvailableError('JAX is not installed: pip install "ssu-bridge[jax]"') from None
    array = jax.dlpack.from_dlpack(tensor)
    if array.size and array.unsafe_buffer_pointer() != tensor.data_ptr():
        raise ValueError(
            f"tensor: expected memory aligned to 64 bytes, got address {tensor.data_ptr():#x}: JAX copies it"
        )
    return array


def to_torch(array: Any) -> Any:
    """Return a ``torch.Tensor`` over the memory of a ``jax.Array``, without a copy.

    Args:
        array: a ``jax.Array`` on one CPU or CUDA device, not a tracer and not deleted.

    Returns:
        A tensor of the same shape, dtype, device and address. Write to it only while JAX computes nothing
        with the array.

    Raises:
        TypeError: ``array`` is not a JAX array.
        BackendNotAvailableError: Torch is not installed.
        ValueError: it was deleted (donated), is being traced, or lies on several devices.

    Lifetime: the tensor keeps the array's memory alive until the tensor and every view of it are collected *on the
    host*. XLA's allocator may then hand the memory out again, even while a kernel that reads it waits on a Torch
    stream: call ``torch.cuda.synchronize()``, or wait for an event recorded after the last use, before dropping the
    tensor. While it lives, JAX does not donate the array: ``update`` gives such a state new memory. Streams: Torch's
    current stream waits for the array to be computed; a later JAX computation does not wait for Torch.
    """
    jax = sys.modules.get("jax")
    if jax is None or not isinstance(array, jax.Array):
        raise TypeError(f"array: expected a jax.Array, got {type(array).__name__}")

    try:
        import torch.utils.dlpack
    except ImportError:
        raise BackendNotAvailableError('Torch is not installed: pip install "ssu-bridge[torch]"') from None
    if isinstance(array, jax.core.Tracer):
        raise ValueError("array: expected a concrete array, got a tracer; hand arrays across outside of jit")
    if array.is_deleted():
        raise ValueError("array: expected a live array, got one that was deleted (donated to an earlier call)")
    if len(array.devices()) != 1:
        raise ValueError(f"array: expected one device, got {len(array.devices())}; hand its shards across one by one")
    return torch.utils.dlpack.from_dlpack(array)
