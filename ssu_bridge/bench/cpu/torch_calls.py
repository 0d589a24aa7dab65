"""Host time of Torch calls: one problem, several in turn, and the drop-ins, on tiny problems."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch

from ssu_bridge import update
from ssu_bridge.bench.timing import Timing, interleaved
from ssu_bridge.compat import flashinfer, mamba_ssm, vllm

H, P, N = 2, 4, 8
# Options that differ from problem to problem: dtype of x, whether z is there, dtype and strides of B and C.
_VARIANTS = tuple(
    itertools.product((torch.float32, torch.bfloat16), (True, False), (torch.float32, torch.bfloat16), (1, 2))
)
PROBLEMS = len(_VARIANTS)


def host(arrays: dict[str, Any]) -> dict[str, Timing]:
    """Time a call of ``update``, and one of Torch's own functions to compare it with."""
    a: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    out = torch.empty_like(a["x"])
    calls: dict[str, Callable[[], object]] = {
        "update": functools.partial(update, **a, dt_softplus=True, out=out),
        "Tensor.add_, for comparison": functools.partial(out.add_, a["x"]),
    }
    return interleaved(calls, rounds=200, seconds=0.004)


def turns() -> dict[str, Timing]:
    """Time as many calls of one problem as of problems that differ, with the ratio."""
    times = interleaved(problems_in_turn(), rounds=200, seconds=0.004)
    one, *_ = times.values()
    return {f"{name} ({timing.median / one.median:.2f})": timing for name, timing in times.items()}


def drop_in_times() -> dict[str, Timing]:
    """Time ``update`` and the drop-ins, with the ratio to ``update`` on the same tensors."""
    times = interleaved(drop_ins(), rounds=200, seconds=0.004)
    alike = {name: times["update, out given" if name.endswith("out given") else "update"] for name in times}
    return {f"{name} ({timing.median / alike[name].median:.2f})": timing for name, timing in times.items()}


def problems_in_turn() -> dict[str, Callable[[], object]]:
    """Return as many calls of one problem as of problems that differ in dtype, strides and options."""
    calls = [functools.partial(update, **_problem(*variant)) for variant in _VARIANTS]

    def one() -> None:
        for _ in calls:
            calls[0]()

    def several() -> None:
        for call in calls:
            call()

    return {"one problem": one, f"{PROBLEMS} problems in turn": several}


def drop_ins() -> dict[str, Callable[[], object]]:
    """Return ``update`` and the drop-ins on the same tensors; that of mamba_ssm makes its output."""
    a, out = _problem(torch.float32, True, torch.float32, 1), torch.zeros(1, H, P)
    views = {
        "dt": a["dt"][..., None].expand(1, H, P),
        "A": a["A"][:, None, None].expand(H, P, N),
        "D": a["D"][:, None].expand(H, P),
        "dt_bias": a["dt_bias"][:, None].expand(H, P),
    }
    given = a | views
    return {
        "update": functools.partial(update, **given),
        "update, out given": functools.partial(update, **given, out=out),
        "mamba_ssm": functools.partial(mamba_ssm.selective_state_update, **given),
        "vllm, out given": functools.partial(vllm.selective_state_update, **given, null_block_id=-1, out=out),
        "flashinfer, out given": functools.partial(flashinfer.selective_state_update, **given, out=out),
    }


def _problem(x_dtype: torch.dtype, with_z: bool, B_dtype: torch.dtype, step: int) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(0)
    B, C = (torch.rand(step, 1, N, generator=rng).to(B_dtype)[::step] for _ in "BC")
    return {
        "state": torch.zeros(1, H, P, N),
        "x": torch.rand(1, H, P, generator=rng).to(x_dtype),
        "dt": torch.rand(1, H, generator=rng),
        "A": -torch.rand(H, generator=rng),
        "B": B,
        "C": C,
        "D": torch.rand(H, generator=rng),
        "z": torch.rand(1, H, P, generator=rng) if with_z else None,
        "dt_bias": torch.rand(H, generator=rng),
        "dt_softplus": True,
        "state_batch_indices": torch.zeros(1, dtype=torch.int32),
    }
