"""FlashInfer's ``flashinfer.mamba.selective_state_update`` and ``checkpointing_ssu``."""

import contextlib
from typing import Any

import torch

from ssu_bridge.backends.flashinfer.backend import ALIKE
from ssu_bridge.compat._translate import repeated, rows, sequences_of, step, with_heads
from ssu_bridge.config import using
from ssu_bridge.core.arguments import TOKENWISE
from ssu_bridge.core.quantized import QuantizedState
from ssu_bridge.core.replay import ReplayCursor

_CHECKPOINTING_ALGORITHMS = ("auto", "monolith", "two-kernel")


def selective_state_update(
    state: Any,
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    z: Any = None,
    dt_bias: Any = None,
    dt_softplus: bool = False,
    state_batch_indices: Any = None,
    pad_slot_id: int = -1,
    state_scale: Any = None,
    out: Any = None,
    disable_state_update: bool = False,
    intermediate_states_buffer: Any = None,
    intermediate_state_indices: Any = None,
    intermediate_state_scales: Any = None,
    rand_seed: Any = None,
    philox_rounds: int = 10,
    cache_steps: int = 0,
    algorithm: str = "auto",
    dst_state_batch_indices: Any = None,
    cu_seqlens: Any = None,
    num_accepted_tokens: Any = None,
    backend: str = "auto",
) -> Any:
    """Advance states in place, by one token or several, and return the output.

    Several tokens are meant by ``cu_seqlens`` with x of three axes, by x of four axes, or by ``cache_steps``. A call of
    one token ignores ``num_accepted_tokens`` and the intermediate states.

    Args:
        state: (slots, dim, dstate) or (slots, nheads, dim, dstate).
        x, dt, z: (batch, dim), (batch, nheads, dim), (batch, tokens, nheads, dim), or with ``cu_seqlens``
            (rows, nheads, dim).
        A: (dim, dstate) or (nheads, dim, dstate).
        B, C: as x, with (ngroups, dstate) for (nheads, dim).
        D, dt_bias: (dim,) or (nheads, dim).
        dt_softplus: apply softplus to dt + dt_bias.
        state_batch_indices: (batch,) or (batch, tokens), as in ``update``. It may have rows to spare.
        pad_slot_id: the index that stands for no slot.
        state_scale: (slots, nheads, dim) or (slots, nheads, dim, 1), for a quantised state.
        out: where to put the output, of the shape that is returned.
        disable_state_update: read the state and leave it, unless ``dst_state_batch_indices`` are given.
        intermediate_states_buffer: (entries, steps, nheads, dim, dstate).
        intermediate_state_indices: (batch,).
        intermediate_state_scales: (entries, steps, nheads, dim).
        rand_seed: one int64 in a tensor, for stochastic rounding; not with ``state_scale``. The numbers drawn are not
            FlashInfer's.
        philox_rounds: of the random generator.
        cache_steps: how many tokens; 0 for one.
        algorithm: auto, simple, vertical or horizontal (or async_horizontal, which is simple).
        dst_state_batch_indices: (batch,) or (batch, tokens), as in ``update``. It may have rows to spare.
        cu_seqlens: as in ``update``.
        num_accepted_tokens: as in ``update``, also with a ``state_batch_indices`` of one axis. It may have rows to
            spare.
        backend: auto, flashinfer or cake: ignored, this package's configuration decides.

    Returns:
        ``out``, or a new tensor of the shape of x with all axes, that of heads and that of tokens too.

    Raises:
        ValueError, TypeError, UnsupportedError: as ``ssu_bridge.update``. ValueError also where FlashInfer requires
            one dtype: B, C, z and out as x, D and dt_bias as dt, intermediate states as the state, and the tables as
            ``state_batch_indices``.
    """
    if backend not in ("auto", "flashinfer", "cake"):
        raise ValueError(f"backend: expected auto, flashinfer or cake, got {backend!r}")
    disabled = disable_state_update and dst_state_batch_indices is None
    key = ("flashinfer", dt_softplus, type(dt_softplus), pad_slot_id, type(pad_slot_id), disabled, algorithm)
    raw: tuple[Any, ...] = ()
    rare = (cu_seqlens, state_scale, intermediate_states_buffer, num_accepted_tokens, rand_seed)
    if cache_steps == 0 and all(argument is None for argument in rare):
        raw = (state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, dst_state_batch_indices)
        if (result := repeated(key, raw, out)) is not None:
            return result
    packed = cu_seqlens is not None and x.ndim == 3
    several = not packed and (cache_steps >= 1 or x.ndim == 4)
    arrays = {"state": state, "x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    tables = {"state_batch_indices": state_batch_indices, "dst_state_batch_indices": dst_state_batch_indices}
    _require_alike({**arrays, **tables, "out": out})
    arrays = with_heads(arrays)
    if several:
        arrays |= {n: t.unsqueeze(1) for n in TOKENWISE if (t := arrays.get(n)) is not None and t.ndim == 3}
    sequences = sequences_of(x, cu_seqlens if packed else None)
    slots = {name: rows(table, sequences) for name, table in tables.items()}
    if packed or several:
        entries = {
            "intermediate_states": intermediate_states_buffer,
            "intermediate_state_indices": intermediate_state_indices,
        }
        _require_alike({"state": state, **tables, **entries})
        if num_accepted_tokens is not None and state_batch_indices is not None and state_batch_indices.ndim == 1:
            # The one slot, however many were accepted.
            columns = 1 if packed else arrays["x"].shape[1]
            slots["state_batch_indices"] = slots["state_batch_indices"][:, None].repeat(1, columns)
        slots |= {
            "num_accepted_tokens": rows(num_accepted_tokens, sequences),
            "intermediate_states": _quantized(intermediate_states_buffer, intermediate_state_scales),
            "intermediate_state_indices": intermediate_state_indices,
        }
    config: dict[str, Any] = {}
    if rand_seed is not None:
        if state_scale is not None:
            raise ValueError("rand_seed: expected None with state_scale, got a seed")
        config["philox_rounds"] = _checked_rounds(philox_rounds)
    if state_scale is not None and state_scale.ndim == 4:
        state_scale = state_scale.squeeze(-1)
    with using(**config) if config else contextlib.nullcontext():
        return step(
            arrays | {"state": _quantized(arrays["state"], state_scale), "out": out},
            key,
            raw,
            **slots,
            dt_softplus=dt_softplus,
            pad_slot_id=pad_slot_id,
            cu_seqlens=cu_seqlens if packed else None,
            disable_state_update=disabled,
            rand_seed=rand_seed,
            algorithm="simple" if algorithm == "async_horizontal" else algorithm,
        )


def checkpointing_ssu(
    state: Any,
    x_cache: Any,
    B_cache: Any,
    dt_cache: Any,
    ring_start: Any,
    prev_num_accepted_tokens: Any,
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    out: Any,
    D: Any = None,
    z: Any = None,
    dt_bias: Any = None,
    dt_softplus: bool = False,
    state_batch_indices: Any = None,
    pad_slot_id: int = -1,
    state_scale: Any = None,
    rand_seed: Any = None,
    philox_rounds: int = 10,
    d_split: int | None = None,
    cu_seqlens: Any = None,
    max_seqlen: int | None = None,
    enable_pdl: bool = False,
    cb_scaled: Any = None,
    cumAdt_vec: Any = None,
    cb_old: Any = None,
    precompute_heads_per_cta: int = 0,
    algorithm: str = "auto",
) -> Any:
    """Compute the outputs of new tokens from a checkpoint and the tokens since, and keep the new ones.

    It is the function of FlashInfer 0.7.4; older ones have rings of two buffers. The checkpoint of a sequence is
    written, advanced by the tokens since, where those and the new ones are more than the rows of the rings less the
    tokens of a call. The caller then moves ``ring_start`` and ``prev_num_accepted_tokens`` on, as
    ``ssu_bridge.advance_replay`` does. The outputs are computed from the checkpoint before it is rounded, and those of
    padding indices from zeros.

    Args:
        state: (slots, nheads, dim, dstate), the checkpoints, updated in place.
        x_cache, B_cache: (slots, nheads, rows, dim) and (slots, ngroups, rows, dstate), rings of the dtypes of x and B.
        dt_cache: (slots, nheads, rows) float32, the ring of step sizes.
        ring_start: (slots,) int32, the row of the first token since the checkpoint.
        prev_num_accepted_tokens: (slots,) int32, how many there are.
        x, dt, z, out: (batch, tokens, nheads, dim), or with ``cu_seqlens`` (1, rows, nheads, dim). dt has one number a
            head.
        A: (nheads, dim, dstate), one number a head.
        B, C: (batch, tokens, ngroups, dstate), or (1, rows, ngroups, dstate).
        D, dt_bias: (nheads, dim), one number a head.
        dt_softplus: apply softplus to dt + dt_bias.
        state_batch_indices: (batch,), the slot of each sequence.
        pad_slot_id: the index that stands for no slot.
        state_scale: (slots, nheads, dim) float32, for a quantised state.
        rand_seed: one int64 in a tensor, for stochastic rounding. The numbers drawn are not FlashInfer's.
        philox_rounds: of the random generator.
        cu_seqlens: (batch + 1,) int32, for packed sequences.
        max_seqlen: the most tokens of a packed sequence.
        algorithm: auto, monolith or two-kernel: ignored, as are the other arguments about how FlashInfer's kernels run.
        d_split, enable_pdl, cb_scaled, cumAdt_vec, cb_old, precompute_heads_per_cta: ignored.

    Returns:
        ``out``.

    Raises:
        ValueError, TypeError, UnsupportedError: as ``ssu_bridge.update``, and where FlashInfer requires x's dtype of B,
            C, z and out. Windows of more than 16 tokens, which FlashInfer refuses, are for the backend to support.
    """
    if algorithm not in _CHECKPOINTING_ALGORITHMS:
        raise ValueError(f"algorithm: expected {', '.join(_CHECKPOINTING_ALGORITHMS)}, got {algorithm!r}")
    if (cu_seqlens is None) != (max_seqlen is None):
        raise ValueError("max_seqlen: expected a number with cu_seqlens, and None without")
    tokenwise = {"x": x, "dt": dt, "B": B, "C": C, "z": z, "out": out}
    for name, tensor in tokenwise.items():
        if tensor is not None and tensor.ndim != 4:
            raise ValueError(f"{name}: expected four axes, got shape {tuple(tensor.shape)}")
    _require_alike({name: tensor for name, tensor in tokenwise.items() if name != "dt"})
    if cu_seqlens is not None:
        if x.shape[0] != 1:
            raise ValueError(f"x: expected shape (1, rows, nheads, dim) with cu_seqlens, got {tuple(x.shape)}")
        tokenwise = {name: None if tensor is None else tensor[0] for name, tensor in tokenwise.items()}
    tokens = x.shape[1] if max_seqlen is None else max_seqlen
    cursor = ReplayCursor(ring_start, prev_num_accepted_tokens, x_cache.shape[2] - tokens, tokens)
    arrays = {"A": A, "D": D, "dt_bias": dt_bias, "replay_x": x_cache, "replay_B": B_cache, "replay_dt": dt_cache}
    config = {} if rand_seed is None else {"philox_rounds": _checked_rounds(philox_rounds)}
    with using(**config) if config else contextlib.nullcontext():
        step(
            tokenwise | arrays | {"state": _quantized(state, state_scale)},
            replay=cursor,
            dt_softplus=dt_softplus,
            state_batch_indices=state_batch_indices,
            pad_slot_id=pad_slot_id,
            cu_seqlens=cu_seqlens,
            rand_seed=rand_seed,
        )
    return out


def _checked_rounds(philox_rounds: int) -> int:
    if philox_rounds <= 0:
        raise ValueError(f"philox_rounds: expected at least 1, got {philox_rounds}")
    return philox_rounds


def _require_alike(given: dict[str, Any]) -> None:
    """Check what FlashInfer does and ``update`` does not: dtypes that have to be the same."""
    dtypes = {name: tensor.dtype for name, tensor in given.items() if isinstance(tensor, torch.Tensor)}
    for like, names in ALIKE.items():
        for name in names:
            if name in dtypes and dtypes[name] != (expected := dtypes.get(like, dtypes[name])):
                raise ValueError(f"{name}: expected {like}'s dtype {expected}, got {dtypes[name]}")


def _quantized(values: Any, scale: Any) -> Any:
    return values if scale is None else QuantizedState(values, scale)
