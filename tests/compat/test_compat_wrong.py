"""Wrong arguments of the drop-ins: what raises has written nothing, and names the argument."""

import numpy as np
import pytest
import torch
from drop_ins import H, N, P, model
from modes import bits
from torch._subclasses import FakeTensorMode

import ssu_bridge
from ssu_bridge.compat import flashinfer, mamba_ssm, vllm

PEERS = (mamba_ssm, vllm, flashinfer)


def right(peer, out=None):
    """The arguments of a right call: two sequences in eight slots."""
    a = {**model(2), "state_batch_indices": torch.tensor([3, 1])}
    return a if peer is mamba_ssm else {**a, "out": torch.full((2, H, P), 7.0) if out is None else out}


def fake(tensor):
    return FakeTensorMode().from_tensor(tensor)


def lost(tensor):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def overlapping(tensor):
    """A tensor of the same shape, whose elements lie on each other."""
    return torch.zeros(2 * tensor.numel()).as_strided(tensor.shape, (1,) * tensor.dim())


def tangent(tensor):
    return torch.autograd.forward_ad.make_dual(tensor.contiguous(), torch.ones(tensor.shape))


INPUTS = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "state_batch_indices", "out")
FLOATS = tuple(name for name in INPUTS if name != "state_batch_indices")
# What is wrong, with which arguments, how, and the error that it raises.
WRONG = {
    "another dtype": (INPUTS, lambda t: t.to(torch.int16), ValueError),
    "another size": (FLOATS, lambda t: torch.cat([t, t], -1), ValueError),
    "no axes": (INPUTS, lambda t: t.flatten()[0], ValueError),
    "an array of NumPy": (("A", "B", "C", "D", "z", "state_batch_indices"), lambda t: t.numpy(), TypeError),
    "a fake tensor": (FLOATS, fake, TypeError),
    "no memory": (INPUTS, lost, ValueError),
    "on the meta device": (INPUTS, lambda t: t.to("meta"), ValueError),
    "functional": (INPUTS, torch._to_functional_tensor, ValueError),
    "sparse": (FLOATS, lambda t: t.contiguous().to_sparse(), ValueError),
    "quantised": (FLOATS, lambda t: torch.quantize_per_tensor(t.contiguous(), 0.1, 0, torch.qint8), ValueError),
    "requires grad": (("state", "x", "dt", "B", "C", "z", "out"), lambda t: t.clone().requires_grad_(), ssu_bridge.UnsupportedError),
    "a tangent": (FLOATS, tangent, ssu_bridge.UnsupportedError),
    "overlapping itself": (("state", "out"), overlapping, ValueError),
}  # fmt: skip


def values(arguments):
    """Copy the bits of every tensor that has some."""
    plain = {n: t for n, t in arguments.items() if type(t) is torch.Tensor and t.layout == torch.strided}
    plain = {n: t for n, t in plain.items() if not (t.is_quantized or t.is_meta or torch._is_functional_tensor(t))}
    return {n: bits(t.detach().numpy().copy()) for n, t in plain.items() if t.untyped_storage().nbytes()}


def assert_nothing_written(peer, arguments, errors, match):
    before = values(arguments)
    assert len(before) >= 8
    with pytest.raises(errors, match=match):
        peer.selective_state_update(**arguments)
    for name, now in values(arguments).items():
        np.testing.assert_array_equal(now, before[name], err_msg=name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.__name__.rpartition(".")[2])
def test_what_raises_has_written_nothing(peer, wrong, repeated):
    names, spoil, errors = WRONG[wrong]
    if repeated:
        peer.selective_state_update(**right(peer))
    with torch.autograd.forward_ad.dual_level():
        for name in [name for name in names if name in right(peer)]:
            arguments = right(peer)
            arguments[name] = spoil(arguments[name])
            assert_nothing_written(peer, arguments, errors, rf"^({'|'.join(INPUTS)})\b")


@pytest.mark.parametrize("b", [1, 2, 3])
def test_a_column_of_indices_is_refused_by_mamba_ssm(b):
    a = {**model(b), "state_batch_indices": torch.arange(b)[:, None]}
    message = rf"state_batch_indices: expected one axis, \(batch,\), got shape \({b}, 1\)"
    assert_nothing_written(mamba_ssm, a, ValueError, message)


@pytest.mark.parametrize("peer", [vllm, flashinfer])
@pytest.mark.parametrize("table", ["state_batch_indices", "dst_state_batch_indices"])
def test_a_table_with_an_axis_too_many(peer, table):
    a = {**right(peer), table: torch.zeros(2, 1, 1, dtype=torch.int64)}
    assert_nothing_written(peer, a, ValueError, f"{table}: expected shape")


def test_a_state_of_another_rank():
    for peer in PEERS:
        a = {**right(peer), "state": torch.zeros(8, 1, H, P, N)}
        assert_nothing_written(peer, a, ValueError, "state: expected shape")
