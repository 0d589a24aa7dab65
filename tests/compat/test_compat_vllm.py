"""The drop-in for vLLM, against its rules written out in a loop."""

import numpy as np
import pytest
import torch
from drop_ins import H, N, P, close, model, token, wide

from ssu_bridge.compat import vllm

pytestmark = pytest.mark.usefixtures("each_drop_in_backend")


def vllm_rule(a, out, lengths, read, write, accepted, null):
    """vLLM's rules over packed rows, in a loop: changes a["state"] and out."""
    state = a["state"].clone()
    row = 0
    for i, length in enumerate(lengths):
        column = 0 if accepted is None else max(int(accepted[i]) - 1, 0)
        start = int(read[i][column])
        s = torch.zeros(H, P, N, dtype=torch.float64) if start == null else a["state"][start]
        for t in range(length):
            out[row], s = token(a, row, s)
            row += 1
            if accepted is not None and start != null and int(write[i][t]) != null:
                state[int(write[i][t])] = s
        if accepted is None and length and start != null:
            state[int(write[i][0])] = s
    a["state"] = state


@pytest.mark.parametrize("name", ["null_block_id", "pad_slot_id"])
@pytest.mark.parametrize("null", [0, 5])
def test_one_token(name, null):
    a = model(4)
    exact, y = wide(a), torch.zeros(4, H, P, dtype=torch.float64)
    indices, out = torch.tensor([3, null, 1, null], dtype=torch.int32), torch.full((4, H, P), float("nan"))
    vllm_rule(exact, y, [1] * 4, indices[:, None], indices[:, None], None, null)
    order = [a.pop(n) for n in ("state", "x", "dt", "A", "B", "C", "D", "dt_bias", "z")]
    assert vllm.selective_state_update(*order, True, indices, out=out, **{name: null}) is None
    close(out, y)
    close(order[0], exact["state"])


@pytest.mark.parametrize("with_destinations", [True, False])
@pytest.mark.parametrize("with_counts", [True, False])
def test_packed(with_destinations, with_counts):
    lengths, slots = [2, 0, 1, 3], 16
    a = model(6, slots=slots)
    exact, y = wide(a), torch.zeros(6, H, P, dtype=torch.float64)
    read = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 0], [9, 10, 11]])
    write = torch.tensor([[1, 12, 3], [4, 5, 6], [7, 8, 0], [13, 0, 14]]) if with_destinations else None
    accepted = torch.tensor([2, 1, 3, 0], dtype=torch.int32) if with_counts else None
    vllm_rule(exact, y, lengths, read, read if write is None else write, accepted, 0)
    out = torch.full((6, H, P), float("nan"))
    spare = torch.tensor([[15, 15, 15]])  # tables may have rows to spare
    vllm.selective_state_update(
        **a,
        dt_softplus=True,
        state_batch_indices=torch.cat([read, spare]),
        dst_state_batch_indices=None if write is None else torch.cat([write, spare]),
        out=out,
        num_accepted_tokens=None if accepted is None else torch.cat([accepted, spare[0, :1]]),
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
    )
    close(out, y)
    close(a["state"], exact["state"])


def test_stochastic_rounding():
    a = model(2)
    state, indices = a.pop("state").half(), torch.tensor([3, 1])
    results = []
    for _ in range(2):
        new = state.clone()
        vllm.selective_state_update(
            new, **a, state_batch_indices=indices, out=torch.empty(2, H, P), enable_stochastic_rounding=True
        )
        results.append(new)
    assert not torch.equal(*results)  # a seed of its own for each call
    torch.testing.assert_close(*results, rtol=2e-3, atol=1e-6)


def test_rounds_stochastically_but_with_counts():
    a = model(2)
    state, read = a.pop("state").half(), torch.tensor([[3], [1]])
    results = []
    for stochastic in (True, False):
        results.append(state.clone())
        vllm.selective_state_update(
            results[-1],
            **a,
            state_batch_indices=read,
            out=torch.empty(2, H, P),
            num_accepted_tokens=torch.tensor([1, 1]),
            enable_stochastic_rounding=stochastic,
        )
    assert torch.equal(*results)


def test_rounds_of_the_generator():
    a = model(2)
    state, results = a.pop("state").half(), {}
    for rounds in (0, 10, 3):
        results[rounds] = state.clone()
        torch.manual_seed(4)
        out = torch.empty(2, H, P)
        vllm.selective_state_update(
            results[rounds], **a, out=out, enable_stochastic_rounding=True, cache_philox_rounds=rounds
        )
    assert torch.equal(results[0], results[10])
    assert not torch.equal(results[0], results[3])


def test_needs_out():
    with pytest.raises(TypeError, match="out: expected a tensor"):
        vllm.selective_state_update(**model(2))
