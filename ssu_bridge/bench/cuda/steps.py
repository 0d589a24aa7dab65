"""The steps that the GPU benchmark times: one model's layer on a slotted cache, each call on other slots."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ssu_bridge import QuantizedState, update, using

Call = Callable[[], object]


COPIES = ("scale in place", "memcpy")


class Sizes(NamedTuple):
    """The sizes of a layer."""

    nheads: int
    headdim: int
    dstate: int
    ngroups: int


# A layer of a large Mamba-2 model.
LAYER = Sizes(64, 64, 128, 8)


class Steps:
    """The arguments of several calls on one cache. Together their states are many times what the GPU's cache holds.

    A call is of one token for each sequence, or of several ``tokens``; a state of integers or of float8 is a quantised
    one. With ``slots_each`` it is packed, and each token of a sequence has a slot of its own to go to.
    """

    def __init__(
        self,
        sequences: int,
        dtype: torch.dtype,
        cold: int = 10,
        tokens: int | None = None,
        slots_each: int = 1,
        sizes: Sizes = LAYER,
    ):
        H, P, N, G = sizes
        device = torch.cuda.get_device_properties()
        state_bytes = sequences * H * P * N * dtype.itemsize
        self.count = max(2, -(-cold * device.L2_cache_size // state_bytes))
        self.state_bytes = state_bytes
        generator = torch.Generator("cuda").manual_seed(0)
        other = dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
        rows: tuple[int, ...] = (sequences,) if tokens is None else (sequences, tokens)
        if slots_each > 1:
            rows = (sequences * slots_each,)

        def normal(*shape: int, dtype: torch.dtype = other) -> torch.Tensor:
            return torch.randn(*shape, device="cuda", generator=generator).to(dtype)

        slots = self.count * sequences * slots_each
        self.state: Any
        if dtype in (torch.bfloat16, torch.float16, torch.float32):
            self.state = torch.empty(slots, H, P, N, dtype=dtype, device="cuda").normal_(generator=generator)
        else:
            kept = dtype if dtype in (torch.int8, torch.int16) else torch.int8
            values = torch.empty(slots, H, P, N, dtype=kept, device="cuda")
            # Bytes that are numbers as float8 too.
            values.random_(0, 127, generator=generator)
            self.state = QuantizedState(values.view(dtype), torch.rand(slots, H, P, device="cuda", generator=generator))
        order = torch.randperm(slots, device="cuda", generator=generator).int().view(self.count, sequences, slots_each)
        starts = torch.arange(sequences + 1, device="cuda", dtype=torch.int32) * slots_each
        model = {"A": -torch.exp(normal(H, dtype=torch.float32)), "D": normal(H), "dt_bias": normal(H)}
        self.calls: list[dict[str, Any]] = [
            {
                "x": normal(*rows, H, P),
                "dt": normal(*rows, H),
                "B": normal(*rows, G, N),
                "C": normal(*rows, G, N),
                **model,
                "state_batch_indices": order[i, :, 0].clone(),
                **({"dst_state_batch_indices": order[i].clone(), "cu_seqlens": starts} if slots_each > 1 else {}),
                "out": torch.empty(*rows, H, P, dtype=other, device="cuda"),
            }
            for i in range(self.count)
        ]

    def bytes(self) -> int:
        """Return what one call has to read and write."""
        read: int = sum(array.nbytes for array in self.calls[0].values())
        return 2 * self.state_bytes + read

    def updates(self, tile: tuple[int, int] | None = None, backend: str = "triton", **options: Any) -> Sequence[Call]:
        """Return the calls of a backend, with further arguments of ``update``."""

        def call(arguments: dict[str, Any]) -> None:
            with using(triton_tile=tile):
                update(self.state, **arguments, dt_softplus=True, backend=backend, **options)

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
        """Return the calls of FlashInfer's own function, their views made before."""
        call = functools.partial(_call_flashinfer, self.state, algorithm)
        return [functools.partial(call, {**arguments, **self.views(arguments)}) for arguments in self.calls]

    def views(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return parameters tied to a head as the broadcast views that FlashInfer takes them as."""
        P, N = self.state.shape[2:]
        tied = {name: arguments[name][:, None].expand(-1, P) for name in ("D", "dt_bias")}
        return {**tied, **self.view_of_dt(arguments), "A": arguments["A"][:, None, None].expand(-1, P, N)}

    def view_of_dt(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the one of these views that has to be made for each step."""
        return {"dt": arguments["dt"][..., None].expand(*arguments["dt"].shape, self.state.shape[2])}


def _call_flashinfer(state: torch.Tensor, algorithm: str, arguments: dict[str, Any]) -> None:
    from flashinfer.mamba import selective_state_update

    selective_state_update(state, **arguments, dt_softplus=True, algorithm=algorithm)
