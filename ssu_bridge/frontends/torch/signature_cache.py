"""Repeated calls, found by their signature in native code, without reading each tensor's metadata in Python."""

import functools
import operator
from itertools import compress, filterfalse
from typing import Any

import torch
from torch._C import _increment_version

from ssu_bridge.core.arguments import ARGUMENTS, STATE, VECTOR_BYTES, WRITTEN
from ssu_bridge.core.problem import Options
from ssu_bridge.frontends.base import SEED, Arrays, named, returned
from ssu_bridge.frontends.torch import transforms
from ssu_bridge.frontends.torch.metadata import PLAIN_TYPES
from ssu_bridge.frontends.torch.seeds import draw
from ssu_bridge.native import library

_NAMES = [name for name in ARGUMENTS if name != "out"]
# Calls with no more arguments than this write nothing but the output and the state.
_WRITTEN_NEXT = _NAMES.index("intermediate_states")
# Of the output and the arguments, those whose gradient would be lost.
_NO_GRAD = [name in transforms.NO_GRAD for name in ("out", *_NAMES)]
# Kernels of one launcher: sizes that vary without end must not fill the memory.
_LIMIT = 1024

# In C, as is everything that reads each tensor of a repeated call.
_is_neg = torch.Tensor.is_neg
_requires_grad = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_is_none = functools.partial(operator.is_, None)


class SignatureCache:
    """The kernels of calls with the same options, by what their tensors look like.

    A signature holds shapes, dtypes, strides, devices and which arguments are there; the native library compares it,
    at a fraction of what it costs in Python. What the library does not see of a tensor is read in every call.
    """

    def __init__(self, options: Options):
        kept = STATE if options.disable_state_update else ()
        self._written = [place for place, name in enumerate(_NAMES) if name in WRITTEN and name not in kept]
        self._writes_state = 0 in self._written
        self._run = self._knows = _never_found
        self._add: Any = None

    def run(self, arrays: Arrays, out: torch.Tensor | None, draws: bool = False) -> tuple[Any, ...] | None:
        """Run a call whose signature is known and return its results; else return None and do nothing.

        With ``draws`` its seed is drawn first.
        """
        given = [*filterfalse(_is_none, (out, *arrays))]
        if not PLAIN_TYPES.issuperset(map(type, given)) or any(map(_is_neg, given)) or transforms.in_force():
            return None
        lose_grad = filterfalse(_is_none, compress((out, *arrays), _NO_GRAD))
        if torch.is_grad_enabled() and any(map(_requires_grad, lose_grad)):
            return None
        state, x = arrays[0], arrays[1]
        if x is None:
            return None
        result = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
        if draws:
            if not self._knows(result, *arrays):
                return None
            draw(arrays[SEED])
        if not self._run(result, *arrays):
            return None
        if len(arrays) <= _WRITTEN_NEXT and self._writes_state:
            _increment_version((result, state))
            return result, state
        written = [a for place in self._written if place < len(arrays) and (a := arrays[place]) is not None]
        tell_autograd(result, *written)
        return returned(named(arrays, result))

    def add(self, kernel: Any, arrays: Arrays, out: torch.Tensor) -> None:
        """Keep a kernel function for calls that look like this one, which was checked."""
        if self._add is None:
            self._run, self._add, self._knows = library().signature_cache(
                [place + 1 for place in self._written], _LIMIT, VECTOR_BYTES
            )
        self._add(kernel, out, *arrays)


def _never_found(*arguments: Any) -> bool:
    return False


def tell_autograd(*written: torch.Tensor) -> None:
    """Tell autograd of writes that it did not see, or it would use a saved tensor that has changed."""
    _increment_version(written)
