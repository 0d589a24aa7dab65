"""The drop-ins: each peer's own order of arguments and defaults, and what all have in common."""

import inspect
import warnings

import pytest
import torch
from drop_ins import H, N, P, model

from ssu_bridge.compat import flashinfer, mamba_ssm, vllm

pytestmark = pytest.mark.usefixtures("each_drop_in_backend")

ORDERS = {
    mamba_ssm: "state x dt A B C D=None z=None dt_bias=None dt_softplus=False state_batch_indices=None",
    vllm: (
        "state x dt A B C D dt_bias z=None dt_softplus=False state_batch_indices=None dst_state_batch_indices=None "
        "null_block_id=0 out=None num_accepted_tokens=None cu_seqlens=None is_blackwell=False "
        "enable_stochastic_rounding=False cache_philox_rounds=0"
    ),
    flashinfer: (
        "state x dt A B C D z=None dt_bias=None dt_softplus=False state_batch_indices=None pad_slot_id=-1 "
        "state_scale=None out=None disable_state_update=False intermediate_states_buffer=None "
        "intermediate_state_indices=None intermediate_state_scales=None rand_seed=None philox_rounds=10 cache_steps=0 "
        "algorithm='auto' dst_state_batch_indices=None cu_seqlens=None num_accepted_tokens=None backend='auto'"
    ),
}


@pytest.mark.parametrize("peer", ORDERS)
def test_the_order_and_the_defaults(peer):
    parameters = inspect.signature(peer.selective_state_update).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    spelt = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in positional]
    assert " ".join(spelt) == ORDERS[peer]


def spread(tensor):
    """The same numbers in every other place of a larger tensor."""
    return torch.stack([tensor, torch.full_like(tensor, float("nan"))], -1)[..., 0]


def run(peer, a, **more):
    """Call a peer's function; return its output."""
    if peer is not vllm:
        return peer.selective_state_update(**a, **more)
    out = torch.full_like(a["x"], float("nan"), memory_format=torch.contiguous_format)
    vllm.selective_state_update(**a, out=out, **more)
    return out


@pytest.mark.parametrize("peer", ORDERS)
def test_any_layout_of_the_inputs(peer):
    a = model(2, tied=False)
    apart = {name: spread(tensor) for name, tensor in a.items() if name != "state"}
    assert not any(tensor.is_contiguous() for tensor in apart.values())
    apart["D"] = torch.ones(()).expand(H, P)
    expected = run(peer, {**a, "D": torch.ones(H, P), "state": a["state"].clone()})
    assert torch.equal(run(peer, {**a, **apart}), expected)


@pytest.mark.parametrize("peer", ORDERS)
def test_a_state_in_any_layout_is_updated_in_place(peer):
    a = model(2)
    state = spread(a["state"])
    apart = {**a, "state": state}
    with pytest.warns(RuntimeWarning, match="state: copied as a whole"):
        out = run(peer, apart)
    assert torch.equal(out, run(peer, a))
    assert torch.equal(state, a["state"])  # which the second call changed
    padded = torch.zeros(8, H * P * N + 8)
    padded[:, 8:] = model(2)["state"].flatten(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(peer, {**a, "state": padded[:, 8:].unflatten(1, (H, P, N))})  # a gap behind each slot costs nothing
    assert torch.equal(padded[:, 8:].unflatten(1, (H, P, N)), a["state"])


@pytest.mark.parametrize("peer", [vllm, flashinfer])
@pytest.mark.parametrize("layout", [spread, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)])
def test_an_output_in_any_layout(peer, layout):
    a = model(3)
    expected = run(peer, {**a, "state": a["state"].clone()})
    out = layout(torch.full((3, H, P), float("nan")))
    assert not out.is_contiguous()
    result = peer.selective_state_update(**a, out=out)
    assert result is (out if peer is flashinfer else None)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)],
)
def test_an_output_of_another_dtype_is_rounded_once(dtype, wanted):
    a = model(3)
    a["x"] = a["x"].to(dtype)
    exact = run(vllm, {**a, "x": a["x"].float(), "state": a["state"].clone()})
    out = torch.full((3, H, P), float("nan"), dtype=wanted)
    vllm.selective_state_update(**a, out=out)
    assert torch.equal(out, exact.to(wanted))


def test_targets_that_overlap_themselves_and_other_dtypes_change_nothing():
    a = model(2)
    kept = a["state"].clone()
    targets = [
        torch.zeros(2, H, 1).expand(2, H, P),
        *(torch.zeros(2, H, P, dtype=d) for d in (torch.int32, torch.double)),
    ]
    for out in targets:
        with pytest.raises(ValueError, match="out: expected"):
            vllm.selective_state_update(**a, out=out)
        assert torch.equal(a["state"], kept)
        assert not out.any()
    out, state = torch.zeros(2, H, P), torch.zeros(8, H, P, 1).expand(8, H, P, N)
    with pytest.raises(ValueError, match="state: expected"):
        vllm.selective_state_update(**{**a, "state": state}, out=out)
    assert not out.any()
    assert not state.any()


def test_a_state_that_is_only_read_is_not_written_either():
    a = model(2)
    state = torch.ones(8, H, P, 1).expand(8, H, P, N)
    version = state._version
    expected = flashinfer.selective_state_update(**{**a, "state": state.contiguous()})
    with pytest.warns(RuntimeWarning, match="state: copied as a whole"):
        out = flashinfer.selective_state_update(**{**a, "state": state}, disable_state_update=True)
    assert torch.equal(out, expected)
    assert state._version == version


def test_rows_of_no_sequence_stay_as_they_are_in_a_copied_output():
    a = model(4)
    out = spread(torch.full((4, H, P), 5.0))
    vllm.selective_state_update(**a, out=out, cu_seqlens=torch.tensor([1, 2, 3], dtype=torch.int32))
    assert (out[[0, 3]] == 5).all()
    assert (out[1:3] != 5).all()
