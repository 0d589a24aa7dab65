"""Seeds for stochastic rounding."""

import torch

from ssu_bridge.core.problem import Options
from ssu_bridge.frontends.base import SEED, Arrays, draws_seed, with_seed


def placed(arrays: Arrays, options: Options) -> Arrays:
    """Return the arrays with the seed in one on the state's device; one that has to be drawn has any number yet."""

    def make(value: int | None) -> torch.Tensor:
        device = arrays[0].device
        if value is None:
            return torch.empty((), dtype=torch.int64, device=device)
        return torch.full((), value, dtype=torch.int64, device=device)

    return with_seed(arrays, options, make)


def draw(seed: torch.Tensor) -> None:
    """Draw a seed by Torch's generator on its device. In a CUDA graph that gives each replay a seed of its own."""
    narrow = torch.iinfo(torch.int64)
    seed.random_(narrow.min, narrow.max)


def seeded(arrays: Arrays, options: Options) -> Arrays:
    """Return the arrays with the seed in one on the state's device, drawn if it has to be."""
    with_one = placed(arrays, options)
    if draws_seed(arrays, options):
        draw(with_one[SEED])
    return with_one
