"""The steps that the GPU benchmark times: one model's layer on a slotted cache, each call on other slots."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ssu_bridge import update, using

Call = Callable[[], object]


COPIES = ("scale in place", "memcpy")


class Sizes(NamedTuple):
    """Of a layer."""

    nheads: int
    headdim: int
    dstate: int
    ngroups: int


# A layer of a large Mamba-2 model.
LAYER = Sizes(64, 64, 128, 8)


class Steps:
    """The arguments of several calls on one cache. Together their states are many times what the GPU's cache holds."""

    def __init__(self, sequences: int, dtype: torch.dtype, cold: int = 10):
        H, P, N, G = LAYER
        device = torch.cuda.get_device_properties()
        state_bytes = sequences * H * P * N * dtype.itemsize
        self.count = max(2, -(-cold * device.L2_cache_size // state_bytes))
        self.state_bytes = state_bytes
        generator = torch.Generator("cuda").manual_seed(0)
        other = torch.bfloat16 if dtype is torch.float32 else dtype

        def normal(*shape: int, dtype: torch.dtype = other) -> torch.Tensor:
            return torch.randn(*shape, device="cuda", generator=generator).to(dtype)

        slots = self.count * sequences
        self.state = torch.empty(slots, H, P, N, dtype=dtype, device="cuda").normal_(generator=generator)
        order = torch.randperm(slots, device="cuda", generator=generator).int().view(self.count, sequences)
        model = {"A": -torch.exp(normal(H, dtype=torch.float32)), "D": normal(H), "dt_bias": normal(H)}
        self.calls: list[dict[str, Any]] = [
            {
                "x": normal(sequences, H, P),
                "dt": normal(sequences, H),
                "B": normal(sequences, G, N),
                "C": normal(sequences, G, N),
                **model,
                "state_batch_indices": order[i].clone(),
                "out": torch.empty(sequences, H, P, dtype=other, device="cuda"),
            }
            for i in range(self.count)
        ]

    def bytes(self) -> int:
        """Return what one call has to read and write."""
        read: int = sum(array.nbytes for array in self.calls[0].values())
        return 2 * self.state_bytes + read

    def updates(self, tile: tuple[int, int] | None = None) -> Sequence[Call]:
        """Return the calls of the triton backend."""

        def call(arguments: dict[str, Any]) -> None:
            with using(triton_tile=tile):
                update(self.state, **arguments, dt_softplus=True, backend="triton")

        return [functools.partial(call, arguments) for arguments in self.calls]

    def copies(self) -> dict[str, Sequence[Call]]:
        """Return calls that read and write as many bytes of state: by the driver, and by a kernel in place."""
        parts = self.state.view(self.count, -1)
        half = self.count // 2
        pairs = zip(parts[:half], parts[half : 2 * half], strict=True)
        in_place: Sequence[Call] = [functools.partial(part.mul_, 1) for part in parts]
        apart: Sequence[Call] = [functools.partial(target.copy_, source) for source, target in pairs]
        return dict(zip(COPIES, (in_place, apart), strict=True))

    def flashinfer(self, algorithm: str) -> Sequence[Call]:
        """Return the calls of FlashInfer, which takes parameters tied to a head as broadcast views."""
        from flashinfer.mamba import selective_state_update

        P, N = self.state.shape[2:]
        tied = {"dt": P, "D": P, "dt_bias": P}

        def call(arguments: dict[str, Any]) -> None:
            selective_state_update(self.state, **arguments, dt_softplus=True, algorithm=algorithm)

        result = []
        for arguments in self.calls:
            views = {name: arguments[name][..., None].expand(*arguments[name].shape, n) for name, n in tied.items()}
            views["A"] = arguments["A"][:, None, None].expand(-1, P, N)
            result.append(functools.partial(call, {**arguments, **views}))
        return result
