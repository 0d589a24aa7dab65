"""The drop-in for FlashInfer's checkpointing_ssu, against its rules written out in a loop, with its caller's bookkeeping."""

import pytest
import torch
from drop_ins import G, H, N, P, close, model, token, wide

import ssu_bridge
from ssu_bridge.compat.flashinfer import checkpointing_ssu

WINDOW, MOST, SLOTS = 4, 2, 6
LENGTH = WINDOW + MOST


@pytest.fixture(autouse=True, params=["reference", pytest.param("triton", marks=pytest.mark.gpu)])
def _backend(request):
    device = "cuda" if request.param == "triton" else "cpu"
    with ssu_bridge.using(backend=request.param), torch.device(device):
        yield


def rings(fill=float("nan")):
    shapes = {"x_cache": (SLOTS, H, LENGTH, P), "B_cache": (SLOTS, G, LENGTH, N), "dt_cache": (SLOTS, H, LENGTH)}
    return {name: torch.full(shape, fill) for name, shape in shapes.items()}


def arguments(*rows, **kinds):
    """Those of ``model``, with one decay a head in memory, too."""
    a = model(*rows, **kinds)
    return a | {"A": a["A"][:, 0, 0].contiguous()[:, None, None].expand(H, P, N)}


def cursor(start=0):
    """The rings' first rows, here those of caches with other fields, and how many tokens are pending."""
    return torch.full((SLOTS, 3), start, dtype=torch.int32)[:, 1], torch.zeros(SLOTS, dtype=torch.int32)


def advance(start, pending, slot, count, accepted):
    """What FlashInfer asks of its caller after a call."""
    if pending[slot] + count > WINDOW:
        start[slot], pending[slot] = (start[slot] + pending[slot]) % LENGTH, accepted
    else:
        pending[slot] += accepted


@pytest.mark.parametrize("packed", [True, False])
def test_steps_with_rejected_drafts(packed):
    layer = arguments(1, slots=SLOTS)
    state = layer["state"]
    exact, kept = state.double(), rings()
    start, pending = cursor(start=5)
    for number in range(12):
        lengths = [2, 0, 1] if packed and number % 2 else [2, 2, 2]
        slots = torch.tensor([4, 1, -1], dtype=torch.int32)
        given = arguments(sum(lengths), slots=1, seed=number) | {n: layer[n] for n in ("A", "D", "dt_bias")}
        del given["state"]
        rows = {name: given[name] for name in ("x", "dt", "B", "C", "z")}
        shaped = {n: t[None] if packed else t.unflatten(0, (3, 2)) for n, t in rows.items()}
        out = torch.full_like(shaped["x"], torch.nan)
        edges = torch.tensor([0, *lengths]).cumsum(0).int()
        more = {"cu_seqlens": edges, "max_seqlen": MOST} if packed else {}
        result = checkpointing_ssu(
            state, *kept.values(), start, pending, **{**given, **shaped}, out=out, dt_softplus=True,
            state_batch_indices=slots, algorithm="monolith", enable_pdl=True, **more,
        )  # fmt: skip
        assert result is out
        a, out = wide(given), out.reshape(-1, H, P)
        for i, slot in enumerate(slots.tolist()):
            S = exact[slot] if slot >= 0 else torch.zeros(H, P, N).double()
            accepted = (number + i) % (lengths[i] + 1)
            for t in range(lengths[i]):
                y, S = token(a, int(edges[i]) + t, S)
                close(out[int(edges[i]) + t], y)
                if slot >= 0 and t < accepted:
                    exact[slot] = S
            if slot >= 0 and lengths[i]:
                advance(start, pending, slot, lengths[i], accepted)
    for slot in (4, 1):
        checkpoint = ssu_bridge.ReplayState(state, *kept.values())
        at = ssu_bridge.ReplayCursor(start, pending, WINDOW, MOST)
        close(ssu_bridge.materialize(checkpoint, at, torch.tensor([slot]), given["A"])[0], exact[slot])


def calls():
    """The arguments of a call that writes the checkpoints, with four tokens pending."""
    a, seeded = arguments(2, MOST, slots=SLOTS), torch.Generator("cpu").manual_seed(1)
    kept = {name: torch.rand(ring.shape, generator=seeded, device="cpu").to(ring) for name, ring in rings().items()}
    start, pending = cursor(start=3)
    a |= kept | {"ring_start": start, "prev_num_accepted_tokens": pending + 4, "out": torch.empty(2, MOST, H, P)}
    return a


def copied(given):
    return {name: tensor.clone() for name, tensor in given.items()} | {
        name: given[name] for name in ("A", "dt", "D", "dt_bias")
    }


def test_quantised():
    a, b = calls(), copied(calls())
    values, scale = ssu_bridge.QuantizedState.quantize(a.pop("state"), torch.int8)
    b["state"] = ssu_bridge.QuantizedState(values.clone(), scale.clone()).dequantize()
    before = values.clone()
    checkpointing_ssu(values, **a, state_scale=scale)
    checkpointing_ssu(**b)
    close(a["out"], b["out"].double())
    assert not torch.equal(values[:2], before[:2])
    assert torch.equal(values[2:], before[2:])
    error = (values.float() * scale[..., None] - b["state"]).abs()[:2]
    assert (error <= scale[:2, ..., None] * 0.51).all()


def test_rings_with_gaps_are_copied_and_written_back():
    a, b = calls(), copied(calls())
    for name in ("x_cache", "B_cache", "dt_cache"):
        roomy = torch.full((SLOTS, *a[name].shape[1:2], LENGTH + 3, *a[name].shape[3:]), 7.0)
        roomy[:, :, :LENGTH] = a[name]
        a[name] = roomy[:, :, :LENGTH]
    with pytest.warns(RuntimeWarning) as caught:
        checkpointing_ssu(**a)
    assert [str(w.message).split(",")[0] for w in caught] == [
        f"{name}: copied as a whole" for name in ("replay_x", "replay_B", "replay_dt")
    ]
    checkpointing_ssu(**b)
    for name in ("state", "out", "x_cache", "B_cache", "dt_cache"):
        assert torch.equal(a[name], b[name]), name


def test_seed():
    states = []
    for rounds in (10, 10, 7):
        a = calls()
        states.append(a.pop("state").half())
        checkpointing_ssu(states[-1], **a, rand_seed=torch.tensor([123]), philox_rounds=rounds)
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"algorithm": "simple"}, "algorithm: expected auto, monolith, two-kernel, got 'simple'"),
        ({"max_seqlen": 2}, "max_seqlen: expected a number with cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 2, 4])}, "max_seqlen: expected a number with cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 2, 4]), "max_seqlen": 2}, r"x: expected shape \(1, rows, nheads, dim\)"),
        ({"x": torch.zeros(2, H, P)}, r"x: expected four axes, got shape \(2, 4, 8\)"),
        ({"B": torch.zeros(2, MOST, G, N).half()}, "B: expected x's dtype"),
        ({"x_cache": torch.zeros(SLOTS, H, 3, P)}, "tokens: expected a number from 1 to window = 1"),
        ({"dt": torch.zeros(2, MOST, H, P)}, "dt: expected one number a head"),
        ({"rand_seed": torch.tensor([1]), "philox_rounds": 0}, "philox_rounds: expected at least 1, got 0"),
    ],
)
def test_wrong(changes, says):
    a = calls()
    changes = {n: v.to(a["x"].device) if isinstance(v, torch.Tensor) else v for n, v in changes.items()}
    before = copied(a)
    with pytest.raises(ValueError, match=says):
        checkpointing_ssu(**{**a, **changes})
    for name, tensor in a.items():
        assert torch.equal(tensor, before[name]) or name == "out"


def test_windows_that_flashinfer_refuses_are_for_the_backend():
    a = calls()
    roomy = {name: torch.zeros(SLOTS, *a[name].shape[1:2], 22, *a[name].shape[3:]) for name in ("x_cache", "B_cache")}
    checkpointing_ssu(**{**a, **roomy, "dt_cache": torch.zeros(SLOTS, H, 22)})
    assert roomy["x_cache"][:2].any()
