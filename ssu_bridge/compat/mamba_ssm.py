"""``mamba_ssm.ops.triton.selective_state_update``, the function of state-spaces/mamba."""

from typing import Any

import torch

from ssu_bridge.compat._translate import repeated, step, with_heads
from ssu_bridge.frontends import dynamo
from ssu_bridge.frontends.torch import transforms


def selective_state_update(
    state: Any,
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    dt_bias: Any = None,
    dt_softplus: bool = False,
    state_batch_indices: Any = None,
) -> Any:
    """Advance states by one token in place, and return the output.

    Args:
        state: (batch, dim, dstate) or (batch, nheads, dim, dstate); with indices, slots in place of batch.
        x, dt, z: (batch, dim) or (batch, nheads, dim).
        A: (dim, dstate) or (nheads, dim, dstate).
        B, C: (batch, dstate) or (batch, ngroups, dstate).
        D, dt_bias: (dim,) or (nheads, dim).
        dt_softplus: apply softplus to dt + dt_bias.
        state_batch_indices: (batch,), the slot of each sequence. For a negative one nothing is stored, and the output
            is zero.

    Returns:
        The output, of the shape of ``x``; without an axis of heads if the state has none.

    Raises:
        ValueError, TypeError, UnsupportedError: as ``ssu_bridge.update``.
    """
    key = ("mamba_ssm", dt_softplus, type(dt_softplus))
    raw = (state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, None)
    out = repeated(key, raw, None)
    if out is None:
        if state_batch_indices is not None and getattr(state_batch_indices, "ndim", 1) != 1:
            came = tuple(state_batch_indices.shape)
            raise ValueError(f"state_batch_indices: expected one axis, (batch,), got shape {came}")
        given = {"state": state, "x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
        out = step(with_heads(given), key, raw, dt_softplus=dt_softplus, state_batch_indices=state_batch_indices)
    if state_batch_indices is not None and _may_have_pads(state_batch_indices):
        out.masked_fill_((state_batch_indices < 0)[:, None, None], 0)
    return out if state.ndim > 3 else out.squeeze(1)


def _may_have_pads(indices: torch.Tensor) -> bool:
    """Look for a negative index where that costs less than to clear outputs: on a CPU, where nothing is recorded."""
    if not indices.is_cpu or dynamo.tracing() or transforms.in_force():
        return True
    return bool(indices.numel()) and int(indices.min()) < 0
