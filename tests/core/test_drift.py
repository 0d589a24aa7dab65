"""The error of a long decode, at reduced length; docs/reliability.md has it over 100,000 steps."""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest

import drift
import ssu_bridge
from ssu_bridge.dispatch import module

STEPS = 1024


@functools.cache
def errors(backend, steps=STEPS):
    """Return, by curve, the errors over the last halves of so many steps: (until half of them, until the end)."""
    rows = drift.measured(backend, steps, [])
    return {curve: [e for _, c, _, e in rows if c == curve][-2:] for curve in {row[1] for row in rows}}


# Of a state stored in so many bits, by how much its outputs may differ at most, in units of themselves.
LARGEST = {"float16": 1e-3, "bfloat16": 6e-3, "int16": 1e-4, "int8": 2e-2, "float8_e4m3fn": 8e-2}
# How many times the error of NumPy's arithmetic that of a float32 state may be. A GPU's instruction for exp2 errs by two
# units in the last place where NumPy's exp errs by one, and a state that remembers a thousand tokens adds them up;
# FlashInfer's exponentials and softplus are approximate, as those of vLLM's kernel are.
FACTORS = {"triton": 1.6, "flashinfer": 20}


def largest(backend, curve, steps):
    """Return the largest error that the outputs may have."""
    dtype, *more = curve.split()
    if backend == "flashinfer" and "replay" in more:  # whose products are those of bfloat16, and the outputs too
        return LARGEST["int8" if dtype == "int8" else "bfloat16"]
    if dtype == "float32" or (not more and f"{dtype} plain" in drift.PLAIN):
        plain = "plain-gpu" if drift.on_a_gpu(backend) else "plain"
        factor = FACTORS.get(backend, 1.2) if dtype == "float32" else 1.2
        return factor * errors(plain, steps)[f"{dtype} plain"][1]
    return LARGEST[dtype] * (2 if "stochastic" in more else 1)


@pytest.mark.parametrize(
    "backend",
    [
        "cpu",
        pytest.param("xla", marks=pytest.mark.nightly),
        "reference",
        pytest.param("triton", marks=pytest.mark.gpu),
        # It compiles eight modules, of which those for replay take minutes; test_flashinfer_gpu.py has single calls.
        pytest.param("flashinfer", marks=[pytest.mark.gpu, pytest.mark.nightly]),
    ],
)
def test_the_error_of_a_long_decode(backend):
    """It does not grow, and is no larger than that of the peers' arithmetic: float32, rounded when it is stored."""
    steps = 256 if backend == "reference" else STEPS
    of_curve = errors(backend, steps)
    for curve, (before, after) in of_curve.items():
        assert after < largest(backend, curve, steps), curve
        assert after < 1.5 * before, curve
    if backend != "flashinfer":
        assert of_curve["bfloat16 replay"][1] < 0.5 * of_curve["bfloat16"][1]


@pytest.mark.parametrize("backend", drift.PANELS)
def test_each_state_that_a_backend_supports_is_measured(backend, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.Tensor, "cuda", torch.Tensor.clone)
    sizes, platform = drift.sizes_of(backend), "cuda" if drift.on_a_gpu(backend) else "cpu"
    for curve in drift.CURVES:
        decode = drift.Decode(curve, backend, sizes)
        given = decode.token(decode.converted(next(drift.blocks(1, sizes))), 0)
        problem = ssu_bridge.explain(decode.state, **given, backend="reference").choices[0].problem
        problem = dataclasses.replace(problem, framework="jax" if backend == "xla" else problem.framework)
        refusal = module(backend).refusal(problem.on(platform, (9, 0)))
        assert (refusal is None) == (curve in drift.curves_of(backend)), (curve, refusal)


DOCS = Path(__file__).parents[2] / "docs"
# Whose arithmetic a backend is held against: NumPy's on a CPU, on a GPU that of FlashInfer, and of vLLM's and mamba_ssm's
# Triton kernel.
PEERS = {"cpu": ["plain"], "xla": ["plain"], "reference": ["plain"], "triton": ["peer", "flashinfer"]}
# States that all of them have.
EVERYWHERE = ("float32", "bfloat16", "float16")
COLUMNS = {"plain": "NumPy", "plain-gpu": "NumPy, these sizes", "peer": "vLLM"}


def recorded():
    """Return the errors over 100,000 steps, by backend and curve, those of NumPy's arithmetic by the state's dtype."""
    rows = [line.split(",") for p in (DOCS / "data/drift").glob("*.csv") for line in p.read_text().splitlines()[1:]]
    return {(name, curve.split(" plain")[0]): float(error) for name, curve, step, error in rows if step == "100000"}


def cells():
    """Return what the tables of the docs have, by column and state."""
    lines = (DOCS / "reliability.md").read_text().splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("| ")]
    names, found = [], {}
    for first, *fields in ([field.strip() for field in row] for row in rows):
        names = fields if first == "state" else names
        if first.split(" ")[0] in (*LARGEST, "float32"):
            found |= {(name, first): field for name, field in zip(names, fields, strict=True) if field}
    return found


def test_recorded_errors():
    """Of 100,000 steps those of no backend are larger than its peer's, and the tables of the docs have them."""
    errors = recorded()
    for (backend, curve), error in errors.items():
        for peer in PEERS.get(backend, ()):
            assert error < 1.01 * errors.get((peer, curve), np.inf), (backend, curve, peer)
            assert (peer, curve) in errors or curve not in EVERYWHERE
    assert cells() == {(COLUMNS.get(b, f"`{b}`"), curve): f"{error:.1e}" for (b, curve), error in errors.items()}
    measured = {(backend, curve) for backend in drift.PANELS for curve in drift.SUPPORTED.get(backend, drift.CURVES)}
    assert measured < errors.keys()
