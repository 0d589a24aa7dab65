"""What the drop-ins share: missing axes, copies of what ``update`` does not accept, and repeated calls."""

import warnings
from typing import Any

import torch

from ssu_bridge.api import update
from ssu_bridge.config import get_config
from ssu_bridge.core.arguments import ARGUMENTS, FLOAT_ARRAYS, FLOATS, RINGS, TIED_AXES
from ssu_bridge.core.arrays import is_dense
from ssu_bridge.core.bounded import Bounded
from ssu_bridge.core.problem import options_of
from ssu_bridge.core.quantized import paired
from ssu_bridge.frontends import dynamo
from ssu_bridge.frontends.torch.frontend import Launcher

# The axes of the float arrays in a call of one token for each sequence, all heads and groups spelt out.
_AXES = {name: ARGUMENTS[name].shapes[0] for name in (*FLOAT_ARRAYS, *RINGS)}
# By all arguments of a drop-in that are no arrays, and the configuration in force.
_launchers: Bounded[tuple[Any, ...], Launcher] = Bounded(64)
_FLOATS = {getattr(torch, name) for name in FLOATS}


def with_heads(arguments: dict[str, Any]) -> dict[str, Any]:
    """Give arguments of Mamba-1, and B and C of one group, the axis of heads or groups that they lack."""
    result = dict(arguments)
    for name, tensor in arguments.items():
        axes = _AXES.get(name, "")
        if tensor is not None and tensor.ndim == len(axes) - 1:
            result[name] = tensor.unsqueeze(axes.index("G" if "G" in axes else "H"))
    return result


def repeated(key: tuple[Any, ...], raw: tuple[Any, ...], out: Any) -> Any:
    """Run a call again that looks like one that :func:`step` passed on as it came, and return its output.

    Args:
        key: all arguments that are no arrays, and whose they are.
        raw: the arrays as they came, in the order of ``ARGUMENTS``.
        out: where to put the output, or None.

    Returns:
        None if there was no such call; then nothing was done.
    """
    if dynamo.tracing():
        return None
    try:
        launcher = _launchers.get((*key, get_config()))
    except TypeError:  # a flag that is not hashable and so is no flag
        return None
    results = None if launcher is None else launcher.repeated.run(raw, out)
    return None if results is None else results[0]


def step(arrays: dict[str, Any], key: tuple[Any, ...] = (), raw: tuple[Any, ...] = (), **rest: Any) -> Any:
    """Call ``update`` and return the output, wherever float arrays lie in memory and whatever float the output is.

    Arrays that ``update`` would not accept are copied, and what it wrote to a copy is copied back. With ``key`` and
    ``raw``, :func:`repeated` finds the call again if nothing had to be translated.
    """
    written = ("out",) if rest.get("disable_state_update") else ("out", "state", *RINGS)
    given = {name: _acceptable(name, tensor, name in written) for name, tensor in arrays.items()}
    for name in ("state", *RINGS):
        if given.get(name) is not arrays.get(name):
            warnings.warn(
                f"{name}: copied as a whole, because the trailing axes of the slots are not dense in memory "
                f"(strides {tuple(arrays[name].stride())})",
                RuntimeWarning,
                stacklevel=3,
            )
    x, out = given["x"], given.get("out")
    if out is not None and x.dtype != out.dtype and {x.dtype, out.dtype} <= _FLOATS:
        given["x"], given["out"] = x.float(), out.float()
    as_they_came = given.get("out") is arrays.get("out") and _is_as_it_came({**given, **rest}, raw)
    if raw and as_they_came and not dynamo.tracing():
        return _launcher(key, rest)(raw, out)[0]
    result = update(**paired(given), **rest)[0]
    for name in written:
        if given.get(name) is not arrays.get(name):
            arrays[name].copy_(given[name])
    return result if out is None else arrays["out"]


def _is_as_it_came(given: dict[str, Any], raw: tuple[Any, ...]) -> bool:
    named = dict(zip(ARGUMENTS, raw, strict=False))
    return all(given.get(name) is named.get(name) for name in ARGUMENTS if name != "out")


def _launcher(key: tuple[Any, ...], flags: dict[str, Any]) -> Launcher:
    """Return the drop-in's own launcher for calls with these flags: it knows only calls that passed its checks."""
    config = get_config()
    launcher = _launchers.get((*key, config))
    if launcher is None:
        given = {"pad_slot_id": -1, "disable_state_update": False, "algorithm": None, **flags}
        update_flags = (given["dt_softplus"], given["pad_slot_id"], given["disable_state_update"])
        launcher = Launcher(options_of(*update_flags, True, False, 1, None, given["algorithm"], None, config))
        _launchers[(*key, config)] = launcher
    return launcher


def sequences_of(x: Any, cu_seqlens: Any) -> int:
    """Return the number of sequences; 0 where the array that tells it has no axes, which ``update`` refuses."""
    if cu_seqlens is None:
        return x.shape[0] if x.ndim else 0
    return cu_seqlens.shape[0] - 1 if cu_seqlens.ndim else 0


def rows(table: Any, sequences: int) -> Any:
    """Return the rows of a table that belong to sequences, without those to spare."""
    return table if table is None or table.ndim == 0 or table.shape[0] <= sequences else table[:sequences]


def _acceptable(name: str, tensor: Any, is_written: bool) -> Any:
    """Return a tensor, or a dense copy if ``update`` allows no such gaps and what it writes can be copied back."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_nested:
        return tensor
    if not _has_gaps(name, tensor) or (is_written and _may_overlap_itself(tensor)):
        return tensor
    return tensor.contiguous()


def _may_overlap_itself(tensor: torch.Tensor) -> bool:
    """Return whether two elements may have one address; then a copy could not be copied back."""
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < extent:
            return True
        extent += (size - 1) * stride
    return False


def _has_gaps(name: str, tensor: Any) -> bool:
    if tensor.is_contiguous():
        return False
    shape, strides = tuple(tensor.shape), tensor.stride()
    if name in _AXES:
        inner = len(_AXES[name].lstrip(ARGUMENTS[name].free))
        shape, strides = shape[-inner:], strides[-inner:]
    repeated = TIED_AXES.get(name, 0)
    trailing = zip(shape[-repeated:], strides[-repeated:], strict=True)
    if repeated and not any(size > 1 and stride for size, stride in trailing):  # one number a head
        shape, strides = shape[:-repeated], strides[:-repeated]
    return not is_dense(shape, strides)
