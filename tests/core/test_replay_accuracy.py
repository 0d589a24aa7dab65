"""The error of a long decode: a checkpoint is rounded once in a window of tokens, a state in place at each."""

import numpy as np
import pytest

import ssu_bridge
from ssu_bridge.core.quantized import QuantizedState

STEPS, WINDOW = 4096, 16
B, H, P, N = 1, 2, 8, 16


def inputs():
    rng = np.random.default_rng(0)
    sizes = {"x": (H, P), "dt": (H,), "B": (1, N), "C": (1, N)}
    drawn = {name: rng.standard_normal((STEPS, B, *size)).astype("float32") for name, size in sizes.items()}
    drawn["dt"] = np.log1p(np.exp(drawn["dt"] - 3)).astype("float32")  # a state remembers some dozens of tokens
    return drawn, -np.exp(rng.standard_normal(H)).astype("float32")


def exact(drawn, A):
    state, outs = np.zeros((B, H, P, N)), []
    for step in range(STEPS):
        x, dt, B_, C = (drawn[name][step].astype("float64") for name in ("x", "dt", "B", "C"))
        state = state * np.exp(A * dt)[..., None, None] + (dt[..., None] * x)[..., None] * B_[:, :, None]
        outs.append((state * C[:, :, None]).sum(-1))
    return np.array(outs)


def decoded(dtype, drawn, A, replays):
    zeros = np.zeros((B, H, P, N), "float32")
    state = QuantizedState.quantize(zeros, dtype) if dtype.startswith(("int", "float8")) else zeros.astype(dtype)
    more = {}
    if replays:
        state = ssu_bridge.to_replay(state, WINDOW, 1, 1)
        more["replay"] = ssu_bridge.ReplayCursor.empty(B, WINDOW, 1)
    outs = []
    for step in range(STEPS):
        x, dt, B_, C = (drawn[name][step] for name in ("x", "dt", "B", "C"))
        outs.append(ssu_bridge.update(state, x, dt, A, B_, C, backend="reference", **more)[0])
        if replays:
            ssu_bridge.advance_replay(more["replay"], None, tokens=1)
    return np.array(outs, "float64")


def errors(dtype):
    """Return the error of the outputs relative to them, in the root of the mean square, in place and with replay."""
    drawn, A = inputs()
    wanted = exact(drawn, A.astype("float64"))
    got = (decoded(dtype, drawn, A, replays) for replays in (False, True))
    return [float(np.sqrt(((out - wanted) ** 2).mean() / (wanted**2).mean())) for out in got]


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int16", "int8", "float8_e4m3fn"])
def test_replay_is_no_less_exact_than_in_place(dtype):
    in_place, replayed = errors(dtype)
    print(f"{dtype}: in place {in_place:.2e}, replay {replayed:.2e}")
    assert replayed <= in_place
