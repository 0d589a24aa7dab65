"""The error of a long decode, at reduced length; docs/reliability.md has it over 100,000 steps."""

import functools
from pathlib import Path

import pytest

import drift

STEPS = 1024


@functools.cache
def errors(backend, steps=STEPS):
    """Return, by curve, the errors over the last halves of so many steps: (until half of them, until the end)."""
    rows = drift.measured(backend, steps, [])
    return {curve: [e for _, c, _, e in rows if c == curve][-2:] for curve in {row[1] for row in rows}}


# Of a state stored in so many bits, by how much its outputs may differ at most, in units of themselves.
LARGEST = {"float32": 2e-7, "float16": 1e-3, "bfloat16": 6e-3, "int16": 1e-4, "int8": 2e-2, "float8_e4m3fn": 8e-2}


# How many times the error of NumPy's arithmetic it may be. A GPU's instruction for exp2 errs by two units in the last
# place where NumPy's exp errs by one, and a state that remembers a thousand tokens adds them up; peers' kernels use it too.
FACTORS = {"triton": 1.6}


@pytest.mark.parametrize(
    "backend",
    [
        "cpu",
        pytest.param("xla", marks=pytest.mark.nightly),
        "reference",
        pytest.param("triton", marks=pytest.mark.gpu),
    ],
)
def test_the_error_of_a_long_decode(backend):
    """It does not grow, and is no larger than that of the peers' arithmetic: float32, rounded when it is stored."""
    steps = 256 if backend == "reference" else STEPS
    plain = errors("plain", steps)
    for curve, (before, after) in errors(backend, steps).items():
        dtype, *more = curve.split()
        assert after < LARGEST[dtype] * (2 if "stochastic" in more else 1), curve
        assert after < 1.5 * before, curve
        if f"{dtype} plain" in plain and "stochastic" not in more:
            assert after < FACTORS.get(backend, 1.2) * plain[f"{dtype} plain"][1], curve
    assert errors(backend, steps)["bfloat16 replay"][1] < 0.5 * errors(backend, steps)["bfloat16"][1]


RECORDED = Path(__file__).parents[2] / "docs/data/drift"
# Whose arithmetic a backend is held against: NumPy's on a CPU, on a GPU that of the Triton kernel of vLLM and mamba_ssm.
PEERS = {"cpu": "plain", "xla": "plain", "reference": "plain", "triton": "peer"}


def test_recorded_errors():
    """Of 100,000 steps those of no backend are larger than its peer's, and the table of the docs has them."""
    rows = [line.split(",") for path in RECORDED.glob("*.csv") for line in path.read_text().splitlines()[1:]]
    final = {(backend, curve): float(error) for backend, curve, step, error in rows if step == "100000"}
    table = (RECORDED.parents[1] / "reliability.md").read_text()
    for (backend, curve), error in final.items():
        assert f"{error:.1e}" in next(
            line for line in table.splitlines() if line.startswith(f"| {curve.split(' plain')[0]} |")
        )
        peer = PEERS.get(backend)
        recorded = final.get((peer, f"{curve} plain" if peer == "plain" else curve))
        if recorded is not None:
            assert error < 1.01 * recorded, (backend, curve)
    assert {(backend, curve) for backend in ("cpu", "triton") for curve in drift.CURVES} < final.keys()
