"""``update`` under ``torch.compile``: an operator that says what it changes, so that nobody has to look into it.

A graph can be traced once ``warm_up``, or ``update`` itself, was called with the same flags: before, finding the
frontend is part of the call, and ``torch.compile`` cannot trace an import.
"""

from collections.abc import Sequence

import torch

from ssu_bridge.config import SSUConfig, get_config
from ssu_bridge.frontends import Arrays, launcher_of
from ssu_bridge.problem import Options

# The configuration that is in force while the graph is traced is the graph's. This is all that
# torch.compiler.assume_constant_result does, but for importing the compiler, which takes two seconds.
get_config._dynamo_marked_constant = True  # type: ignore[attr-defined]


def trace(options: Options, arrays: Arrays, out: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the step into the graph that is being traced."""
    state, x = arrays[:2]
    result = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    config = options.config
    _step(
        *arrays[:11],
        result,
        options.dt_softplus,
        options.pad_slot_id,
        str(config.backend),
        config.algorithm,
        config.triton_tile or (),
    )
    return result, state


@torch.library.custom_op("ssu_bridge::single_token", mutates_args=("state", "out"))
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
    out: torch.Tensor,
    dt_softplus: bool,
    pad_slot_id: int,
    backend: str,
    algorithm: str,
    triton_tile: Sequence[int],
) -> None:
    tile = (triton_tile[0], triton_tile[1]) if triton_tile else None
    config = SSUConfig(backend=backend, algorithm=algorithm, triton_tile=tile)  # type: ignore[arg-type]
    options = Options(dt_softplus, pad_slot_id, False, True, False, config)
    arrays = (state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, dst_state_batch_indices)
    launcher_of(arrays, out, options)(arrays, out)
