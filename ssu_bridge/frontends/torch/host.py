"""Copies between tensors and NumPy arrays, of the dtypes that NumPy lacks too."""

import numpy as np
import torch

from ssu_bridge.frontends.torch.metadata import dtype_name

# Dtypes that Torch and NumPy do not hand each other, and those of the same size that they do.
_BITS = {"bfloat16": torch.int16, "float8_e4m3fn": torch.int8}


def to_host(tensor: torch.Tensor) -> np.ndarray:
    """Return a NumPy copy."""
    host = tensor.detach().to("cpu", copy=True)
    name = dtype_name(host.dtype)
    return host.view(_BITS[name]).numpy().view(name) if name in _BITS else host.numpy()


def from_host(array: np.ndarray, like: torch.Tensor | None = None) -> torch.Tensor:
    """Return a tensor with a copy of the values."""
    copy, name = np.array(array), array.dtype.name
    if name in _BITS:
        host = torch.from_numpy(copy.view(f"i{copy.itemsize}")).view(getattr(torch, name))
    else:
        host = torch.from_numpy(copy)
    return host if like is None else host.to(like.device)
