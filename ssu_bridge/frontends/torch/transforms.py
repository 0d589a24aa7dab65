"""Torch's transforms and modes: which of them are in force, and the errors for the unsupported ones."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import TransformType, peek_interpreter_stack
from torch.autograd import forward_ad

from ssu_bridge.core.arguments import ARGUMENTS, FLOATS
from ssu_bridge.errors import UnsupportedError

# The result is no function of these for autograd; of A, D and dt_bias neither, but models keep those as Parameters.
NO_GRAD = tuple(name for name in ARGUMENTS if name not in ("A", "D", "dt_bias") and ARGUMENTS[name].dtypes[0] in FLOATS)

_NO_DERIVATIVE = "it has no derivative in Torch; call it outside of the transform"
_REFUSED = {
    TransformType.Vmap: ("torch.func.vmap", "pass all sequences in one call, along the batch axis that it has"),
    TransformType.Grad: ("torch.func.grad", _NO_DERIVATIVE),
    TransformType.Jvp: ("torch.func.jvp", _NO_DERIVATIVE),
    TransformType.Functionalize: ("torch.func.functionalize", "use torch.export or make_fx, which record it"),
}


def in_force() -> bool:
    """Return whether anything sees the operations of this thread that a kernel launched directly would escape."""
    return (
        forward_ad._current_level >= 0
        or _len_torch_dispatch_stack() > 0
        or peek_interpreter_stack() is not None
        or _get_tracing_state() is not None
    )


def recording() -> bool:
    """Return whether a dispatch mode (``make_fx``, fake tensors, a user's own) or ``torch.jit.trace`` is in force.

    They see operators alone, so a step has to be one.
    """
    return _len_torch_dispatch_stack() > 0 or _get_tracing_state() is not None


def functorch_refusal() -> str | None:
    """Return the error message for the transform of ``torch.func`` that is in force, or None."""
    interpreter: Any = peek_interpreter_stack()
    if interpreter is None:
        return None
    name, remedy = _REFUSED[interpreter.key()]
    return f"{name}, or a transform that is made of it, cannot be applied to update: {remedy}"


# Dynamo calls it while it traces, when the transforms of the function that it traces are in force.
functorch_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


def require_supported(given: Mapping[str, torch.Tensor]) -> None:
    """Check that no transform is in force that a step would be wrong under.

    Raises:
        UnsupportedError: one is; the message names it.
    """
    if refusal := functorch_refusal():
        raise UnsupportedError(refusal)
    if forward_ad._current_level < 0:
        return
    for name, tensor in given.items():
        if _tangent(tensor) is not None:
            raise UnsupportedError(
                f"{name}: it has a tangent of forward-mode AD (torch.autograd.forward_ad), and {_NO_DERIVATIVE}, "
                "or pass forward_ad.unpack_dual(tensor).primal"
            )


def require_no_grad(given: Mapping[str, torch.Tensor], backend: Callable[[], object]) -> None:
    """Check that no gradient would be lost; ``backend`` returns the one that the error is to name.

    Raises:
        UnsupportedError: naming the argument and the backend.
    """
    if not torch.is_grad_enabled():
        return
    for name, tensor in given.items():
        if name in NO_GRAD and tensor.requires_grad:
            raise UnsupportedError(
                f"{name}: it requires grad, but backend {backend()} has no gradient for Torch; use torch.no_grad()"
            )


def _tangent(tensor: Any) -> torch.Tensor | None:
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        return None  # the check of the call refuses it
    return forward_ad.unpack_dual(tensor).tangent  # type: ignore[no-untyped-call, no-any-return]
