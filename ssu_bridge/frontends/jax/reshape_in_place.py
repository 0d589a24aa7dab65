"""Reshapes of what a call writes in place, without a copy by XLA:CPU.

XLA copies what such a call writes to, and later takes away the copies that nothing needs; and for a reshaped array it
chooses a layout, which it copies to the one that a call or a result has to have. XLA:CPU has by then made one operation
of a reshape and a copy, and leaves that. So a call that does nothing is put between them, for which any layout will do.
"""

from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from ssu_bridge.backends.base import missing_jax_ffi
from ssu_bridge.frontends.jax.ffi_targets import register_function
from ssu_bridge.native import library

_apart = Primitive("ssu_bridge_apart")
_TARGET = "ssu_bridge.same_memory"


def reshaped_before(array: Any, shape: tuple[Any, ...]) -> Any:
    """Reshape an array for the call that writes to it."""
    return _apart.bind(array.reshape(shape))  # type: ignore[no-untyped-call]


def reshaped_after(array: Any, shape: tuple[Any, ...]) -> Any:
    """Reshape what a call has written to; flat in between, where there is no layout to choose for an axis of size 1."""
    return _apart.bind(array.reshape(-1)).reshape(shape)  # type: ignore[no-untyped-call]


def register() -> None:
    """Register that call."""
    register_function(_TARGET, library().same_memory(), "cpu", in_graphs=False)


@_apart.def_abstract_eval  # type: ignore[untyped-decorator]
def _type(array: Any) -> Any:
    return array


def _call(ctx: Any, array: Any) -> Any:
    # Programs are exported to processes that have no calls but kernels.
    if ctx.module_context.lowering_parameters.for_export or missing_jax_ffi("jax"):
        return [array]
    register()
    lowering = jax.ffi.ffi_lowering(
        _TARGET, operand_output_aliases={0: 0}, result_types=[array.type], skip_ffi_layout_processing=True
    )
    return lowering(ctx, array)


def _map(operands: Any, axes: Any) -> tuple[Any, int]:
    """Leave it to the outermost jax.vmap, which reshapes last before the call, and first after it."""
    return operands[0], axes[0]


mlir.register_lowering(_apart, lambda _, array: [array])
mlir.register_lowering(_apart, _call, platform="cpu")
batching.primitive_batchers[_apart] = _map
