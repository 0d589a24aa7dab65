"""vLLM's ``vllm.model_executor.layers.mamba.ops.mamba_ssm.selective_state_update``, the function over Triton."""

import contextlib
from typing import Any

from ssu_bridge.compat._translate import repeated, rows, sequences_of, step, with_heads
from ssu_bridge.config import using
from ssu_bridge.core.arguments import ROUNDABLE

NULL_BLOCK_ID = 0


def selective_state_update(
    state: Any,
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    dt_bias: Any,
    z: Any = None,
    dt_softplus: bool = False,
    state_batch_indices: Any = None,
    dst_state_batch_indices: Any = None,
    null_block_id: int = NULL_BLOCK_ID,
    out: Any = None,
    num_accepted_tokens: Any = None,
    cu_seqlens: Any = None,
    is_blackwell: bool = False,
    enable_stochastic_rounding: bool = False,
    cache_philox_rounds: int = 0,
    *,
    pad_slot_id: int | None = None,
) -> None:
    """Advance states in place, and write the output to ``out``.

    Args:
        state: (slots, dim, dstate) or (slots, nheads, dim, dstate).
        x, dt, z, out: (batch, dim) or (batch, nheads, dim); with ``cu_seqlens``, rows of tokens in place of batch.
        A: (dim, dstate) or (nheads, dim, dstate).
        B, C: (batch, dstate) or (batch, ngroups, dstate).
        D, dt_bias: (dim,) or (nheads, dim); None for none.
        dt_softplus: apply softplus to dt + dt_bias.
        state_batch_indices: (N,) or (N, tokens), the slots to start from: the first column, or with
            ``num_accepted_tokens`` column max(accepted - 1, 0). It may have rows to spare.
        dst_state_batch_indices: as ``state_batch_indices``, which it is if it is None. Without ``num_accepted_tokens``
            the last state of a sequence goes to the first column; with them the state after each token to its column.
        null_block_id: the index that stands for no slot: the sequence starts from zeros, and nothing is stored.
        num_accepted_tokens: (N,). It may have rows to spare.
        cu_seqlens: (N + 1,), where the sequences begin and end among the rows.
        is_blackwell: ignored.
        enable_stochastic_rounding: round the state stochastically, with a seed drawn in each call; as in vLLM not with
            ``num_accepted_tokens``. The numbers drawn are not vLLM's.
        cache_philox_rounds: of the random generator; 0 means 10.
        pad_slot_id: the name that ``null_block_id`` had in older versions.

    Raises:
        ValueError, TypeError, UnsupportedError: as ``ssu_bridge.update``; TypeError also without ``out``.
    """
    if out is None:
        raise TypeError("out: expected a tensor of x's shape, got None")
    null = null_block_id if pad_slot_id is None else pad_slot_id
    key = ("vllm", dt_softplus, type(dt_softplus), null, type(null))
    raw: tuple[Any, ...] = (state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, dst_state_batch_indices)
    if num_accepted_tokens is not None and dst_state_batch_indices is None:
        raw = (*raw[:-1], state_batch_indices)
    if not num_accepted_tokens is cu_seqlens is None:
        raw = (*raw, num_accepted_tokens, cu_seqlens)
    if not enable_stochastic_rounding and repeated(key, raw, out) is not None:
        return
    arrays = {"state": state, "x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias, "out": out}
    sequences = sequences_of(x, cu_seqlens)
    read, write = rows(state_batch_indices, sequences), rows(dst_state_batch_indices, sequences)
    if num_accepted_tokens is None:
        read, write = _first_column(read), _first_column(write)
    else:
        read, write = _with_columns(read), _with_columns(read if write is None else write)
    config: dict[str, Any] = {}
    if enable_stochastic_rounding and num_accepted_tokens is None:
        _require_roundable(state)
        config = {"stochastic_rounding": True, "philox_rounds": cache_philox_rounds}
    with using(**config) if config else contextlib.nullcontext():
        step(
            with_heads(arrays),
            key,
            () if enable_stochastic_rounding else raw,
            state_batch_indices=read,
            dst_state_batch_indices=write,
            dt_softplus=dt_softplus,
            pad_slot_id=null,
            num_accepted_tokens=rows(num_accepted_tokens, sequences),
            cu_seqlens=cu_seqlens,
        )


def _require_roundable(state: Any) -> None:
    name = str(getattr(state, "dtype", "")).removeprefix("torch.")
    if name not in ROUNDABLE:
        raise ValueError(
            f"enable_stochastic_rounding: expected False for a {name} state, which is not rounded stochastically "
            f"({', '.join(ROUNDABLE)} are), got True"
        )


def _first_column(table: Any) -> Any:
    return table if table is None or table.ndim != 2 else table[:, 0]


def _with_columns(table: Any) -> Any:
    return table if table is None or table.ndim != 1 else table[:, None]
