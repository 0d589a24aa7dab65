"""The drop-in for mamba_ssm, against its rules written out."""

import pytest
import torch
from drop_ins import H, N, P, close, model, token, wide

from ssu_bridge.compat import mamba_ssm

pytestmark = pytest.mark.usefixtures("each_drop_in_backend")


@pytest.mark.parametrize("tied", [True, False])
def test_one_token(tied):
    a = model(3, tied=tied)
    exact, held = wide(a), a["state"].clone()
    indices = torch.tensor([5, -7, 0])
    order = [a[n] for n in ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    out = mamba_ssm.selective_state_update(*order, True, indices)
    for row, slot in ((0, 5), (2, 0)):
        y, state = token(exact, row, exact["state"][slot])
        close(out[row], y)
        close(a["state"][slot], state)
    assert torch.equal(out[1], torch.zeros(H, P))  # a pad's output is zero, and its state is kept
    untouched = [1, 2, 3, 4, 6, 7]
    assert torch.equal(a["state"][untouched], held[untouched])


def test_for_mamba1_keeps_the_rank():
    state, x, dt = (torch.randn(*shape) for shape in ((2, P, N), (2, P), (2, P)))
    A, B, C = -torch.rand(P, N), torch.randn(2, N), torch.randn(2, N)
    before = state.clone().double()
    out = mamba_ssm.selective_state_update(state, x, dt, A, B, C)
    assert out.shape == x.shape
    d = dt.double()[..., None]
    after = before * torch.exp(A.double() * d) + d * x.double()[..., None] * B.double()[:, None]
    close(state, after)
    close(out, (after * C.double()[:, None]).sum(-1))
