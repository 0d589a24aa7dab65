"""One step on several GPUs of a host, their heads sharded, against one GPU."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ssu_bridge.bench.cuda import jax_loops
from ssu_bridge.bench.timing import microseconds

_BY_HEAD = dict.fromkeys(("A", "D", "dt_bias"), ("h",))
_BY_ROW = dict.fromkeys(("state", "x", "dt", "B", "C"), (None, "h"))


def main(devices: int, batches: Sequence[int]) -> None:
    """Print the time of a step in a jitted loop on one GPU and on several."""
    there = jax.devices("gpu")
    if len(there) < devices:
        raise SystemExit(f"expected {devices} GPUs, found {len(there)}")
    mesh = Mesh(np.array(there[:devices]), ("h",))
    print("one bfloat16 step inside jax.jit and lax.fori_loop, heads and groups sharded, us: median (quartiles)")
    print(f"{'batch':<8}{'one GPU':<26}{f'{devices} GPUs':<26}{'times the calls per second':>26}")
    for batch in batches:
        caches = jax_loops.cold_caches(batch)
        loops = [jax_loops.loop(batch, caches, "triton", place) for place in (dict, functools.partial(_sharded, mesh))]
        one, several = jax_loops.in_turn(loops)
        ratio = one.median / several.median
        print(f"{batch:<8}{microseconds(one):<26}{microseconds(several):<26}{ratio:>26.3f}", flush=True)


def _sharded(mesh: Mesh, arrays: dict[str, Any]) -> dict[str, Any]:
    axes: dict[str, Any] = {**_BY_HEAD, **_BY_ROW}

    def put(name: str, array: Any) -> Any:
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes.get(name, ()))))  # type: ignore[no-untyped-call]

    return {name: put(name, array) for name, array in arrays.items()}
