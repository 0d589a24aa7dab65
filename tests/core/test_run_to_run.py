"""The same call gives the same bits each time that it runs."""

import pytest
from modes import GPU_PAIRS, skip_if_refused, stepper, to_host, to_mode

from ssu_bridge.api import explain
from ssu_bridge.testing.cases import Case
from ssu_bridge.testing.check import results_by_name

# Enough rows for all threads of a CPU and many of a GPU's multiprocessors.
SIZES = {"nheads": 4, "headdim": 64, "dstate": 128}
CASES = {
    "one token": Case("one token", **SIZES),
    "rounded stochastically": Case("rounded stochastically", **SIZES, dtypes={"state": "float16"}, seed=7),
    "int8, tokens": Case("int8, tokens", **SIZES, tokens=5, dtypes={"state": "int8"}),
    "a prompt": Case("a prompt", **SIZES, tokens=80),
    "packed": Case("packed", **SIZES, tokens=70, cu_seqlens=(0, 3, 3, 70)),
    "a tree": Case("a tree", **SIZES, tokens=4, steps=4, parents=((-1, 0, 0, 1),) * 3),
}
# Every case in NumPy, which takes no time; where JAX compiles, one of each form.
HERE = [(name, "numpy", backend) for name in CASES for backend in ("cpu", "reference")]
HERE += [(name, "jax.jit", "xla") for name in ("one token", "a prompt")]
ON_A_GPU = [*GPU_PAIRS, ("torch.cuda", "flashinfer"), ("jax.jit", "xla")]


@pytest.mark.parametrize(
    ("name", "mode", "backend"),
    [*HERE, *(pytest.param(name, *pair, marks=pytest.mark.gpu) for name in CASES for pair in ON_A_GPU)],
)
def test_the_same_bits_each_time(name, mode, backend):
    case = CASES[name]
    arrays = case.arrays(seed=8)
    skip_if_refused(explain(**to_mode(arrays, mode), **case.flags, backend=backend))
    step = stepper(mode, **case.flags, backend=backend)

    def run():
        given = to_mode({name: array.copy() for name, array in arrays.items()}, mode)
        return {name: array.tobytes() for name, array in to_host(results_by_name(step(given)), mode).items()}

    first = run()
    assert all(run() == first for _ in range(1 if backend == "reference" else 20))
