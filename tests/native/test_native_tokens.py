"""The native CPU kernel over several tokens: every result against the same tokens one at a time, to the bit."""

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
    expected_all,
    results_of,
    run_all,
    run_script,
    same_bits,
    stored,
    view,
)

HELPERS = str(Path(__file__).parents[1] / "helpers")

STATES = (F32, BF16, F16, INT16, INT8, FP8)
EXTREMES = {np.int32: (-(2**31), -7, 2**31 - 1), np.int64: (-(2**63), -(2**31) - 7, 2**32, 2**63 - 1)}


def call(
    rng, form="multi", b=3, tokens=4, heads=4, rows=8, columns=16, groups=2, slots=6, state=F32, tied=True, **options
):
    """Return the arguments of a call of several tokens, by name; packed when options has cu_seqlens."""

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    at = {"single": (b,), "multi": (b, tokens), "packed": (tokens,)}[form]
    per_row = () if tied else (rows,)
    arguments = {
        "x": normal(*at, heads, rows),
        "dt": normal(*at, heads, *per_row),
        "A": -np.exp(normal(heads, *(() if tied else (rows, columns)))),
        "B": normal(*at, groups, columns),
        "C": normal(*at, groups, columns),
        "D": normal(heads, *per_row),
        "z": normal(*at, heads, rows),
        "dt_bias": normal(heads, *per_row),
        **states("state", "state_scale", state, normal(slots, heads, rows, columns)),
        "state_batch_indices": rng.permutation(slots)[:b].astype(np.int64 if b % 2 else np.int32),
        **options,
    }
    return {name: value for name, value in arguments.items() if value is not None}


def states(name, scale_name, dtype, value):
    values, scale = stored(value, dtype)
    return {name: values} if scale is None else {name: values, scale_name: scale}


def intermediates(rng, arguments, entries=5, steps=6):
    shape = (entries, steps, *arguments["state"].shape[1:])
    value = rng.standard_normal(shape, dtype=np.float32)
    return states("intermediate_states", "intermediate_state_scales", arguments["state"].dtype, value)


def check(arguments, isa="auto", **options):
    results, wanted = run_all(arguments, isa, **options), expected_all(arguments, isa, **options)
    assert results.keys() == wanted.keys()
    for name, value in wanted.items():
        assert same_bits(results[name], value), name
    return results


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("state", STATES, ids=str)
def test_tokens(rng, state, tied, isa):
    check(call(rng, state=state, tied=tied), isa)
    check(call(rng, state=state, tied=tied, state_batch_indices=None), isa)
    check(call(rng, state=state, tied=tied, rows=13, columns=19, z=None, D=None, dt_bias=None), isa, softplus=False)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("state", (F32, BF16, INT8), ids=str)
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (5, 3), (3, 17), (7, 31), (13, 33), (2, 47), (600, 16), (64, 128)]
)
def test_sizes(rng, rows, columns, state, isa):
    sizes = {"b": 2, "tokens": 2, "heads": 2, "slots": 3, "rows": rows, "columns": columns, "state": state}
    for tied in (True, False):
        check(call(rng, tied=tied, **sizes), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("state", (INT16, INT8, FP8), ids=str)
def test_one_token_of_a_quantised_state(rng, state, isa):
    check(call(rng, form="single", state=state), isa)
    arguments = call(rng, form="single", state=state, columns=19, state_batch_indices=np.array([1, -1, 2]))
    check({**arguments, "dst_state_batch_indices": np.array([5, 4, 99])}, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("state", STATES, ids=str)
def test_intermediate_states(rng, state, isa):
    arguments = call(rng, state=state)
    arguments |= intermediates(rng, arguments, entries=6)
    check(arguments, isa)
    check({**arguments, "intermediate_state_indices": np.array([4, 0, 2], np.int32)}, isa)
    kept = check(arguments, isa, update=False)
    assert same_bits(kept["state"], arguments["state"])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("stride", [1, 2, 3, 5, 2**62])
def test_every_so_many_states(rng, stride, isa):
    arguments = call(rng, tokens=7, state=BF16)
    for steps in (7 // stride, 7 // stride + 2):
        check({**arguments, **intermediates(rng, arguments, entries=6, steps=steps)}, isa, stride=stride)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("state", STATES, ids=str)
def test_sequences_without_an_initial_state(rng, state, isa):
    """Whatever their slots hold; from slot to slot and through tiles."""
    for form in ("single", "multi"):
        arguments = call(rng, form, state=state, state_batch_indices=np.array([4, 0, 2]))
        part = "state_scale" if "state_scale" in arguments else "state"
        zeros, unknown = arguments[part].copy(), arguments[part].copy()
        zeros[[0, 2]], unknown[[0, 2]] = 0, np.nan
        wanted = run_all({**arguments, part: zeros}, isa)
        for flags in (np.array([True, False, False]), np.array([1, 9, 0, 9, 0], np.uint8)[::2]):
            results = run_all({**arguments, part: unknown, "has_initial_state": flags}, isa)
            assert all(same_bits(results[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("state", STATES, ids=str)
def test_trees(rng, state, tied, isa):
    """Of any numbers; the rows of a state end inside a vector, or at its end."""
    for columns in (19, 32):
        arguments = call(rng, tokens=6, rows=5, columns=columns, slots=20, state=state, tied=tied)
        parents = rng.integers(-2, 7, (3, 6)).astype(np.int32)
        parents[0, :3] = EXTREMES[np.int32]
        tree = {**arguments, "parent_tokens": parents}
        check({**tree, **intermediates(rng, arguments, entries=20)}, isa, update=False)
        # The slots that they start from among them.
        table = rng.permutation(20)[:18].reshape(3, 6)
        tree["state_batch_indices"] = table[:, 0].copy()
        check({**tree, "dst_state_batch_indices": table}, isa)


@pytest.mark.parametrize("isa", ISAS)
def test_packed_trees(rng, isa):
    parents = rng.integers(-2, 70, 100)
    edges = np.array([3, 8, 8, 90, 99])
    arguments = call(rng, "packed", b=4, tokens=100, cu_seqlens=edges, parent_tokens=parents, rows=3, columns=8)
    check({**arguments, **intermediates(rng, arguments, entries=6, steps=70)}, isa, update=False)


def test_trees_on_many_threads(rng):
    """Each has the states of its own tree."""
    arguments = call(rng, b=8, tokens=64, heads=8, rows=64, columns=64, slots=8, state_batch_indices=np.arange(8))
    arguments["parent_tokens"] = rng.integers(-1, 64, (8, 64))
    many = run_all(arguments, update=False)["out"]
    for i in range(8):
        each = ("x", "dt", "B", "C", "z", "parent_tokens", "state_batch_indices")
        one = {n: a[i : i + 1] if n in each else a for n, a in arguments.items()}
        assert same_bits(run_all(one, update=False)["out"], many[i : i + 1])


def test_wrong_trees_and_flags(rng):
    arguments = call(rng, tokens=65)
    for name, value, message in (
        ("parent_tokens", np.zeros((3, 65), int), "a tree has at most 64 tokens, got 65"),
        ("parent_tokens", np.zeros((3, 64), int), "parent_tokens: axis 1 must have size 65, got 64"),
        ("parent_tokens", np.zeros(3, int), "parent_tokens has 1 axes, which does not go with"),
        ("parent_tokens", np.zeros((3, 65), np.int16), "parent_tokens must be int32 or int64"),
        ("has_initial_state", np.zeros(3, np.int32), "has_initial_state must be bool or uint8"),
        ("has_initial_state", np.zeros(4, bool), "has_initial_state: axis 0 must have size 3, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            run_all({**arguments, name: value}, update=False)
    with pytest.raises(ValueError, match="intermediate_stride: expected at least 1, got 0"):
        run_all(arguments, stride=0)


def test_no_update(rng):
    for form in ("single", "multi"):
        for state in (F32, BF16, INT8):
            arguments = call(rng, form=form, state=state)
            without, updated = run_all(arguments, update=False), run_all(arguments)
            assert same_bits(without["out"], updated["out"])
            for name in without.keys() - {"out"}:
                assert same_bits(without[name], arguments[name])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("state", (F32, F16, INT16), ids=str)
def test_slot_tables(rng, state, isa):
    reads = np.array([[0, 1, 2, 3, -1], [4, 9, 5, -9, 10], [6, 7, -1, 8, 11]], np.int32)
    writes = np.array([[12, 13, -1, 0], [14, 15, 4, 16], [99, 17, 18, 19]], np.int64)
    arguments = call(rng, state=state, slots=20, state_batch_indices=reads)
    check(arguments, isa)
    for accepted in ([0, 1, 2], [2, 4, 5], [-5, 3, 77]):
        counts = {"num_accepted_tokens": np.array(accepted, np.int32)}
        check({**arguments, **counts}, isa)
        check({**arguments, **counts, "dst_state_batch_indices": writes}, isa)
        check({**arguments, **counts, "dst_state_batch_indices": writes[:, 3]}, isa)
    check({**arguments, "dst_state_batch_indices": writes}, isa, pad=4)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("state", (F32, BF16, FP8), ids=str)
@pytest.mark.parametrize("dtype", EXTREMES)
def test_packed(rng, dtype, state, isa):
    starts = np.array([0, 3, 3, 8, 9], dtype)
    arguments = call(rng, "packed", b=4, tokens=9, slots=16, state=state, cu_seqlens=starts)
    check(arguments, isa)
    # The third sequence has more tokens than there are columns.
    writes = np.array([[8, 9, 10, 11], [12, 12, 12, 12], [13, 15, 14, 13], [-1, 4, 4, 4]])
    check({**arguments, "state_batch_indices": np.arange(4), "dst_state_batch_indices": writes}, isa)
    reads = {"state_batch_indices": np.arange(16).reshape(4, 4), "num_accepted_tokens": np.array([1, 5, 0, 2])}
    check({**arguments, **reads, **intermediates(rng, arguments, entries=16, steps=2)}, isa)


@pytest.mark.parametrize("dtype", EXTREMES)
@pytest.mark.parametrize("state", (F32, INT8), ids=str)
def test_any_starts(rng, state, dtype):
    """Of sequences that share no token: what shared tokens give is undefined, what is touched is not."""
    low, high = min(EXTREMES[dtype]), max(EXTREMES[dtype])
    for starts in (
        [low, 2, 2, high],
        [7, 3, 5, 4],
        [high, low, 1, 0],
        [9, 9, 9, 9],
        [high, high, low, low],
        [0, 9, 5, 9],
    ):
        arguments = call(rng, "packed", tokens=9, slots=8, state=state, cu_seqlens=np.array(starts, dtype))
        results, wanted = run_all(arguments), expected_all(arguments)
        assert same_bits(results["state"], wanted["state"])
        if starts != [0, 9, 5, 9]:
            assert same_bits(results["out"], wanted["out"])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", EXTREMES)
def test_any_index(rng, dtype, isa):
    """Every table full of values from inside and outside its range, guard bytes around all that is written."""
    values = [*EXTREMES[dtype], -1, *range(7)]
    for draw in range(20):
        arguments = call(rng, state=STATES[draw % 6], slots=6, rows=3, columns=5, b=4)
        arguments["state_batch_indices"] = rng.choice(values, (4, 5)).astype(dtype)
        arguments["num_accepted_tokens"] = rng.choice(values, 4).astype(dtype)
        if draw % 2:
            arguments |= intermediates(rng, arguments, entries=3, steps=4)
            arguments["intermediate_state_indices"] = rng.choice(values, 4).astype(dtype)
        else:
            arguments["dst_state_batch_indices"] = rng.choice(values, (4, 4) if draw % 4 else 4).astype(dtype)
        out = run_all(arguments, isa, pad=int(rng.choice(values)))["out"]
        assert np.isfinite(out).all()


def test_duplicate_slots_are_safe(rng):
    for state in (F32, INT8):
        same = np.zeros((8, 5), np.int32)
        arguments = call(rng, b=8, heads=8, rows=64, columns=128, slots=2, state=state, state_batch_indices=same)
        results = run_all({**arguments, "dst_state_batch_indices": same})
        assert np.isfinite(results["state"].astype(np.float32)).all()
        for name in ("state", "state_scale"):
            if name in arguments:
                assert same_bits(results[name][1], arguments[name][1])


def test_tables_without_columns(rng):
    """Where there are no tokens that would need one."""
    empty = np.zeros((3, 0), np.int32)
    arguments = call(rng, "multi", tokens=0, state_batch_indices=empty)
    check(arguments)
    arguments |= {"state_batch_indices": np.array([1, 2, 3]), "dst_state_batch_indices": empty}
    check(arguments)
    del arguments["dst_state_batch_indices"]
    check(arguments | intermediates(rng, arguments, entries=0))
    check(arguments | intermediates(rng, arguments, steps=0))


@pytest.mark.parametrize("form", ["multi", "packed"])
def test_too_few_columns_and_steps(rng, form):
    starts = {"cu_seqlens": np.array([0, 2, 4, 4])} if form == "packed" else {}
    few = 0 if form == "packed" else 1  # a packed sequence may have more tokens than a table has columns
    arguments = call(rng, form, tokens=4 if form == "packed" else 2, **starts)
    for name in ("state_batch_indices", "dst_state_batch_indices"):
        with pytest.raises(ValueError, match=f"{name} must have a column for each of"):
            run_all({**arguments, name: np.zeros((3, few), np.int32)})
    with pytest.raises(ValueError, match="intermediate_states must have at least . steps, got ."):
        run_all(arguments | intermediates(rng, arguments, steps=few))
    with pytest.raises(ValueError, match="num_accepted_tokens goes with"):
        run_all(
            {**arguments, "state_batch_indices": np.zeros(3, np.int32), "num_accepted_tokens": np.ones(3, np.int32)}
        )


@pytest.mark.parametrize("empty", [{"b": 0}, {"tokens": 0}], ids=str)
@pytest.mark.parametrize("state", (F32, FP8), ids=str)
def test_empty(rng, state, empty):
    arguments = call(rng, **empty)
    if state == FP8:
        scale = np.ones(arguments["state"].shape[:-1], np.float32)
        arguments |= {"state": arguments["state"].astype(FP8), "state_scale": scale}
    results = run_all(arguments)
    assert np.isfinite(results["out"]).all()
    assert same_bits(results["state"], arguments["state"])


def test_strides(rng):
    """Slices of one projection, a padded slot, scales and entries apart from one another."""
    arguments = call(rng, state=INT8)
    arguments |= intermediates(rng, arguments)
    wanted = run_all(arguments)
    strided = dict(arguments)
    for name in ("x", "z", "B", "C", "dt"):
        strided[name] = np.concatenate([arguments[name], np.full_like(arguments[name], np.nan)], axis=2)[
            :, :, : arguments[name].shape[2]
        ]
        assert not strided[name].flags.c_contiguous
    strided["state_batch_indices"] = np.repeat(arguments["state_batch_indices"], 2)[::2]
    strided |= {name: np.repeat(arguments[name], 2, axis=0)[::2] for name in arguments if name in wanted}
    strided["out"] = np.full((3, 8, *arguments["x"].shape[2:]), np.nan, np.float32)[:, ::2]
    names = [name for name in ORDER if name in arguments]
    kernel = cpu_kernel(names, results_of(names))
    kernel(*(view(strided[name]) for name in (*names, *results_of(names))))
    for name in results_of(names):
        assert same_bits(np.ascontiguousarray(strided[name]), wanted[name]), name


@pytest.mark.parametrize("state", STATES, ids=str)
def test_a_sequence_does_not_depend_on_its_batch(rng, state):
    arguments = call(rng, b=12, tokens=3, heads=8, rows=32, columns=80, slots=12, state=state, form="multi")
    arguments["state_batch_indices"] = rng.permutation(12)
    results = run_all(arguments)
    for i in (0, 7, 11):
        rows = ("x", "dt", "B", "C", "z", "state_batch_indices")
        alone = run_all({name: value[i : i + 1] if name in rows else value for name, value in arguments.items()})
        assert same_bits(alone["out"][0], results["out"][i])
        slot = arguments["state_batch_indices"][i]
        assert same_bits(alone["state"][slot], results["state"][slot])
    packed = {
        name: value.reshape(36, *value.shape[2:]) if name in ("x", "dt", "B", "C", "z") else value
        for name, value in arguments.items()
    }
    again = run_all({**packed, "cu_seqlens": np.arange(0, 37, 3)})
    assert same_bits(again["state"], results["state"])
    assert same_bits(again["out"].reshape(results["out"].shape), results["out"])


def digest():
    """Hash all results of calls that are large enough for several threads."""
    rng, content = np.random.default_rng(3), hashlib.sha256()
    sizes = {"heads": 8, "rows": 64, "columns": 128, "slots": 33}
    ragged = np.sort(rng.integers(0, 65, 33)).astype(np.int32)
    ragged[5:20] = ragged[5]
    for state in STATES:
        calls = [call(rng, b=32, tokens=2, state=state, **sizes)]
        calls.append(call(rng, "packed", b=32, tokens=64, state=state, cu_seqlens=ragged, **sizes))
        calls.append(calls[0] | intermediates(rng, calls[0], entries=33, steps=2))
        for arguments in calls:
            if state in ROUNDABLE:
                arguments["rand_seed"] = np.array([5, 7], np.uint32)
            results = run_all(arguments)
            results["out"] = np.nan_to_num(results["out"], nan=7.0)
            for name in sorted(results):
                content.update(results[name].tobytes())
    return content.hexdigest()


def test_threads_do_not_change_the_bits():
    script = f"import sys; sys.path[:0] = {[HELPERS, os.path.dirname(__file__)]!r}; from test_native_tokens import digest; print(digest())"
    results = [run_script(script, SSU_BRIDGE_NUM_THREADS=str(threads)) for threads in (1, 5)]
    assert all(result.returncode == 0 for result in results), [result.stderr for result in results]
    assert len({result.stdout for result in results}) == 1


def test_wrong_tensors(rng):
    arguments = call(rng, state=INT8)
    arguments |= intermediates(rng, arguments)
    wrong = {
        "x": np.zeros((3, 4, 4, 8, 1), np.float32),
        "dt": np.zeros((3, 4), np.float32),
        "B": np.zeros((3, 5, 2, 16), np.float32),
        "state_batch_indices": np.zeros((2, 4), np.int32),
        "num_accepted_tokens": np.zeros((3, 4), np.int32),
        "intermediate_states": np.zeros((5, 6, 4, 8, 15), np.int8),
        "intermediate_state_indices": np.zeros(4, np.int32),
        "state_scale": np.zeros((6, 4, 7), np.float32),
        "intermediate_state_scales": np.zeros((5, 6, 4, 8), np.float64),
        "rand_seed": np.zeros(3, np.uint32),
    }
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            run_all({**arguments, name: value})
    with pytest.raises(ValueError, match="intermediate_states must have the type of state"):
        run_all({**arguments, "intermediate_states": arguments["intermediate_states"].astype(np.int16)})
    for missing in ("state_scale", "intermediate_state_scales"):
        with pytest.raises(ValueError, match=missing):
            run_all({name: value for name, value in arguments.items() if name != missing})
    with pytest.raises(ValueError, match="state_scale"):
        run_all({**arguments, "state": arguments["state"].astype(np.float32)})
    with pytest.raises(ValueError, match="rand_seed goes with"):
        run_all(call(rng, rand_seed=np.array(1)))
    with pytest.raises(ValueError, match="cu_seqlens"):
        run_all({**arguments, "cu_seqlens": np.array([0, 1])})
    with pytest.raises(ValueError, match=r"cu_seqlens must have shape \(sequences \+ 1,\)"):
        run_all(call(rng, "packed", cu_seqlens=np.zeros(0, np.int32)))
