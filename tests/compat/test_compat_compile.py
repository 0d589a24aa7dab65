"""The drop-ins inside torch.compile: one graph, with what eager code computes, and no call before it."""

import pytest
import torch
from drop_ins import H, P, model
from thinned import thinned

import ssu_bridge
from ssu_bridge.compat import flashinfer, mamba_ssm, vllm

TABLE = torch.tensor([3, 1], dtype=torch.int32)


def through_mamba_ssm(a, out):
    return out.copy_(mamba_ssm.selective_state_update(**a, state_batch_indices=TABLE))


def through_vllm(a, out):
    vllm.selective_state_update(**a, state_batch_indices=TABLE, out=out)
    return out


def through_flashinfer(a, out):
    return flashinfer.selective_state_update(**a, state_batch_indices=TABLE, out=out)


def through_vllm_with_rounds(a, out):
    vllm.selective_state_update(**a, out=out, enable_stochastic_rounding=True, cache_philox_rounds=7)
    return out


def through_flashinfer_with_rounds(a, out):
    return flashinfer.selective_state_update(**a, out=out, rand_seed=torch.tensor(5), philox_rounds=7)


CALLS = (through_mamba_ssm, through_vllm, through_flashinfer)
ROUNDED = (through_vllm_with_rounds, through_flashinfer_with_rounds)


@pytest.mark.filterwarnings("ignore")
# By default each call with one of the backends.
@pytest.mark.parametrize(
    ("call", "backend"),
    thinned([*CALLS, *ROUNDED], ["eager", "aot_eager", "inductor"], one_in=3),
    ids=lambda value: getattr(value, "__name__", value),
)
def test_one_graph(call, backend):
    ssu_bridge.api._launchers.clear()
    torch._dynamo.reset()
    expected, a, nearest = model(2), model(2), model(2)
    if call in ROUNDED:  # the only states that a random number can round
        for given in (expected, a, nearest):
            given["state"] = given["state"].half()
    torch.manual_seed(11)
    got = torch.compile(call, backend=backend, fullgraph=True)(a, torch.zeros(2, H, P))
    torch.manual_seed(11)
    assert torch.equal(got, call(expected, torch.zeros(2, H, P)))
    assert torch.equal(a["state"], expected["state"])
    mamba_ssm.selective_state_update(**nearest, state_batch_indices=None if call in ROUNDED else TABLE)
    assert torch.equal(a["state"], nearest["state"]) == (call not in ROUNDED)
