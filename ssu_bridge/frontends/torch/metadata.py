"""The metadata of tensors, and the Problem that is made of it."""

import operator
from typing import NamedTuple

import torch

from ssu_bridge.core.arguments import ARGUMENTS, VECTOR_BYTES
from ssu_bridge.core.arrays import ArrayInfo
from ssu_bridge.core.problem import Options, Problem
from ssu_bridge.core.validate import describe
from ssu_bridge.frontends.base import Arrays, require_one_framework

# A subclass may hold no memory of its own, as a FakeTensor does.
PLAIN_TYPES = frozenset((torch.Tensor, torch.nn.Parameter, torch.nn.Buffer))

_NAMES = ("out", *ARGUMENTS)


class TensorInfo(NamedTuple):
    """One tensor of a call.

    Attributes:
        offset: on a GPU, how far its address is from a multiple of VECTOR_BYTES; elsewhere 0.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...]
    device: torch.device
    offset: int


# Those of a call, out first and then in the order of ARGUMENTS; None for one that was not given.
Key = tuple[TensorInfo | None, ...]


def key_of(arrays: Arrays, out: torch.Tensor | None) -> Key:
    """Return the metadata that the check of a call reads.

    Raises:
        TypeError, ValueError: an argument is no tensor whose memory a kernel can use; the message names it.
    """
    given = (out, *arrays)
    if not all(array is None or isinstance(array, torch.Tensor) for array in given):
        require_one_framework(arrays, out)
    return tuple([None if a is None else _info(name, a) for name, a in zip(_NAMES, given, strict=False)])


def traced_key_of(arrays: Arrays, out: torch.Tensor | None) -> Key:
    """Return the metadata of tensors that a tracer passes: they may have no memory, and symbolic sizes."""
    return tuple([None if a is None else _traced_info(a) for a in (out, *arrays)])


def problem_of(key: Key, options: Options) -> Problem:
    """Check a call and return its Problem.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """
    given = {name: info for name, info in zip(_NAMES, key, strict=False) if info is not None}
    infos = {
        name: ArrayInfo(
            tuple(info.shape), dtype_name(info.dtype), info.strides, str(info.device), True, not info.offset
        )
        for name, info in given.items()
    }
    device = given["state"].device
    if device.type == "meta":
        raise ValueError("state: expected a tensor that has memory, got one on the meta device")
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return describe(infos, options, framework="torch", platform=device.type, capability=capability)


def require_memory(name: str, tensor: torch.Tensor) -> None:
    """Check that a tensor is its memory: no other kind of tensor, nothing lazy, nothing that a transform wraps.

    Raises:
        TypeError: a subclass.
        ValueError: anything else.
    """
    if type(tensor) not in PLAIN_TYPES:
        kind = type(tensor).__name__
        raise TypeError(f"{name}: expected a plain torch.Tensor, whose memory a kernel can use, got {kind}")
    if tensor.is_nested or tensor.layout != torch.strided:
        layout = "of a nested tensor" if tensor.is_nested else str(tensor.layout)
        raise ValueError(f"{name}: expected a strided tensor, got layout {layout}")
    if tensor.is_neg():
        raise ValueError(f"{name}: expected a tensor that holds its values, got a lazy negation; use resolve_neg()")
    if tensor.is_conj():
        raise ValueError(f"{name}: expected a tensor that holds its values, got a lazy conjugate; use resolve_conj()")
    if tensor.is_meta:
        return  # the check of devices says more
    try:
        address = tensor.data_ptr()
    except RuntimeError as error:  # a wrapper of functorch or of functionalization
        raise ValueError(f"{name}: expected a tensor that has memory, got one without: {error}") from None
    if not address and tensor.numel():
        raise ValueError(f"{name}: expected a tensor that has memory, got one without (it was freed, or never there)")


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name that NumPy has for a dtype."""
    return str(dtype).removeprefix("torch.")


def _info(name: str, tensor: torch.Tensor) -> TensorInfo:
    require_memory(name, tensor)
    offset = tensor.data_ptr() % VECTOR_BYTES if tensor.is_cuda else 0
    return TensorInfo(tensor.shape, tensor.dtype, tensor.stride(), tensor.device, offset)


def _traced_info(tensor: torch.Tensor) -> TensorInfo:
    shape, strides = tuple(map(operator.index, tensor.shape)), tuple(map(operator.index, tensor.stride()))
    return TensorInfo(shape, tensor.dtype, strides, tensor.device, 0)
