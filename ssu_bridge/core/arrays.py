"""Arrays of any framework: which framework they belong to, and their metadata.

Nothing here imports a framework: an array of one can only arrive where that framework has been imported already.
"""

import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class ArrayInfo(NamedTuple):
    """The metadata of one array that a Problem is made from.

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


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether axes of these sizes and strides, in elements, leave no gaps and are in row-major order."""
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != step:
            return False
        step *= size
    return True


def framework_of(array: object) -> str | None:
    """Return "jax", "torch" or "numpy" for an array of one, None for anything else.

    JAX's are tracers, references and what has ``__jax_array__`` too, as the variables of flax have.
    """
    if isinstance(array, np.ndarray):
        # Neither is what kernels and JAX take it for: a mask would be ignored, a matrix has axes of its own mind.
        return None if isinstance(array, np.ma.MaskedArray | np.matrix) else "numpy"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return "torch"
    jax = sys.modules.get("jax")
    if jax is not None and (isinstance(array, jax.Array | jax.Ref) or hasattr(type(array), "__jax_array__")):
        return "jax"
    return None
