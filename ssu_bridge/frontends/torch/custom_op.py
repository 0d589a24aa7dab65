"""``update`` as an operator of Torch, which says what it changes and is opaque to Dynamo and to dispatch modes."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from ssu_bridge.config import SSUConfig
from ssu_bridge.core.arguments import ARGUMENTS
from ssu_bridge.core.problem import Options
from ssu_bridge.errors import UnsupportedError
from ssu_bridge.frontends.base import Arrays, launcher_of, named, refuse_copy, returned
from ssu_bridge.frontends.torch import transforms
from ssu_bridge.frontends.torch.seeds import seeded

_WRITTEN = tuple(name for name, argument in ARGUMENTS.items() if argument.written)


def trace(options: Options, arrays: Arrays, out: torch.Tensor | None) -> tuple[Any, ...]:
    """Put the step into the graph that is being traced.

    Raises:
        UnsupportedError: a transform or a gradient would be lost; the message names it.
        TypeError, ValueError: ``donate`` or ``check_indices`` is set.
    """
    refuse_copy(options)
    if options.check_indices:
        raise ValueError("check_indices: expected False while Torch traces, where indices have no values yet, got True")
    if refusal := transforms.functorch_refusal():
        raise UnsupportedError(refusal)
    transforms.require_no_grad(named(arrays, out))
    arrays = seeded(arrays, options)
    x = arrays[1]
    result = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    config = options.config
    _step(
        *itertools.islice(itertools.chain(arrays, itertools.repeat(None)), len(ARGUMENTS) - 1),
        result,
        options.dt_softplus,
        options.pad_slot_id,
        options.disable_state_update,
        options.intermediate_stride,
        str(config.backend),
        config.algorithm,
        config.philox_rounds,
        config.triton_tile or (),
    )
    return returned(named(arrays, result))


@torch.library.custom_op("ssu_bridge::update", mutates_args=_WRITTEN)
def _step(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    state_batch_indices: torch.Tensor | None,
    dst_state_batch_indices: torch.Tensor | None,
    num_accepted_tokens: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    intermediate_states: torch.Tensor | None,
    intermediate_state_indices: torch.Tensor | None,
    parent_tokens: torch.Tensor | None,
    has_initial_state: torch.Tensor | None,
    state_scale: torch.Tensor | None,
    intermediate_state_scales: torch.Tensor | None,
    rand_seed: torch.Tensor | None,
    out: torch.Tensor,
    dt_softplus: bool,
    pad_slot_id: int,
    disable_state_update: bool,
    intermediate_stride: int,
    backend: str,
    algorithm: str,
    philox_rounds: int,
    triton_tile: Sequence[int],
) -> None:
    tile = (triton_tile[0], triton_tile[1]) if triton_tile else None
    config = SSUConfig(backend=backend, algorithm=algorithm, philox_rounds=philox_rounds, triton_tile=tile)  # type: ignore[arg-type]
    options = Options(dt_softplus, pad_slot_id, disable_state_update, True, False, intermediate_stride, config)
    slots = (state_batch_indices, dst_state_batch_indices)
    several = (num_accepted_tokens, cu_seqlens, intermediate_states, intermediate_state_indices, parent_tokens)
    rest = (has_initial_state, state_scale, intermediate_state_scales, rand_seed)
    arrays = (state, x, dt, A, B, C, D, z, dt_bias, *slots, *several, *rest)
    launcher_of(arrays, out, options)(arrays, out)
