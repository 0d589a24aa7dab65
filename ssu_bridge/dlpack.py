"""One memory for JAX and Torch: arrays without a copy, and JAX waiting for what Torch does to them."""

import sys
from typing import Any

from ssu_bridge.backends.base import missing_jax_ffi
from ssu_bridge.core.arrays import framework_of
from ssu_bridge.core.quantized import QuantizedState
from ssu_bridge.errors import BackendNotAvailableError


def to_jax(tensor: Any) -> Any:
    """Return a ``jax.Array`` over the memory of a Torch tensor, without a copy.

    Args:
        tensor: a dense (row-major, contiguous) ``torch.Tensor`` on the CPU or a CUDA device that does not require
            grad. On the CPU XLA expects memory that is aligned to 64 bytes: a fresh tensor is, a slice may not be.

    Returns:
        An array of the same shape, dtype, device and address.

    Raises:
        TypeError: ``tensor`` is not a plain Torch tensor.
        BackendNotAvailableError: JAX is not installed.
        ValueError: it has gaps, requires grad, is lazily negated or conjugated, sparse, nested or without memory, has a
            dtype that JAX lacks or narrows (64 bits, unless jax_enable_x64 is on), or JAX could only copy it.
        UnsupportedError: a transform of Torch is in force.

    Lifetime: the array keeps the tensor's memory alive. JAX takes its arrays for immutable, so write to the tensor no
    more while the array, or a computation on it that has not finished, is alive. Streams: what Torch's current stream
    was given before is done before JAX reads the array. Donation: on a GPU ``update`` changes such a state in the
    tensor's own memory, which then lives as long as the tensor or the new state; on the CPU, JAX does not donate memory
    that it did not allocate, and the new state has other memory.
    """
    if framework_of(tensor) != "torch":
        raise TypeError(f"tensor: expected a torch.Tensor, got {type(tensor).__name__}")
    from ssu_bridge.frontends.torch import metadata, transforms

    transforms.require_supported({"tensor": tensor})
    metadata.require_memory("tensor", tensor)
    if tensor.requires_grad:
        raise ValueError("tensor: expected one that does not require grad, got one that does; pass tensor.detach()")
    if tensor.is_meta:
        raise ValueError("tensor: expected a tensor that has memory, got one on the meta device")
    if not tensor.is_contiguous():
        raise ValueError(f"tensor: expected a dense row-major tensor, got strides {tuple(tensor.stride())}")
    try:
        import jax
    except ImportError:
        raise BackendNotAvailableError("JAX is not installed: pip install jax jax-tvm-ffi") from None
    name = metadata.dtype_name(tensor.dtype)
    try:
        kept = jax.dtypes.canonicalize_dtype(name).name == name
    except TypeError:
        raise ValueError(f"tensor: expected a dtype that JAX has, got {name}") from None
    if not kept:
        raise ValueError(
            f"tensor: expected a dtype of at most 32 bits a number, got {name}, which JAX narrows in a copy unless "
            f'64 bits are enabled: jax.config.update("jax_enable_x64", True), or convert the tensor first'
        )
    try:
        array = jax.dlpack.from_dlpack(tensor)
    except (jax.errors.JaxRuntimeError, TypeError) as error:
        raise ValueError(f"tensor: expected a dtype that JAX has, got {name}: {error}") from error
    if array.size and array.unsafe_buffer_pointer() != tensor.data_ptr():
        raise ValueError(
            f"tensor: expected memory aligned to 64 bytes, got address {tensor.data_ptr():#x}: JAX copies it"
        )
    return array


def to_torch(array: Any) -> Any:
    """Return a ``torch.Tensor`` over the memory of a ``jax.Array``, without a copy.

    Args:
        array: a ``jax.Array`` on one CPU or CUDA device, not a tracer and not deleted; of a QuantizedState, its two
            arrays one by one.

    Returns:
        A tensor of the same shape, dtype, device and address. Write to it only while JAX computes nothing
        with the array.

    Raises:
        TypeError: ``array`` is not a JAX array.
        BackendNotAvailableError: Torch is not installed.
        ValueError: it was deleted (donated), is being traced, or lies on several devices.

    Lifetime: the tensor keeps the array's memory alive until the tensor and every view of it are collected *on the
    host*. If the array is gone by then, XLA's allocator may hand the memory out again, even while a kernel that reads
    it waits on a Torch stream: drop the tensor, then give the array to ``after_torch``, then let the array go.
    While the tensor lives, JAX does not donate the array: ``update`` gives such a state new memory. Streams: Torch's
    current stream waits for the array to be computed; a later JAX computation does not wait for Torch, but
    ``after_torch`` makes it.
    """
    _require_concrete("array", array)
    try:
        import torch.utils.dlpack
    except ImportError:
        raise BackendNotAvailableError("Torch is not installed: pip install torch") from None
    return torch.utils.dlpack.from_dlpack(array)


def after_torch(state: Any) -> Any:
    """Return a state for JAX to use again, after Torch changed it through a view that is dropped.

    On a GPU what JAX computes with the result waits for all that Torch's current stream has been given so far: by an
    event, on the GPU; the host does not wait. On a CPU Torch has done its work already.

    Args:
        state: a ``jax.Array`` on one CPU or CUDA device, or a QuantizedState of two. On a GPU it is given up (deleted),
            as by a step that donates it, so use the result alone. Where it is one shard (``shard.data``) of an array on
            several devices, that array is gone, too.

    Returns:
        The state in the same memory.

    Raises:
        TypeError: ``state`` is neither.
        ValueError: it was deleted (donated), lies on several devices or on one of another kind, or is being traced. On
            a GPU also: a Torch view of it lives still, JAX traces, or Torch's current stream is captured in a graph.
        BackendNotAvailableError: on a GPU, jax-tvm-ffi is not installed.
        RuntimeError: the CUDA driver failed, or XLA's table of targets is full.
    """
    pair = isinstance(state, QuantizedState)
    given = state._asdict() if pair else {"state": state}
    for name, array in given.items():
        _require_concrete(f"state.{name}" if pair else name, array)
    arrays = tuple(given.values())
    device, *others = {device for array in arrays for device in array.devices()}
    if others:
        raise ValueError(f"state: expected values and scale on one device, got {device} and {others[0]}")
    torch = sys.modules.get("torch")
    if device.platform == "cpu" or torch is None or not torch.cuda.is_initialized():  # Torch has done nothing there
        return state
    if reason := missing_jax_ffi("jax"):
        raise BackendNotAvailableError(f"after_torch: {reason}")
    from ssu_bridge.frontends.jax import metadata, stream_wait

    if (platform := metadata.platform_of(device)[0]) != "cuda":
        raise ValueError(f"state: expected a CPU or CUDA device, got one of {platform}")
    after = stream_wait.after_torch(arrays, device)
    return QuantizedState(*after) if pair else after[0]


def _require_concrete(name: str, array: Any) -> None:
    jax = sys.modules.get("jax")
    if jax is None or not isinstance(array, jax.Array):
        raise TypeError(f"{name}: expected a jax.Array, got {type(array).__name__}")
    if isinstance(array, jax.core.Tracer):
        raise ValueError(f"{name}: expected a concrete array, got a tracer; hand arrays across outside of jit")
    if array.is_deleted():
        raise ValueError(f"{name}: expected a live array, got one that was deleted (donated to an earlier call)")
    if len(array.devices()) != 1:
        raise ValueError(f"{name}: expected one device, got {len(array.devices())}; hand its shards across one by one")
