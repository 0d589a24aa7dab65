"""Calls on several GPUs of a host, their heads sharded, against one GPU."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ssu_bridge.bench.cuda import jax_loops
from ssu_bridge.bench.cuda.jax_loops import Work
from ssu_bridge.bench.cuda.steps import Sizes
from ssu_bridge.bench.timing import microseconds

_BY_HEAD = dict.fromkeys(("A", "D", "dt_bias"), ("h",))
_BY_ROW = ("x", "dt", "B", "C")
_VERIFIED, _WINDOW = 8, 16
# Of a replay state whole cycles, and so many that the start of a loop is little of it on several GPUs too.
_ITERATIONS = 128
_PROMPT = Work(1, 8192, Sizes(128, 64, 128, 8), "float32")


def main(devices: int, batches: Sequence[int]) -> None:
    """Print the times of a token, of several, of a replayed one and of a prompt in jitted loops, on one and several."""
    there = jax.devices("gpu")
    if len(there) < devices:
        raise SystemExit(f"expected {devices} GPUs, found {len(there)}")
    mesh = Mesh(np.array(there[:devices]), ("h",))
    print("one call inside jax.jit and lax.fori_loop, heads and groups sharded, us: median (quartiles)")
    print(f"{'':<44}{'one GPU':<26}{f'{devices} GPUs':<28}{'times the calls per second':>26}")
    several_tokens = [Work(batch, _VERIFIED) for batch in batches]
    replayed = [Work(batch, window=_WINDOW) for batch in batches]
    for work in (*map(Work, batches), *several_tokens, *replayed, _PROMPT):
        caches = jax_loops.cold_caches(work)
        places = (dict, functools.partial(_sharded, mesh, bool(work.tokens)))
        loops = [jax_loops.loop(work, caches, "triton", place, _ITERATIONS) for place in places]
        one, several = jax_loops.in_turn(loops)
        ratio = one.median / several.median
        print(f"{work!s:<44}{microseconds(one):<26}{microseconds(several):<28}{ratio:>26.3f}", flush=True)


def _sharded(mesh: Mesh, token_axis: bool, arrays: dict[str, Any]) -> dict[str, Any]:
    rows = (None, None, "h") if token_axis else (None, "h")
    axes: dict[str, Any] = {**_BY_HEAD, **dict.fromkeys(_BY_ROW, rows), "state": (None, "h")}

    def put(name: str, array: Any) -> Any:
        # Those of a replay state too have heads or groups on their second axis.
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes.get(name, ()))))  # type: ignore[no-untyped-call]

    return {name: put(name, array) for name, array in arrays.items()}
