"""The steps of a replay state that the GPU benchmark times: one model's layer, each call on other slots."""

import functools
from collections.abc import Sequence
from typing import Any

import torch

from ssu_bridge import QuantizedState, ReplayCursor, ReplayState, update
from ssu_bridge.bench.cuda.steps import LAYER, Call, Sizes


class ReplaySteps:
    """The arguments of several calls on one cache. Together their states are many times what the GPU's cache holds.

    A call has one new token for each sequence, or several ``tokens``. Its slots all have the same number of pending
    tokens: those that a cycle from one flush to the next goes through, if ``phases`` names no others.
    """

    def __init__(
        self,
        sequences: int,
        dtype: torch.dtype,
        window: int = 16,
        tokens: int = 1,
        phases: Sequence[int] | None = None,
        cold: int = 10,
        sizes: Sizes = LAYER,
    ):
        H, P, N, G = sizes
        self.window, self.tokens = window, tokens
        phases = [*range(tokens, window + 1, tokens)] if phases is None else phases
        state_bytes = sequences * H * P * N * dtype.itemsize
        enough = max(2, -(-cold * torch.cuda.get_device_properties().L2_cache_size // state_bytes))
        self.count = len(phases) * -(-enough // len(phases))
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device="cuda").normal_(generator=generator)

        slots, length = self.count * sequences, window + tokens
        checkpoint: Any
        if dtype.is_floating_point and dtype.itemsize > 1:
            checkpoint = normal(slots, H, P, N, dtype=dtype)
        else:
            values = torch.randint(-100, 101, (slots, H, P, N), dtype=torch.int8, device="cuda", generator=generator)
            checkpoint = QuantizedState(values.view(dtype), torch.rand(slots, H, P, device="cuda") * 0.02)
        steps = torch.rand(slots, H, length, device="cuda", generator=generator) * 0.1
        self.state = ReplayState(checkpoint, normal(slots, H, length, P), normal(slots, G, length, N), steps)
        order = torch.randperm(slots, device="cuda", generator=generator).int().view(self.count, sequences)
        pending = torch.zeros(slots, dtype=torch.int32, device="cuda")
        for i, row in enumerate(order):
            pending[row.long()] = phases[i % len(phases)]
        start = torch.randint(0, length, (slots,), dtype=torch.int32, device="cuda", generator=generator)
        self.cursor = ReplayCursor(start, pending, window, tokens)
        model = {"A": -torch.rand(H, device="cuda") - 0.5, "D": normal(H), "dt_bias": normal(H) - 4}
        rows = (sequences,) if tokens == 1 else (sequences, tokens)
        self.sizes = sizes
        self.calls: list[dict[str, Any]] = [
            {
                "x": normal(*rows, H, P),
                "dt": normal(*rows, H),
                "B": normal(*rows, G, N),
                "C": normal(*rows, G, N),
                **model,
                "state_batch_indices": row.clone(),
                "out": normal(*rows, H, P),
            }
            for row in order
        ]

    def updates(self, backend: str = "triton") -> Sequence[Call]:
        """Return the calls of a backend."""
        call = functools.partial(update, self.state, replay=self.cursor, dt_softplus=True, backend=backend)
        return [functools.partial(call, **arguments) for arguments in self.calls]

    def flashinfer(self) -> Sequence[Call]:
        """Return the calls of FlashInfer's own function, their views and what it needs besides made before.

        Where GPUs can, each starts before the one ahead of it is done, as ours do.
        """
        from flashinfer.mamba import checkpointing_ssu

        checkpoint, scale = self.state.checkpoint, None
        if isinstance(checkpoint, QuantizedState):
            checkpoint, scale = checkpoint
        rings = (self.state.x, self.state.B, self.state.dt, self.cursor.start, self.cursor.pending)
        overlaps = torch.cuda.get_device_capability() >= (9, 0)
        call = functools.partial(
            checkpointing_ssu,
            checkpoint,
            *rings,
            state_scale=scale,
            dt_softplus=True,
            enable_pdl=overlaps,
            **self._scratch(),
        )
        return [functools.partial(call, **self._views(arguments)) for arguments in self.calls]

    def _views(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call as FlashInfer takes them: with an axis of tokens, parameters as views."""
        H, P, N, _ = self.sizes
        given = dict(arguments)
        if self.tokens == 1:
            given |= {name: given[name][:, None] for name in ("x", "dt", "B", "C", "out")}
        given["dt"] = given["dt"][..., None].expand(*given["dt"].shape, P)
        given |= {name: given[name][:, None].expand(H, P) for name in ("D", "dt_bias")}
        return given | {"A": given["A"][:, None, None].expand(H, P, N)}

    def _scratch(self) -> dict[str, torch.Tensor]:
        """Return the memory with which FlashInfer's faster way for large batches is there."""
        heads, batch = self.sizes.nheads, len(self.calls[0]["x"])
        kept = -(-self.window // 8) * 8
        return {
            "cb_scaled": torch.empty(batch, heads, 32, 8, dtype=torch.bfloat16, device="cuda"),
            "cumAdt_vec": torch.empty(batch, heads, -(-self.tokens // 16) * 16, device="cuda"),
            "cb_old": torch.empty(batch, heads, 32, kept // 2, dtype=torch.bfloat16, device="cuda"),
        }
