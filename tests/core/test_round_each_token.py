"""With ``round_each_token``, T tokens in one call are T calls of one token, to the bit, whatever the state's dtype."""

import numpy as np
import pytest
from modes import TOKENWISE, bits, convert, run

import ssu_bridge
from ssu_bridge.api import explain
from ssu_bridge.testing.cases import Case

BACKENDS = [
    ("numpy", "reference"),
    ("numpy", "cpu"),
    ("torch", "cpu"),
    ("jax", "cpu"),
    pytest.param("torch.cuda", "triton", marks=pytest.mark.gpu),
    pytest.param("jax", "triton", marks=pytest.mark.gpu),
]
FLOATS = ("bfloat16", "float16")
STATES = (*FLOATS, "float32", "int16", "int8", "float8_e4m3fn")
T = 4


def one_by_one(arrays, mode, backend, **flags):
    """Return the outputs and the states, scales too, after each of the tokens in calls of their own."""
    rest = {n: a for n, a in arrays.items() if not n.startswith("intermediate")}
    results = []
    for t in range(arrays["x"].shape[1]):
        token = {n: a[:, t] if n in TOKENWISE else a for n, a in rest.items()}
        results.append(run(token, mode, backend, **flags))
        rest |= {n: a for n, a in results[-1].items() if n != "out"}
    return results


def same(got, expected):
    np.testing.assert_array_equal(bits(got), bits(expected))


@pytest.mark.parametrize(("mode", "backend"), BACKENDS)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("untied", [(), ("A", "dt", "D", "dt_bias")], ids=["tied", "untied"])
def test_tokens_are_calls_of_one(untied, state, mode, backend):
    case = Case("each", tokens=T, steps=T, dtypes={"state": state}, untied=untied, headdim=7, dstate=24)
    arrays = case.arrays(seed=4)
    together = run(arrays, mode, backend, **case.flags, round_each_token=True)
    alone = one_by_one(arrays, mode, backend, **case.flags)
    for t, after in enumerate(alone):
        same(together["out"][:, t], after["out"])
    for name in (n for n in together if n.startswith("state")):
        same(together[name], alone[-1][name])
        kept = together[{"state": "intermediate_states", "state_scale": "intermediate_state_scales"}[name]]
        for slot in case.indices:
            same(kept[slot], np.stack([after[name][slot] for after in alone]))


@pytest.mark.parametrize(("mode", "backend"), BACKENDS)
@pytest.mark.parametrize("state", FLOATS)
def test_without_it_the_state_is_rounded_once(state, mode, backend):
    """Else the other tests would show nothing: that the state goes on unrounded makes a difference to these numbers."""
    case = Case("once", tokens=T, dtypes={"state": state})
    arrays = case.arrays(seed=4)
    once, each = (run(arrays, mode, backend, **case.flags, round_each_token=flag) for flag in (False, True))
    assert (bits(once["state"]) != bits(each["state"])).any()


@pytest.mark.parametrize(("mode", "backend"), BACKENDS)
@pytest.mark.parametrize("state", ["bfloat16", "int8"])
def test_packed_sequences_and_a_slot_for_each_token(state, mode, backend):
    tokens, slots = 3, 12
    case = Case("slots", tokens=tokens, slots=slots, indices=(4, 0, 2), dtypes={"state": state})
    arrays = case.arrays(seed=6)
    alone = one_by_one(arrays, mode, backend, **case.flags)
    table = np.array([[5, 1, 4], [6, 7, 8], [9, -1, 10]], "int32")
    packed = {n: a.reshape(-1, *a.shape[2:]) if n in TOKENWISE else a for n, a in arrays.items()}
    packed |= {"cu_seqlens": np.array([0, 3, 6, 9], "int32"), "dst_state_batch_indices": table}
    flags = {**case.flags, "pad_slot_id": -1, "round_each_token": True}
    for given in ({**arrays, "dst_state_batch_indices": table}, packed):
        got = run(given, mode, backend, **flags)
        same(got["out"].reshape(alone[0]["out"].shape[0], tokens, *got["out"].shape[-2:])[:, -1], alone[-1]["out"])
        for sequence, token in np.argwhere(table >= 0):
            same(got["state"][table[sequence, token]], alone[token]["state"][case.indices[sequence]])


@pytest.mark.parametrize(("mode", "backend"), BACKENDS)
@pytest.mark.parametrize("state", ["float16", "float8_e4m3fn"])
def test_a_pad_carries_on_as_a_slot_of_zeros(state, mode, backend):
    case = Case("pad", sequences=1, slots=2, indices=(0,), tokens=T, dtypes={"state": state})
    arrays = case.arrays(seed=8)
    fresh = {**arrays, "has_initial_state": np.array([False])}
    pad = {**arrays, "state_batch_indices": np.array([-1], "int32")}
    flags = {**case.flags, "pad_slot_id": -1, "round_each_token": True}
    got = run(pad, mode, backend, **flags)
    same(got["out"], run(fresh, mode, backend, **flags)["out"])
    same(got["state"], arrays["state"])


@pytest.mark.parametrize(("mode", "backend"), BACKENDS)
@pytest.mark.parametrize("state", ["bfloat16", "int16"])
def test_a_tree_is_its_branches(state, mode, backend):
    case = Case("tree", sequences=1, slots=4, indices=(2,), tokens=6, steps=6, dtypes={"state": state})
    arrays = {**case.arrays(seed=9), "parent_tokens": np.array([[-1, 0, 0, 2, 1, -1]], "int32")}
    together = run(arrays, mode, backend, **case.flags, round_each_token=True)
    without = {n: a for n, a in arrays.items() if n != "parent_tokens"}
    for path in ([0, 1, 4], [0, 2, 3], [5]):
        branch = {n: a[:, path] if n in TOKENWISE else a for n, a in without.items()}
        for token, after in zip(path, one_by_one(branch, mode, backend, **case.flags), strict=True):
            same(together["out"][:, token], after["out"])
            same(together["intermediate_states"][2, token], after["state"][2])


@pytest.mark.parametrize(("mode", "backend"), BACKENDS)
@pytest.mark.parametrize("state", ["bfloat16", "float16", "int8", "float8_e4m3fn"])
def test_a_random_state_is_rounded_once_for_all_its_places(state, mode, backend):
    """By the words of the slot that it goes to, else of the slot that was read: an entry holds the same numbers."""
    case = Case("random", tokens=T, steps=T, dtypes={"state": state}, seed=12)
    arrays = case.arrays(seed=7)
    got = run(arrays, mode, backend, **case.flags, round_each_token=True)
    for name, kept in (("state", "intermediate_states"), ("state_scale", "intermediate_state_scales")):
        for slot in case.indices if name in got else ():
            same(got[kept][slot, -1], got[name][slot])
    # The first token's words are those of a call of one token.
    first = {n: a[:, :1] if n in TOKENWISE else a for n, a in arrays.items() if not n.startswith("intermediate")}
    alone = run(first, mode, backend, **case.flags)
    for slot in case.indices:
        same(got["intermediate_states"][slot, 0], alone["state"][slot])


def test_xla_rounds_after_each_token_but_to_bits_of_its_own():
    """How XLA fuses and adds up depends on the rest of a program: a number may round to the neighbour of another's."""
    case = Case("xla", tokens=T, dtypes={"state": "bfloat16"})
    arrays = case.arrays(seed=4)
    each, once = (run(arrays, "jax", "xla", **case.flags, round_each_token=flag) for flag in (True, False))
    alone = one_by_one(arrays, "numpy", "cpu", **case.flags)[-1]["state"]
    differ = bits(each["state"]) != bits(alone)
    assert differ.mean() < 0.01 < (bits(once["state"]) != bits(alone)).mean()
    assert (np.abs(bits(each["state"])[differ].astype(int) - bits(alone)[differ]) == 1).all()
    assert "XLA" in str(explain(**convert(arrays, "jax"), **case.flags, round_each_token=True, backend="xla"))


def test_the_matrix_form_lacks_it():
    case = Case("lacking", tokens=2, dtypes={"state": "bfloat16"})
    arrays = case.arrays(seed=1)
    with pytest.raises(ssu_bridge.UnsupportedError, match="matrix form"):
        ssu_bridge.update(**arrays, **case.flags, round_each_token=True, algorithm="matrix", backend="cpu")


def test_the_configuration_and_the_argument():
    case = Case("configured", tokens=T, dtypes={"state": "bfloat16"})
    arrays = case.arrays(seed=4)
    each, once = (run(arrays, "numpy", "cpu", **case.flags, round_each_token=flag) for flag in (True, False))
    with ssu_bridge.using(round_each_token=True):
        same(run(arrays, "numpy", "cpu", **case.flags)["state"], each["state"])
        same(run(arrays, "numpy", "cpu", **case.flags, round_each_token=False)["state"], once["state"])
    same(run(arrays, "numpy", "cpu", **case.flags)["state"], once["state"])
    for wrong in (1, "yes", np.bool_(True)):
        with pytest.raises(TypeError, match="round_each_token: expected a bool"):
            ssu_bridge.update(**arrays, **case.flags, round_each_token=wrong)
