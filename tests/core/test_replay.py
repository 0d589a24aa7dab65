"""Replay: steps from a checkpoint and the tokens since, against sequences that are stepped token by token."""

import pytest
from modes import GPU_PAIRS, PAIRS
from replays import CONFIGS, serve

# A program of XLA is compiled for each: few by default.
COMPILED = (CONFIGS[1], CONFIGS[2], CONFIGS[4])


def schedules():
    for mode, backend in PAIRS:
        if mode == "jax.lax.scan":
            continue
        for config in CONFIGS:
            is_slow = (backend == "xla" and mode == "jax") or (mode.startswith("jax") and config not in COMPILED)
            is_copied = backend == "reference" and mode != "numpy" and config not in COMPILED
            marks = [pytest.mark.nightly] if is_slow or is_copied else []
            yield pytest.param(config, mode, backend, id=f"{config}-{mode}-{backend}", marks=marks)
    for mode, backend in (*GPU_PAIRS, ("jax.jit", "xla")):
        if mode != "jax.lax.scan":
            for config in CONFIGS:
                yield pytest.param(config, mode, backend, id=f"{config}-{mode}-{backend}-gpu", marks=pytest.mark.gpu)


@pytest.mark.parametrize(("config", "mode", "backend"), [*schedules()])
def test_a_server_decodes_as_token_by_token(config, mode, backend):
    serve(config, mode, backend)
