"""Calls with a ReplayState and its cursor: errors, what comes back, single functions, transforms of the frameworks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from modes import bits, framework, to_host, to_mode

import ssu_bridge
from ssu_bridge.core import rounding
from ssu_bridge.core.quantized import unpaired
from ssu_bridge.testing.cases import Case

REPLAY = {"window": 5, "most": 3, "starts": (0, 7, 6, 2, 1, 4), "pending": (5, 2, 1, 3, 4, 0)}
CASE = Case("replay", tokens=2, nheads=4, headdim=4, dstate=8, ngroups=2, **REPLAY)
MODES = ("numpy", "torch", "jax", "jax.jit")
# A backend for each mode that runs anywhere.
BACKENDS = {"numpy": "reference", "torch": "reference", "jax": "xla", "jax.jit": "xla"}
INT32 = functools.partial(np.array, dtype="int32")


def call(mode, case=CASE, **changes):
    """Return the arguments of a call, some of them changed: NumPy arrays by kernels' names, else by those of update."""
    arrays = {**case.arrays(seed=1), **{n: a for n, a in changes.items() if isinstance(a, np.ndarray)}}
    rest = {n: a for n, a in changes.items() if not isinstance(a, np.ndarray)}
    return {**to_mode(arrays, mode, case.window), **case.flags, "backend": BACKENDS[mode], **rest}


def cursor_of(slots=6, window=5, tokens=3):
    return ssu_bridge.ReplayCursor.empty(slots, window, tokens)


def ones(*shape, dtype="float32"):
    return np.ones(shape, dtype)


WRONG = {
    "no cursor": ({"replay": None}, ValueError, "replay: expected a ReplayCursor with a ReplayState, got None"),
    "no cursor at all": ({"replay": 3}, TypeError, "replay: expected a ReplayCursor, got int"),
    "a cursor of other slots": (
        {"replay_start": INT32([0] * 5), "replay_pending": INT32([0] * 5)},
        ValueError,
        r"replay_start: expected a cursor of 6 slots.*got shape \(5,\): it belongs to another state",
    ),
    "half a cursor of other slots": (
        {"replay_pending": INT32([0] * 7)},
        ValueError,
        r"replay_pending: expected a cursor of 6 slots.*got shape \(7,\): it belongs to another state",
    ),
    "a cursor of int64": ({"replay_start": np.zeros(6, "int64")}, ValueError, "replay_start: expected dtype int32"),
    "rings of another length": (
        {"replay_x": ones(6, 4, 9, 4), "replay_B": ones(6, 2, 9, 8), "replay_dt": ones(6, 4, 8)},
        ValueError,
        "replay_(x|B): expected (a ring of 8 rows, the cursor's window 5 and its tokens 3, got 9|shape)",
    ),
    "a ring of other heads": ({"replay_x": ones(6, 3, 8, 4)}, ValueError, r"replay_x: expected shape \(6, 4, length, 4\), got \(6, 3, 8, 4\)"),
    "a ring of another dtype": (
        {"replay_x": ones(6, 4, 8, 4, dtype="float16")},
        ValueError,
        "replay_x: expected a ring of x's dtype float32, got float16",
    ),
    "a ring of B's in another dtype": (
        {"replay_B": ones(6, 2, 8, 8, dtype="float16")},
        ValueError,
        "replay_B: expected a ring of B's dtype float32, got float16",
    ),
    "dt of bfloat16 in the ring": (
        {"replay_dt": ones(6, 4, 8, dtype="float16")},
        ValueError,
        "replay_dt: expected dtype float32, got float16",
    ),
    "untied dt": ({"dt": ones(3, 2, 4, 4)}, ValueError, "dt: expected one number a head with a ReplayState"),
    "untied dt_bias": ({"dt_bias": ones(4, 4)}, ValueError, "dt_bias: expected one number a head with a ReplayState"),
    "untied A": ({"A": -ones(4, 4, 8)}, ssu_bridge.UnsupportedError, "A: a ReplayState replays .* is not tied"),
    "too many tokens": (
        {n: ones(3, 4, *s) for n, s in {"x": (4, 4), "z": (4, 4), "dt": (4,), "B": (2, 8), "C": (2, 8)}.items()},
        ValueError,
        "x: expected at most 3 tokens, which the cursor was made for, got 4",
    ),
    "destinations": ({"dst_state_batch_indices": INT32([1, 2, 3])}, ValueError, "dst_state_batch_indices: expected None"),
    "a 2-D table": ({"state_batch_indices": ones(3, 2, dtype="int32")}, ValueError, r"state_batch_indices: expected shape"),
    "accepted counts": (
        {"state_batch_indices": ones(3, 2, dtype="int32"), "num_accepted_tokens": INT32([1, 1, 1])},
        ValueError,
        "num_accepted_tokens: expected None with a ReplayState",
    ),
    "intermediates": ({"intermediate_states": ones(6, 2, 4, 4, 8)}, ValueError, "intermediate_states: expected None"),
    "a tree": ({"parent_tokens": ones(3, 2, dtype="int32")}, ValueError, "parent_tokens: expected None"),
    "fresh": ({"has_initial_state": ones(3, dtype="bool")}, ValueError, "has_initial_state: expected None"),
    "no update": ({"disable_state_update": True}, ValueError, "disable_state_update: expected False"),
    "rounded each": ({"round_each_token": True}, ValueError, "round_each_token: expected False with a ReplayState"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("mode", MODES)
def test_what_does_not_go_with_it_is_an_error_and_changes_nothing(mode, name):
    if framework(mode) == "jax" and name == "a cursor of int64":
        pytest.skip("JAX makes it one of int32")
    changes, error, message = WRONG[name]
    given = call(mode, **changes)
    before = {n: a for n, a in to_host(without(given), mode).items() if a is not None}
    with pytest.raises(error, match=message) as caught:
        ssu_bridge.update(**given) if mode != "jax.jit" else jitted(given)
    assert caught.type is error
    for array, old in zip(to_host(without(given), mode).values(), before.values(), strict=True):
        np.testing.assert_array_equal(bits(array), bits(old))


def without(given):
    """Return the arrays alone, by kernels' names."""
    if not isinstance(given["replay"], ssu_bridge.ReplayCursor):
        given = {name: value for name, value in given.items() if name != "replay"}
    return {n: a for n, a in unpaired(given).items() if hasattr(a, "shape")}


def jitted(given):
    arrays = {n: a for n, a in given.items() if hasattr(a, "shape") or isinstance(a, tuple | ssu_bridge.ReplayCursor)}
    rest = {n: a for n, a in given.items() if n not in arrays}
    return jax.jit(lambda arrays: ssu_bridge.update(**arrays, **rest))(arrays)


@pytest.mark.parametrize(
    ("window", "tokens", "error"), [(3, 4, ValueError), (3, 0, ValueError), (2.0, 1, TypeError), (True, 1, TypeError)]
)
def test_a_cursor_has_a_window_of_at_least_its_tokens(window, tokens, error):
    with pytest.raises(error, match="(window|tokens): expected"):
        cursor_of(window=window, tokens=tokens)


@pytest.mark.parametrize("mode", ["numpy", "torch", "jax"])
def test_a_plain_state_takes_no_cursor(mode):
    given = call(mode)
    with pytest.raises(TypeError, match="state: expected a ReplayState with replay, got .*to_replay makes one"):
        ssu_bridge.update(**{**given, "state": given["state"].checkpoint})


def test_a_state_without_heads_is_none():
    with pytest.raises(ValueError, match=r"state: expected shape \(slots, nheads, headdim, dstate\), got \(6, 4, 8\)"):
        ssu_bridge.to_replay(np.zeros((6, 4, 8), "float32"), 5, 3, 1)
    given = call("numpy")
    state = given["state"]._replace(checkpoint=np.zeros((6, 4, 8), "float32"))
    with pytest.raises(ValueError, match="state: expected a checkpoint of shape"):
        ssu_bridge.update(**{**given, "state": state})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokens": None}, TypeError, "tokens: expected either tokens or cu_seqlens"),
        ({"cu_seqlens": INT32([0, 1, 2, 3])}, TypeError, "tokens: expected either tokens or cu_seqlens"),
        ({"tokens": 4}, ValueError, "tokens: expected a number from 0 to 3, got 4"),
        ({"tokens": INT32([1, 2])}, ValueError, r"tokens: expected shape \(3,\), for 3 sequences, got \(2,\)"),
        ({"tokens": 1.0}, TypeError, "tokens: expected a numpy array"),
        ({"num_accepted": ones(3)}, ValueError, "num_accepted: expected dtype int32 or int64, got float32"),
        ({"slots": [1, 2, 3]}, TypeError, "slots: expected a numpy array"),
        ({"slots": ones(3, 1, dtype="int32")}, ValueError, r"slots: expected shape \(sequences,\), got \(3, 1\)"),
        ({"cursor": 3}, TypeError, "cursor: expected a ReplayCursor, got int"),
    ],
)
def test_wrong_arguments_of_advance(changes, error, message):
    given = {"cursor": cursor_of(), "slots": INT32([4, 0, 2]), "tokens": 2, **changes}
    with pytest.raises(error, match=message):
        ssu_bridge.advance_replay(given.pop("cursor"), given.pop("slots"), **given)


def test_a_cursor_of_another_state_materializes_nothing():
    given = call("numpy")
    for cursor in (cursor_of(slots=5), cursor_of(window=6)):
        with pytest.raises(ValueError, match="cursor: expected one of 6 slots and .* of 8,.* belongs to another state"):
            ssu_bridge.materialize(given["state"], cursor, INT32([0]), given["A"])


# --- The cursor ---


def test_a_cursor_of_numpy_becomes_one_of_jax():
    moved = ssu_bridge.advance_replay(cursor_of(), jnp.array([1, 2]), tokens=3)
    assert isinstance(moved.start, jax.Array)
    assert moved.pending.tolist() == [0, 3, 3, 0, 0, 0]
    given = call("jax")
    states = ssu_bridge.materialize(given["state"], cursor_of(), None, given["A"])
    np.testing.assert_array_equal(states, given["state"].checkpoint)


@pytest.mark.parametrize("mode", ["numpy", "torch", "jax"])
def test_the_cursor_moves_by_what_stays(mode):
    start, pending = INT32([0, 7, 6, 2, 1, 4]), INT32([5, 2, 1, 3, 4, 0])
    arrays = to_mode(
        {
            "x": start,
            "z": pending,
            "A": INT32([0, 1, 4, -1, 9]),
            "D": INT32([1, 3, 2, 3, 3]),
            "dt": INT32([0, 2, 9, 1, 1]),
        },
        mode,
    )
    cursor = ssu_bridge.ReplayCursor(arrays["x"], arrays["z"], 5, 3)
    after = ssu_bridge.advance_replay(cursor, arrays["A"], tokens=arrays["D"], num_accepted=arrays["dt"])
    assert (after is cursor) == (mode != "jax")
    got = to_host({"start": after.start, "pending": after.pending}, mode)
    # Slot 0 flushes and keeps none; slot 1 has just room for its three; slot 4 flushes, its count clamped to its two.
    assert got["start"].tolist() == [5, 7, 6, 2, 5, 4]
    assert got["pending"].tolist() == [0, 4, 1, 3, 2, 0]
    reset = ssu_bridge.reset_replay(after, arrays["A"])
    got = to_host({"start": reset.start, "pending": reset.pending}, mode)
    assert got["start"].tolist() == [0, 0, 6, 2, 0, 4]
    assert got["pending"].tolist() == [0, 0, 1, 3, 0, 0]
    all_reset = ssu_bridge.reset_replay(reset, None)
    assert not to_host({"start": all_reset.start}, mode)["start"].any()


@pytest.mark.parametrize("mode", ["numpy", "torch", "jax"])
def test_of_no_slots_nothing_is_read(mode):
    state = ssu_bridge.to_replay(to_mode({"x": np.zeros((0, 2, 3, 4), "float32")}, mode)["x"], 3, 2, 1)
    cursor = ssu_bridge.ReplayCursor.empty(0, 3, 2, like=state.checkpoint)
    slots, A = to_mode({"x": INT32([1, -1]), "A": -ones(2)}, mode).values()
    assert ssu_bridge.advance_replay(cursor, slots, tokens=1) is cursor
    assert ssu_bridge.reset_replay(cursor, slots) is cursor
    states = to_host({"x": ssu_bridge.materialize(state, cursor, slots, A)}, mode)["x"]
    np.testing.assert_array_equal(states, np.zeros((2, 2, 3, 4), "float32"))


@pytest.mark.parametrize("mode", ["numpy", "torch", "jax"])
def test_a_sequence_without_tokens_leaves_its_cursor_alone(mode):
    wild = INT32([-(2**31), 2**31 - 1])
    arrays = (
        to_mode({"x": wild, "z": wild, "A": np.array([2**40, 1, 0]), "D": INT32([3, 3, 2, 2])}, mode)
        if mode != "jax"
        else {
            "x": jnp.array(wild),
            "z": jnp.array(wild),
            "A": np.array([2**40, 1, 0]),
            "D": jnp.array(INT32([3, 3, 2, 2])),
        }
    )
    cursor = ssu_bridge.ReplayCursor(arrays["x"], arrays["z"], 5, 3)
    after = ssu_bridge.advance_replay(cursor, arrays["A"], cu_seqlens=arrays["D"])
    got = to_host({"start": after.start, "pending": after.pending}, mode)
    assert got["start"].tolist() == wild.tolist()
    assert got["pending"].tolist() == wild.tolist()


# --- What is stored ---


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "float8_e4m3fn", "int16"])
@pytest.mark.parametrize("seed", [None, 2**62 + 5])
def test_a_flush_rounds_the_materialized_state_once(dtype, seed):
    """By the random words of token 0 in the slot: element e has word e % 4 of the block e // 4."""
    if seed and dtype == "int16":
        return
    case = Case(
        "flush", tokens=2, nheads=4, headdim=4, dstate=8, ngroups=2, dtypes={"state": dtype}, seed=seed, **REPLAY
    )
    given = call("numpy", case)
    states = ssu_bridge.materialize(given["state"], given["replay"], None, given["A"])
    before = {n: a.copy() for n, a in unpaired(given).items() if isinstance(a, np.ndarray)}
    ssu_bridge.update(**given)
    after = unpaired(given)
    # Of the slots 4, 0 and 2 of the call, those with more than 5 - 2 pending tokens.
    for slot in range(6):
        stored = before["state"][slot], before["state_scale"][slot] if "state_scale" in before else None
        if slot in (4, 0):
            words = (
                None
                if seed is None
                else rounding.slot_words(slot, (4, 4, 8), 0, 0, rounding.key_of(np.array(seed)), 10)
            )
            exact = np.nextafter(states[slot], 0), states[slot], np.nextafter(states[slot], np.inf)
            allowed = [rounding.stored(value, dtype, words) for value in exact]
            equal = np.any([bits(numbers) == bits(after["state"][slot]) for numbers, _ in allowed], axis=0)
            assert equal.mean() > 0.98, (slot, equal.mean())  # float32 and float64 may round to either neighbour
        else:
            np.testing.assert_array_equal(bits(after["state"][slot]), bits(stored[0]))


@pytest.mark.parametrize("mode", ["numpy", "torch", "jax"])
def test_materialize_stops_at_a_number_of_tokens(mode):
    given = call(mode)
    slots = to_mode({"A": INT32([3, -1, 0, 9])}, mode)["A"]
    side = functools.partial(lambda a: to_host({"x": a}, mode)["x"])
    states = {}
    for count in (0, 1, 2, 99):
        tokens = to_mode({"A": INT32([count] * 4)}, mode)["A"]
        states[count] = side(ssu_bridge.materialize(given["state"], given["replay"], slots, given["A"], tokens=tokens))
    arrays = CASE.arrays(seed=1)
    np.testing.assert_array_equal(states[0][0], arrays["state"][3])
    assert not states[99][[1, 3]].any()
    np.testing.assert_array_equal(
        states[99], side(ssu_bridge.materialize(given["state"], given["replay"], slots, given["A"]))
    )
    # One token at a time, as update does on a plain state.
    rows = [(2 + i) % 8 for i in range(2)]
    state = arrays["state"][3:4].copy()
    for count, row in enumerate(rows, 1):
        x, B, dt = (arrays[f"replay_{n}"][3:4, :, row].copy() for n in ("x", "B", "dt"))
        ssu_bridge.update(state, x, dt, arrays["A"], B, B, backend="reference")
        np.testing.assert_allclose(states[count][0], state[0], 1e-5, 1e-5)


@pytest.mark.parametrize("mode", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_to_replay_keeps_the_state_and_makes_empty_rings(mode, dtype):
    state = call(mode, Case("plain", dtypes={"state": dtype}, **REPLAY))["state"].checkpoint
    made = ssu_bridge.to_replay(state, 5, 3, 2, "bfloat16")
    assert made.checkpoint is state
    assert [tuple(ring.shape) for ring in made[1:]] == [(6, 4, 8, 16), (6, 2, 8, 32), (6, 4, 8)]
    assert [str(ring.dtype).removeprefix("torch.") for ring in made[1:]] == ["bfloat16", "float32", "float32"]
    assert not any(to_host({"x": ring}, mode)["x"].any() for ring in made[1:])
    for changes in ({"ngroups": 3}, {"x_dtype": "int8"}, {"tokens": 6}):
        with pytest.raises(ValueError, match="(ngroups|x_dtype|tokens): expected"):
            ssu_bridge.to_replay(state, **{"window": 5, "tokens": 3, "ngroups": 2, **changes})


# --- JAX ---


def test_jax_donates_checkpoint_and_rings():
    given = call("jax")
    places = [array.unsafe_buffer_pointer() for array in given["state"]]
    _, state = ssu_bridge.update(**given)
    assert all(array.is_deleted() for array in given["state"])
    assert [array.unsafe_buffer_pointer() for array in state] == places
    kept = call("jax", donate=False)
    ssu_bridge.update(**kept)
    assert not any(array.is_deleted() for array in kept["state"])
    # A cursor serves all layers.
    assert not given["replay"].start.is_deleted()


def test_jax_scans_steps_and_has_no_gradient():
    given = call("jax")
    state, cursor = given.pop("state"), given.pop("replay")

    def token(carry, _):
        state, cursor = carry
        out, state = ssu_bridge.update(state, **given, replay=cursor)
        cursor = ssu_bridge.advance_replay(cursor, given["state_batch_indices"], tokens=2)
        return (state, cursor), out

    (after, moved), outs = jax.jit(lambda carry: jax.lax.scan(token, carry, None, length=6))((state, cursor))
    carry = jax.tree.map(jnp.copy, (state, cursor))
    for number in range(6):
        carry, out = token(carry, None)
        np.testing.assert_allclose(out, outs[number], 1e-5, 1e-5)
    np.testing.assert_array_equal(moved.pending, carry[1].pending)
    np.testing.assert_allclose(after.checkpoint, carry[0].checkpoint, 1e-5, 1e-5)
    for backend in ("xla", "auto"):
        loss = lambda x: ssu_bridge.update(carry[0], **{**given, "x": x, "backend": backend}, replay=carry[1])[0].sum()  # noqa: E731
        with pytest.raises(ssu_bridge.UnsupportedError, match="cannot be differentiated"):
            jax.grad(loss)(given["x"])


def test_jax_references_are_updated_in_place():
    given = call("jax")
    expected_out, expected = ssu_bridge.update(**call("jax"))
    refs = ssu_bridge.ReplayState(*map(jax.new_ref, given.pop("state")))
    out, after = ssu_bridge.update(refs, **given)
    assert all(map(lambda a, b: a is b, after, refs))
    np.testing.assert_allclose(out, expected_out, 1e-6, 1e-6)
    for ref, array in zip(refs, expected, strict=True):
        np.testing.assert_allclose(ref[...], array, 1e-6, 1e-6)


def test_xla_copies_neither_checkpoint_nor_rings():
    case = Case("large", sequences=4, slots=8, indices=(4, 0, 2, 6), nheads=8, headdim=64, dstate=128, ngroups=1, window=16, most=1,
                starts=(0,) * 8, pending=(3,) * 8)  # fmt: skip
    given = call("jax", case)
    state, cursor = given.pop("state"), given.pop("replay")
    run = jax.jit(lambda state, cursor: ssu_bridge.update(state, **given, replay=cursor), donate_argnums=0)
    text = run.lower(state, cursor).compile().as_text()
    for array in state[:3]:
        shape = ",".join(map(str, array.shape))
        assert f"f32[{shape}]" in text
        assert not [line for line in text.splitlines() if f" = f32[{shape}]" in line and " copy(" in line]


# --- Torch ---


def test_torch_compiles_a_decoding_step():
    given = call("torch")
    eager = call("torch")
    cursor, other = given.pop("replay"), eager.pop("replay")

    def decode(state, cursor, given):
        out, state = ssu_bridge.update(state, **given, replay=cursor)
        cursor = ssu_bridge.advance_replay(cursor, given["state_batch_indices"], tokens=2)
        return out, state, cursor

    compiled = torch.compile(decode, fullgraph=True, backend="eager")
    state, plain = given.pop("state"), eager.pop("state")
    for _ in range(4):
        out, same, moved = compiled(state, cursor, given)
        expected, _, _ = decode(plain, other, eager)
        assert torch.equal(out, expected)
    assert all(map(lambda a, b: a is b, same, state))
    assert torch.equal(cursor.pending, other.pending)
    assert torch.equal(moved.start, other.start)
    assert torch.equal(state.checkpoint, plain.checkpoint)


def test_steps_agree_in_every_mode():
    outs = {}
    for mode in MODES:
        given = call(mode)
        out, _ = jitted(given) if mode == "jax.jit" else ssu_bridge.update(**given)
        outs[mode] = to_host({"x": out}, mode)["x"]
        np.testing.assert_allclose(outs[mode], outs["numpy"], 1e-5, 1e-5, err_msg=mode)


@pytest.mark.parametrize("mode", ["numpy", "torch"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_an_empty_batch_whose_step_sizes_repeat_is_tied(mode, backend):
    """As one of some sequences is, whatever else the strides of an empty array say."""
    case = Case("empty", sequences=0, indices=(), window=2, most=1, starts=(0,) * 6, pending=(0,) * 6)
    given = to_mode(case.arrays(seed=0), mode, case.window)
    shape = (0, case.nheads, case.headdim)
    wide = given["dt"][..., None]
    given["dt"] = np.broadcast_to(wide, shape) if mode == "numpy" else wide.expand(shape)
    out, state = ssu_bridge.update(**given, **case.flags, backend=backend)
    assert tuple(out.shape) == shape
    assert state is given["state"]
