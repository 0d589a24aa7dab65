"""The native CPU kernel from a checkpoint and rings: against float64, and to the bit what it stores and what it must not."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from native import (
    BF16,
    F16,
    F32,
    FP8,
    INT8,
    INT16,
    ISAS,
    ORDER,
    ROUNDABLE,
    cpu_kernel,
    loaded,
    run_all,
    run_script,
    same_bits,
    stored,
    view,
)

from ssu_bridge.core.rounding import key_of, slot_words
from ssu_bridge.native import library

HELPERS = str(Path(__file__).parents[1] / "helpers")
STATES = (F32, BF16, F16, INT16, INT8, FP8)
EXTREMES = (-(2**31), -7, 2**31 - 1)
# Half a unit in the last place of each dtype, and what float32 sums are wrong by.
ROUNDING = {F32: 1e-5, BF16: 4.0e-3, F16: 5.0e-4}
# Of a call, what has a row for each sequence.
TOKENWISE = ("x", "dt", "B", "C", "z", "state_batch_indices")


def call(
    rng, form="multi", b=3, tokens=2, heads=4, rows=8, columns=16, groups=2, slots=6, state=F32, other=F32,
    replay=(5, 3), pending=None, **options,
):  # fmt: skip
    """Return the arguments of a call with a checkpoint, by name; what is not pending is NaN."""

    def normal(*shape, dtype=other):
        return rng.standard_normal(shape, dtype=np.float32).astype(dtype)

    at, length = {"single": (b,), "multi": (b, tokens), "packed": (tokens,)}[form], sum(replay)
    values, scale = stored(normal(slots, heads, rows, columns, dtype=F32), state)
    start = rng.integers(0, length, slots).astype(np.int32)
    count = rng.integers(0, replay[0] + 1, slots) if pending is None else np.full(slots, pending)
    rings = {
        "replay_x": normal(slots, heads, length, rows),
        "replay_B": normal(slots, groups, length, columns),
        "replay_dt": np.abs(normal(slots, heads, length, dtype=F32)),
    }
    for slot in range(slots):
        rest = (start[slot] + np.arange(count[slot], length)) % length
        for ring in rings.values():
            ring[slot, :, rest] = np.nan
    arguments = {
        "state": values,
        "x": normal(*at, heads, rows),
        "dt": normal(*at, heads),
        "A": -np.exp(normal(heads, dtype=F32)),
        "B": normal(*at, groups, columns),
        "C": normal(*at, groups, columns),
        "D": normal(heads),
        "z": normal(*at, heads, rows),
        "dt_bias": normal(heads),
        "state_batch_indices": rng.permutation(slots)[:b].astype(np.int64 if b % 2 else np.int32),
        "state_scale": scale,
        **rings,
        "replay_start": start,
        "replay_pending": count.astype(np.int32),
        **options,
    }
    return {name: value for name, value in arguments.items() if value is not None}


def in_order(arguments):
    return [name for name in ORDER if name in arguments]


def sequences(a, replay, pad):
    """Yield the rows of x, the slot or None, the first pending row and the number of pending ones of each sequence."""
    packed = "cu_seqlens" in a
    for i in range(len(a["cu_seqlens"]) - 1 if packed else len(a["x"])):
        if packed:
            first, end = np.clip(a["cu_seqlens"][i : i + 2].astype(object), 0, len(a["x"]))
            rows = [(row,) for row in range(first, min(max(first, end), first + replay[1]))]
        else:
            rows = [(i, t) for t in range(a["x"].shape[1])] if a["x"].ndim == 4 else [(i,)]
        slot = int(a["state_batch_indices"][i]) if "state_batch_indices" in a else i
        if slot == pad or not 0 <= slot < len(a["state"]):
            yield rows, None, 0, 0
        else:
            start, pending = int(a["replay_start"][slot]) % sum(replay), int(a["replay_pending"][slot])
            yield rows, slot, start, min(max(pending, 0), replay[0])


def expected(a, replay=(5, 3), softplus=True, pad=-1):
    """Return out in float64, NaN where a row belongs to no sequence; the rings; and the checkpoints that are written."""
    wide = {name: array.astype(np.float64) for name, array in a.items() if array.dtype.kind != "i" and name != "state"}
    rings = {name: a[name].copy() for name in ("replay_x", "replay_B", "replay_dt")}
    out, flushed = np.full(a["x"].shape, np.nan), {}

    def advanced(state, x, B, d):
        B = np.repeat(B, len(x) // len(B), axis=0)
        return state * np.exp(wide["A"] * d)[:, None, None] + (d[:, None] * x)[..., None] * B[:, None]

    for rows, slot, start, pending in sequences(a, replay, pad):
        state = np.zeros(a["state"].shape[1:])
        if slot is not None:
            state = loaded(a["state"][slot], a["state_scale"][slot] if "state_scale" in a else None).astype(np.float64)
        for k in range(pending):
            at = (slot, slice(None), (start + k) % sum(replay))
            state = advanced(state, *(wide[name][at] for name in ("replay_x", "replay_B", "replay_dt")))
        if slot is not None and rows and pending + len(rows) > replay[0]:
            flushed[slot] = state
        for k, row in enumerate(rows):
            x = wide["x"][row]
            d = wide["dt"][row] + wide.get("dt_bias", 0)
            d = np.where(d > 20, d, np.log1p(np.exp(np.minimum(d, 20)))) if softplus else d
            state = advanced(state, x, wide["B"][row], d)
            C = np.repeat(wide["C"][row], len(x) // len(wide["C"][row]), axis=0)
            y = (state * C[:, None]).sum(-1) + (wide["D"][:, None] * x if "D" in a else 0)
            out[row] = y * wide["z"][row] / (1 + np.exp(-wide["z"][row])) if "z" in a else y
            if slot is not None:
                at = (slot, slice(None), (start + pending + k) % sum(replay))
                rings["replay_x"][at], rings["replay_B"][at], rings["replay_dt"][at] = a["x"][row], a["B"][row], d
    return out, rings, flushed


def in_float32(a):
    """Return the same call with a checkpoint in float32, which is stored as it is computed."""
    state = loaded(a["state"], a.get("state_scale")).astype(np.float32)
    return {**{n: v for n, v in a.items() if n not in ("state_scale", "rand_seed")}, "state": state}


def check(a, isa="auto", replay=(5, 3), rounds=10, **options):
    """Compare a call with float64; a checkpoint is rounded as the same one in float32 is, what is not written is kept."""
    results = run_all(a, isa, replay=replay, rounds=rounds, **options)
    out, rings, flushed = expected(a, replay, **options)
    close = ROUNDING[a["x"].dtype]
    np.testing.assert_allclose(results["out"].astype(np.float64), out, close, close * a["state"].shape[-1] ** 0.5)
    for name in ("replay_x", "replay_B"):
        assert same_bits(results[name], rings[name]), name
    np.testing.assert_allclose(results["replay_dt"], rings["replay_dt"], 1e-6)
    is_old = results["replay_dt"].view("i4") == a["replay_dt"].view("i4")
    assert (is_old | (results["replay_dt"] != a["replay_dt"])).all()

    exact = run_all(in_float32(a), isa, replay=replay, **options)["state"]
    for slot in range(len(a["state"])):
        values, scale = a["state"][slot], a["state_scale"][slot] if "state_scale" in a else None
        if slot in flushed:
            np.testing.assert_allclose(exact[slot], flushed[slot], 1e-5, 1e-5)
            seed = a.get("rand_seed")
            words = None if seed is None else slot_words(slot, exact[slot].shape, 0, 0, key_of(seed), rounds)
            values, scale = stored(exact[slot], a["state"].dtype, words)
        assert same_bits(results["state"][slot], values), slot
        assert scale is None or same_bits(results["state_scale"][slot], scale), slot
    return results, flushed


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("other", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("state", STATES, ids=str)
def test_dtypes(rng, state, other, isa):
    for form in ("single", "multi"):
        for pending in (0, 3, 5):
            _, flushed = check(call(rng, form, state=state, other=other, pending=pending), isa)
            assert len(flushed) == (3 if pending == 5 else 0)
        check(call(rng, form, state=state, other=other), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("state", (F32, BF16, F16, INT8), ids=str)
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (5, 3), (3, 17), (7, 31), (13, 33), (2, 47), (600, 16), (37, 128), (64, 130)]
)
def test_sizes(rng, rows, columns, state, isa):
    for pending in (2, 5):
        sizes = {"b": 2, "heads": 2, "slots": 3, "rows": rows, "columns": columns}
        check(call(rng, state=state, pending=pending, **sizes), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("window", "tokens"), [(1, 1), (2, 1), (4, 4), (16, 1), (17, 5), (32, 32), (100, 3)])
def test_windows(rng, window, tokens, isa):
    for pending in {0, 1, window // 2, window - 1, window}:
        arguments = call(rng, tokens=tokens, replay=(window, tokens), pending=pending, state=BF16)
        check(arguments, isa, replay=(window, tokens))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("state", ROUNDABLE, ids=str)
def test_a_flush_is_rounded_stochastically(rng, state, isa):
    for seed, rounds, columns in (((3, 4), 10, 16), ((2**32 - 1, 7), 4, 19)):
        seed = np.array(seed, np.uint32)
        arguments = call(rng, rows=21, columns=columns, state=state, pending=4, rand_seed=seed)
        assert len(check(arguments, isa, rounds=rounds)[1]) == 3


@pytest.mark.parametrize("absent", ["D", "z", "dt_bias", "state_batch_indices", "D z dt_bias state_batch_indices"])
def test_absent_arguments(rng, absent):
    for softplus in (True, False):
        check(call(rng, **dict.fromkeys(absent.split())), softplus=softplus)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_packed(rng, dtype, isa):
    highest = np.iinfo(dtype).max
    for edges in ([0, 3, 3, 4, 9], [1, 9, 9, 9, 9], [-5, 2, highest, 3, 0], [9, 9, 2, 4, 5]):
        given = {"cu_seqlens": np.array(edges, dtype), "tokens": 9, "b": 4}
        for state in (F32, INT8):
            check(call(rng, "packed", state=state, **given), isa)


@pytest.mark.parametrize("isa", ISAS)
def test_any_number_in_cursor_and_slots(rng, isa):
    """With guard bytes around all that is written; rows that are not pending of such a cursor hold numbers here."""
    for draw in range(30):
        arguments = call(rng, b=4, rows=3, columns=5, state=STATES[draw % 6])
        for name in ("replay_start", "replay_pending"):
            arguments[name] = rng.choice([*EXTREMES, -1, *range(10)], 6).astype(np.int32)
        for name in ("replay_x", "replay_B", "replay_dt"):
            arguments[name] = rng.uniform(0, 1, arguments[name].shape).astype(np.float32)
        slots = rng.permutation([*EXTREMES, -1, *range(8)])[:4]
        arguments["state_batch_indices"] = slots.astype(np.int32 if draw % 2 else np.int64)
        check(arguments, isa, pad=int(rng.choice([-1, 3, 7])))


def test_duplicate_slots_are_safe(rng):
    for state in (F32, INT8):
        same = np.zeros(8, np.int32)
        sizes = {"b": 8, "heads": 8, "rows": 64, "columns": 128, "slots": 2, "state": state, "pending": 4}
        arguments = call(rng, state_batch_indices=same, **sizes)
        results = run_all(arguments, replay=(5, 3))
        for name in results.keys() - {"out"}:
            assert same_bits(results[name][1], arguments[name][1]), name


def test_pads_read_no_slot(rng):
    arguments = call(rng, state_batch_indices=np.array([-1, 6, -1]))
    arguments["state"][:] = np.nan
    results, _ = check(arguments)
    assert np.isfinite(results["out"]).all()


def test_without_slots(rng):
    check(call(rng, slots=0, state_batch_indices=np.array([0, 5, -1])))


@pytest.mark.parametrize("empty", [{"b": 0}, {"tokens": 0}], ids=str)
def test_empty(rng, empty):
    arguments = call(rng, pending=5, **empty)
    results = run_all(arguments, replay=(5, 3))
    assert all(same_bits(results[name], arguments[name]) for name in results.keys() - {"out"})


@pytest.mark.parametrize("isa", ISAS)
def test_numbers_that_are_not_finite(rng, isa):
    """They stay in their head, a NaN of any bits is one in a checkpoint too, and the rings get tokens bit by bit."""
    odd = np.array([0xFFFFFFFF, 0x7F800001, 0xFF80ABCD], np.uint32).view(np.float32)
    for state in (F32, BF16, F16, FP8):
        for name, pending in (("replay_x", 5), ("replay_B", 5), ("replay_dt", 5), ("x", 1)):
            arguments = call(rng, state=state, pending=pending, groups=4)
            slot, row = arguments["state_batch_indices"][1], arguments["replay_start"]
            at = (1, 0, 2, slice(3)) if name == "x" else (slot, 2, row[slot], slice(3))
            arguments[name][at if name != "replay_dt" else at[:3]] = odd if name != "replay_dt" else odd[0]
            results = run_all(arguments, isa, replay=(5, 3))
            is_nan = np.isnan(results["out"]).any((1, 3))
            assert is_nan[1, 2]
            assert is_nan.sum() == 1
            if name != "x":
                values = loaded(results["state"], results.get("state_scale")).astype(np.float32)
                nans = np.argwhere(np.isnan(values).any((-1, -2)))
                assert nans.tolist() == [[slot, 2]]
            else:
                ring = (slot, 2, (row[slot] + 1) % 8)
                assert results["replay_x"][ring].view("u4").tolist() == arguments["x"][1, 0, 2].view("u4").tolist()


def test_tokens_that_have_decayed_count_as_nothing(rng):
    """Less than the smallest normal number is left of them: not a NaN, nor a subnormal number, which would be slow."""
    for A in (-30, -60, -90, -1e30):
        arguments = call(rng, pending=5, A=np.full(4, A, np.float32), state=F32)
        before = arguments["replay_start"] + np.arange(3)[:, None]  # all but the last two
        arguments["replay_x"][np.arange(6), :, before % 8] = 0
        arguments["replay_x"][np.arange(6), :, (before[0] + 4) % 8] = 0  # but one
        arguments["replay_dt"][~np.isnan(arguments["replay_dt"])] = 1.0
        results, flushed = check(arguments)
        assert len(flushed) == 3
        magnitudes = np.abs(results["state"][[*flushed]])
        assert ((magnitudes == 0) | (magnitudes >= 2.0**-126)).all()
        assert magnitudes.any() == (A > -87)


@pytest.mark.parametrize("state", STATES, ids=str)
def test_a_sequence_does_not_depend_on_its_batch(rng, state):
    arguments = call(rng, b=12, tokens=3, heads=8, rows=32, columns=80, slots=12, state=state)
    arguments["state_batch_indices"] = rng.permutation(12)
    results = run_all(arguments, replay=(5, 3))
    for i in (0, 7, 11):
        one = {n: a[i : i + 1] if n in TOKENWISE else a for n, a in arguments.items()}
        alone = run_all(one, replay=(5, 3))
        assert same_bits(alone["out"][0], results["out"][i])
        slot = arguments["state_batch_indices"][i]
        assert all(same_bits(alone[name][slot], results[name][slot]) for name in results.keys() - {"out"})
    packed = {
        name: array.reshape(36, *array.shape[2:]) if name in TOKENWISE[:-1] else array
        for name, array in arguments.items()
    }
    again = run_all({**packed, "cu_seqlens": np.arange(0, 37, 3)}, replay=(5, 3))
    assert same_bits(again["out"].reshape(results["out"].shape), results["out"])
    assert all(same_bits(again[name], results[name]) for name in results.keys() - {"out"})


def test_strides(rng):
    """Slices of one projection, and all that has slots with gaps between them."""
    arguments = call(rng, state=INT8)
    wanted = run_all(arguments, replay=(5, 3))
    strided = {n: np.repeat(a, 2, axis=0)[::2] if n in wanted or "replay" in n else a for n, a in arguments.items()}
    for name in ("x", "z", "B", "C", "dt"):
        wide = np.concatenate([arguments[name], np.full_like(arguments[name], np.nan)], axis=2)
        strided[name] = wide[:, :, : arguments[name].shape[2]]
        assert not strided[name].flags.c_contiguous
    results = ["out", "state", "state_scale", "replay_x", "replay_B", "replay_dt"]
    strided["out"] = np.full((3, 4, *arguments["x"].shape[2:]), np.nan, np.float32)[:, ::2]
    names = in_order(arguments)
    cpu_kernel(names, results, replay=(5, 3))(*(view(strided[name]) for name in (*names, *results)))
    for name in results:
        assert same_bits(np.ascontiguousarray(strided[name]), wanted[name]), name


LARGE = {"b": 32, "heads": 8, "rows": 64, "columns": 128, "slots": 33}


def test_heads_of_a_group_on_several_threads(rng):
    """One of them writes the group's rows of B."""
    assert library().cpu_num_threads() == 1 or LARGE["b"] * 8 * 64 * 128 > 2**20
    for groups in (1, 8):
        check(call(rng, groups=groups, **LARGE))


def digest():
    """Hash all results of calls that are large enough for several threads."""
    rng, content = np.random.default_rng(3), hashlib.sha256()
    ragged = np.sort(rng.integers(0, 65, 33)).astype(np.int32)
    for state in STATES:
        for given in ({"groups": 1}, {"form": "packed", "tokens": 64, "cu_seqlens": ragged}):
            arguments = call(rng, state=state, **LARGE, **given)
            if state in ROUNDABLE:
                arguments["rand_seed"] = np.array([5, 7], np.uint32)
            results = run_all(arguments, replay=(5, 3))
            for name in sorted(results):
                content.update(results[name].tobytes())
    return content.hexdigest()


def test_threads_do_not_change_the_bits():
    script = f"import sys; sys.path[:0] = {[HELPERS, os.path.dirname(__file__)]!r}; from test_native_replay import digest; print(digest())"
    results = [run_script(script, SSU_BRIDGE_NUM_THREADS=str(threads)) for threads in (1, 5)]
    assert all(result.returncode == 0 for result in results), [result.stderr for result in results]
    assert len({result.stdout for result in results}) == 1


MEMORY_SCRIPT = """
import sys
import numpy as np
sys.path[:0] = {paths!r}
from native import WITHOUT_MEMORY, cpu_kernel, results_of, view
from test_native_replay import call, in_order
def prepared(rows):
    replay = (rows, rows)
    arguments = call(np.random.default_rng(1), b=2, tokens=rows, heads=1, rows=1, columns=1, groups=1, slots=2, replay=replay)
    arrays = {{**arguments, "out": np.zeros_like(arguments["x"])}}
    names = in_order(arguments)
    kernel = cpu_kernel(names, results_of(names), replay=replay)
    views = {{name: view(array) for name, array in arrays.items()}}
    return arrays, lambda: kernel(*(views[name] for name in (*names, *results_of(names))))
small, large = 2, 4096
exec(WITHOUT_MEMORY)
"""


def test_scratch_without_memory_is_an_error_before_anything_is_written():
    """The products of many tokens with each other need the most."""
    result = run_script(MEMORY_SCRIPT.format(paths=[HELPERS, os.path.dirname(__file__)]))
    assert result.returncode == 0, result.stderr
    assert "no memory for the scratch of a state with 1 columns (dstate), and of " in result.stdout
    assert "nothing was written" in result.stdout


def test_wrong_tensors(rng):
    arguments = call(rng, state=INT8)
    for name, value, message in (
        ("replay_x", np.zeros((6, 4, 9, 8), np.float32), "replay_x: axis 2 must have size 8, got 9"),
        ("replay_x", np.zeros((6, 4, 8, 8), np.float16), "replay_x must have the type of what it keeps"),
        ("replay_B", np.zeros((6, 2, 8, 16), np.float16), "replay_B must have the type of what it keeps"),
        ("replay_B", np.zeros((6, 4, 8, 16), np.float32), "replay_B: axis 1 must have size 2, got 4"),
        ("replay_dt", np.zeros((6, 4, 8), np.float16), "replay_dt must have the type of what it keeps"),
        ("replay_start", np.zeros(6, np.int64), "replay_start must be int32"),
        ("replay_pending", np.zeros(5, np.int32), "replay_pending: axis 0 must have size 6, got 5"),
        ("state_batch_indices", np.zeros((3, 2), np.int32), "state_batch_indices must have one axis"),
        ("dt", np.zeros((3, 2, 4, 8), np.float32), "dt must be tied to the head"),
        ("dt_bias", np.zeros((4, 8), np.float32), "dt_bias must be tied to the head"),
        ("A", np.zeros((4, 8, 16), np.float32), "A must be tied to the head"),
    ):
        with pytest.raises(ValueError, match=message):
            run_all({**arguments, name: value}, replay=(5, 3))
    with pytest.raises(ValueError, match="compiled for 0 to 3 tokens, got 4"):
        run_all(call(rng, tokens=4), replay=(5, 3))
    with pytest.raises(ValueError, match="state must have 4 axes to be a checkpoint, got 3"):
        run_all({**arguments, **{name: arguments[name][:, 0] for name in ("state", "x", "z")}}, replay=(5, 3))


def test_wrong_calls(rng):
    arguments = call(rng)
    for replay in ((-1, 0), (5, 0), (5, 6), (0, 3), (2**31, 1)):
        with pytest.raises(ValueError, match="expected a replay_window of at least 0 and no more replay_tokens"):
            run_all(arguments, replay=replay)
    with pytest.raises(ValueError, match="'replay_x' must be there with a replay_window, and only then"):
        run_all(arguments)
    with pytest.raises(ValueError, match="'replay_pending' must be there with a replay_window, and only then"):
        run_all({n: a for n, a in arguments.items() if n != "replay_pending"}, replay=(5, 3))
    with pytest.raises(ValueError, match="'has_initial_state' does not go with a replay_window"):
        run_all({**arguments, "has_initial_state": np.ones(3, bool)}, replay=(5, 3))
    with pytest.raises(ValueError, match="the state must be a result with a replay_window"):
        run_all(arguments, update=False, replay=(5, 3))
