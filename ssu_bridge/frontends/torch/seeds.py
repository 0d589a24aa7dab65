"""Seeds for stochastic rounding."""

import torch

from ssu_bridge.core.problem import Options
from ssu_bridge.frontends.base import Arrays, with_seed


def seeded(arrays: Arrays, options: Options) -> Arrays:
    """Return the arrays with the seed in one on the state's device; if it has to be drawn, by Torch's generator there.

    In a CUDA graph that generator gives each replay a seed of its own.
    """

    def make(value: int | None) -> torch.Tensor:
        state, narrow = arrays[0], torch.iinfo(torch.int64)
        if value is None:
            return torch.randint(narrow.min, narrow.max, (), dtype=torch.int64, device=state.device)
        return torch.full((), value, dtype=torch.int64, device=state.device)

    return with_seed(arrays, options, make)
