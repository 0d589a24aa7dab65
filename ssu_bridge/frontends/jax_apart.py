"""Keeping XLA:CPU from copying an array that is reshaped before or after a call that writes in place."""

from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from ssu_bridge.frontends.jax_targets import register_function
from ssu_bridge.library import library

# XLA copies what such a call writes to, and later takes away the copies that nothing needs; and for a reshaped array it
# chooses a layout, which it then copies to the one that a call or a result has to have. XLA:CPU has by then made one
# operation of a reshape and a copy, and leaves that. Between them this is put: on a CPU a call that does nothing, for
# which any layout will do.
_apart = Primitive("ssu_bridge_apart")
_TARGET = "ssu_bridge.same_memory"


def apart(array: Any) -> Any:
    """Return the same array, in the same memory, of which XLA does not know what it is a reshape of, or for what."""
    return _apart.bind(array)  # type: ignore[no-untyped-call]


@_apart.def_abstract_eval  # type: ignore[untyped-decorator]
def _type(array: Any) -> Any:
    return array


def _call(ctx: Any, array: Any) -> Any:
    if ctx.module_context.lowering_parameters.for_export:  # to a process that has no calls but kernels
        return [array]
    register_function(_TARGET, library().same_memory(), "cpu", in_graphs=False)
    lowering = jax.ffi.ffi_lowering(
        _TARGET, operand_output_aliases={0: 0}, result_types=[array.type], skip_ffi_layout_processing=True
    )
    return lowering(ctx, array)


def _map(operands: Any, axes: Any) -> tuple[Any, int]:
    return apart(*operands), axes[0]


mlir.register_lowering(_apart, lambda _, array: [array])
mlir.register_lowering(_apart, _call, platform="cpu")
batching.primitive_batchers[_apart] = _map
