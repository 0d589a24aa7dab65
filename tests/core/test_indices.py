"""Index tables with anything in them: no memory but the call's own is read or written, and check_indices says so."""

import jax
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modes import GPU_PAIRS, PAIRS, bits, convert, in_turns, int64_as_it_is, skip_if_refused, step, to_host, to_mode

import ssu_bridge
from ssu_bridge.api import explain
from ssu_bridge.backends import reference
from ssu_bridge.core import slots
from ssu_bridge.core.quantized import SCALES, paired
from ssu_bridge.testing.cases import Case, arguments
from ssu_bridge.testing.check import compare, results_by_name

SLOTS, ENTRIES, STEPS, ROWS = 6, 6, 2, 7
GUARD = 64


def guarded(array, poison):
    """Copy an array into the middle of a larger one; return both."""
    whole = np.full(array.size + 2 * GUARD, poison).astype(array.dtype)
    inside = whole[GUARD : GUARD + array.size].reshape(array.shape)
    inside[...] = array
    return inside, whole


ENDS = {"int32": (-(2**31), 2**31 - 1), "int64": (-(2**63), 2**63 - 1)}


@st.composite
def any_tables(draw):
    """A case whose tables hold anything: ends of the range, negative ones, the same twice, decreasing ones."""
    names = (
        "state_batch_indices",
        "dst_state_batch_indices",
        "num_accepted_tokens",
        "cu_seqlens",
        "intermediate_state_indices",
        "parent_tokens",
    )
    dtypes = {name: draw(st.sampled_from(["int32", "int64"])) for name in names}

    def numbers(name, count):
        lowest, highest = ENDS[dtypes[name]]
        near = st.integers(-3, 9)
        ends = st.sampled_from([lowest, lowest + 1, highest, highest - 1, highest // SLOTS + 1])
        return tuple(draw(st.lists(near | ends, min_size=count, max_size=count)))

    def table(name):
        if draw(st.booleans()):
            return numbers(name, 3)
        width = draw(st.integers(2, 4))
        return tuple(numbers(name, width) for _ in range(3))

    form = draw(st.sampled_from(["single", "multi", "packed"]))
    indices = table("state_batch_indices") if draw(st.booleans()) else None
    destinations = table("dst_state_batch_indices") if draw(st.booleans()) else None
    wide = indices is not None and isinstance(indices[0], tuple)
    with_steps = destinations is None and draw(st.booleans())
    # A tree has no one destination.
    trees = (destinations is None or isinstance(destinations[0], tuple)) and draw(st.booleans())
    each = {"single": (), "multi": (2,), "packed": ()}[form]
    parents = (
        [numbers("parent_tokens", *each) for _ in range(3)]
        if each
        else numbers("parent_tokens", ROWS if form == "packed" else 3)
    )
    return Case(
        "anything",
        slots=SLOTS,
        headdim=4,
        dstate=8,
        dtypes={**dtypes, "state": draw(st.sampled_from(["float32", "bfloat16", "int8"]))},
        indices=indices,
        destinations=destinations,
        accepted=numbers("num_accepted_tokens", 3) if wide and draw(st.booleans()) else None,
        tokens={"single": None, "multi": 2, "packed": ROWS}[form],
        cu_seqlens=numbers("cu_seqlens", 4) if form == "packed" else None,
        steps=STEPS if with_steps else 0,
        parents=tuple(parents) if trees else None,
        has_initial_state=draw(st.none() | st.tuples(*[st.booleans()] * 3)),
        intermediate_stride=draw(st.sampled_from([1, 2, 2**31 - 1])) if with_steps and not trees else 1,
        entries=numbers("intermediate_state_indices", 3) if with_steps and draw(st.booleans()) else None,
        pad_slot_id=draw(st.sampled_from([-1, 0, 2**40])),
    )


SETTINGS = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


@SETTINGS
@given(case=any_tables(), pair=st.sampled_from([pair for pair in PAIRS if pair[0] != "jax.lax.scan"]))
def test_no_index_reaches_outside(case, pair):
    assert_inside(case, *pair)


@pytest.mark.gpu
@SETTINGS
@given(case=any_tables(), pair=st.sampled_from([pair for pair in GPU_PAIRS if pair[0] != "jax.lax.scan"]))
def test_no_index_reaches_outside_on_a_gpu(case, pair):
    assert_inside(case, *pair)


def assert_inside(case, mode, backend):
    """Assert that a call reads and writes nothing but what its tables name in its arrays."""
    arrays = case.arrays(seed=1)
    with int64_as_it_is(arrays):
        choice = explain(**to_mode(arrays, mode), **case.flags, backend=backend).choices[0]
        if choice.backend is None:
            return
        run = run_guarded if mode in ("numpy", "torch") and arrays["state"].dtype.name != "bfloat16" else run_plainly
        after = run(case, arrays, mode, backend)
    plan = slots.routes(choice.problem, arrays)
    rows = np.zeros(count_rows(arrays["x"]), bool)
    for begin, length in zip(plan.starts, plan.lengths, strict=True):
        rows[begin : begin + length] = True
    assert (np.abs(after["out"].reshape(len(rows), -1)[rows]) < 1e6).all()  # nothing of the guards was read
    for name, places in (("state", plan.slots), ("intermediate_states", plan.entries)):
        kept = np.setdiff1d(np.arange(len(arrays.get(name, ()))), places)
        for array in (name, SCALES[name]):
            if array in arrays:
                np.testing.assert_array_equal(bits(after[array][kept]), bits(arrays[array][kept]))


def count_rows(x):
    return x.shape[0] * (x.shape[1] if x.ndim == 4 else 1)


def run_plainly(case, arrays, mode, backend):
    """Run a call on arrays that are alone in their memory, as JAX's are."""
    return to_host(results_by_name(step(mode, to_mode(arrays, mode), **case.flags, backend=backend)), mode)


def run_guarded(case, arrays, mode, backend):
    """Run a call on arrays with guards around what it writes and reads by index; assert that these stay."""
    wholes, inside = {}, {**arrays, "out": np.full(arrays["x"].shape, 3.0, "float32")}
    for name in ("out", *SCALES, *SCALES.values()):
        if name in inside:
            poison = 77 if inside[name].dtype == np.int8 else 9e9
            inside[name], wholes[name] = guarded(inside[name], poison)
    given = arguments(inside, mode, torch.from_numpy if mode == "torch" else lambda array: array)
    results = results_by_name(ssu_bridge.update(**given, **case.flags, backend=backend))
    for whole in wholes.values():
        edges = np.concatenate([whole[:GUARD], whole[-GUARD:]])
        assert (edges == edges[0]).all()
    return to_host(results, mode)


# --- Packed sequences that share rows ---

SHARING = {
    "two": {"cu_seqlens": (0, 5, 2, 7)},
    "fresh ones": {"cu_seqlens": (0, 5, 2, 7), "has_initial_state": (True, False, False)},
    "every second state": {"cu_seqlens": (0, 5, 2, 7), "steps": 2, "entries": (5, 1, 0), "intermediate_stride": 2},
    "trees": {"cu_seqlens": (0, 5, 2, 7), "steps": 5, "entries": (5, 1, 0), "parents": (-1, 0, 0, 1, 2, 3, -1)},
    "to the ends of int32": {"cu_seqlens": (4, 3, 7, -(2**31), 2**31 - 1)},
    "each all rows": {"cu_seqlens": (0, 7, 0, 7, 0, 7)},
    "three of five, and a row of none": {"cu_seqlens": (5, 6, 2, 4, 1, 5)},
    "and one that shares none": {"cu_seqlens": (5, 7, 0, 4, 2, 5), "steps": 3, "entries": (5, 1, 0, 2, 3)},
    "a step ahead": {"cu_seqlens": (3, 6, 0, 4), "indices": (-1, 3, 5)},
    "no indices": {"cu_seqlens": (0, 5, 2, 7), "indices": None},
    "destinations": {"cu_seqlens": (0, 5, 2, 7), "destinations": (4, -1, 1)},
    "a table": {"cu_seqlens": (0, 5, 1, 4), "destinations": ((0, 1, 0), (2, 2, 2), (3, -1, 5))},
    "intermediates": {"cu_seqlens": (0, 5, 2, 7), "steps": 4, "entries": (5, 1, 0)},
    "intermediates alone": {"cu_seqlens": (2, 5, 2, 7), "steps": 7, "disable_state_update": True},
}


@pytest.mark.parametrize(
    ("what", "mode", "backend"),
    [
        *in_turns({what: what for what in SHARING}),
        *(pytest.param(what, *pair, marks=pytest.mark.gpu) for what in SHARING for pair in GPU_PAIRS),
    ],
)
def test_each_of_the_sequences_that_share_rows(what, mode, backend):
    """It has its own states; of the output, the rows that it has to itself. On xla it has neither, but the others do."""
    sequences = len(SHARING[what]["cu_seqlens"]) - 1
    fields = {"indices": (4, 0, 2, 5, 1)[:sequences], **SHARING[what]}
    case = Case("sharing", sequences=sequences, slots=SLOTS, tokens=ROWS, headdim=4, dstate=8, **fields)
    arrays = case.arrays(seed=3)
    problem = explain(**to_mode(arrays, mode), **case.flags, backend=backend).choices[0].problem
    plan, owners = slots.routes(problem, arrays), np.zeros(ROWS, int)
    rows = [slice(begin, begin + length) for begin, length in zip(plan.starts, plan.lengths, strict=True)]
    for own in rows:
        owners[own] += 1
    assert owners.max() > 1
    after = run_plainly(case, arrays, mode, backend)
    exact = reference.compute(problem, arrays)._replace(rows=owners == 1)
    if backend == "xla":
        for sequence, own in enumerate(rows):
            if owners[own].max(initial=1) > 1:
                exact, after = without(plan, sequence, own, exact, arrays, after)
    report = compare(exact, arrays, after)
    assert all(row.passed for row in report), report


def without(plan, sequence, own, exact, before, after):
    """Leave out a sequence: its rows are not compared, and its slots and entries are as they were before."""
    exact.rows[own] = False
    stores, after = dict(exact.stores), dict(after)
    for name, places in (("state", plan.slots), ("intermediate_states", plan.entries)):
        if name in stores:
            kept = ~np.isin(stores[name].places[0], places[sequence])
            of_others = stores[name]._replace(
                places=tuple(index[kept] for index in stores[name].places),
                states=stores[name].states[kept],
                bounds=stores[name].bounds[kept],
            )
            stores[name], after[name] = of_others, after[name].copy()
            written = places[sequence][places[sequence] >= 0]
            after[name][written] = before[name][written]
    return exact._replace(stores=stores), after


# --- check_indices ---


def array(*values, dtype="int32"):
    return np.array(values, dtype)


def call(**changes):
    """A right call of two tokens for each of three sequences, and changes to it."""
    case = Case("checked", headdim=4, dstate=8, slots=SLOTS, tokens=2, indices=(4, 0, 2))
    return {**case.arrays(seed=2), **changes}


def packed(**changes):
    case = Case("checked", headdim=4, dstate=8, slots=SLOTS, tokens=ROWS, indices=(4, 0, 2), cu_seqlens=(0, 3, 3, ROWS))
    return {**case.arrays(seed=2), **changes}


WIDE = array([4, 1], [0, 3], [2, 5])
WRONG = {
    "a slot beyond the last": (call(state_batch_indices=array(4, 6, 2)), r"state_batch_indices: expected -1 or 0\.\.5 at \[1\], got 6"),
    "a slot below -1": (call(state_batch_indices=array(4, 0, -2)), r"state_batch_indices: expected .* at \[2\], got -2"),
    "a destination beyond": (call(dst_state_batch_indices=array([1, 2], [3, 6], [4, 5])), r"dst_state_batch_indices: .* at \[1, 1\], got 6"),
    "a slot twice": (call(state_batch_indices=array(4, 2, 2)), "state: expected a slot to be written by one sequence, got 2 written by sequences 1 and 2"),
    "a destination twice": (call(dst_state_batch_indices=array(1, 1, 5)), "state: expected a slot to be written by one sequence, got 1"),
    "a destination that another reads": (call(dst_state_batch_indices=array(1, 4, 5)), "got 4 read by sequence 0 and written by sequence 1"),
    "too many accepted": (call(state_batch_indices=WIDE, num_accepted_tokens=array(1, 3, 0)), r"num_accepted_tokens: expected 0\.\.2 at \[1\], got 3"),
    "decreasing": (packed(cu_seqlens=array(0, 4, 3, ROWS)), r"cu_seqlens: expected no less than the one before at \[2\], got 3"),
    "past the rows": (packed(cu_seqlens=array(0, 3, 3, ROWS + 1)), r"cu_seqlens: expected 0\.\.7 at \[3\], got 8"),
    "longer than the table": (packed(dst_state_batch_indices=WIDE), "dst_state_batch_indices: expected a place for each token of a sequence, 3 of sequence 0, got 2"),
    "longer than the steps": (packed(intermediate_states=np.zeros((6, 2, 4, 4, 8), "float32")), "intermediate_states: expected a place for each token"),
    "an entry beyond": (call(intermediate_states=np.zeros((3, 2, 4, 4, 8), "float32"), intermediate_state_indices=array(0, 3, 1)), r"intermediate_state_indices: expected 0\.\.2 at \[1\], got 3"),
    "no entry for a slot": (call(intermediate_states=np.zeros((3, 2, 4, 4, 8), "float32")), "intermediate_states: expected an entry for each slot that a sequence reads, got 3 entries and slot 4 read by sequence 0"),
    "no entry for a sequence": ({n: a for n, a in call(intermediate_states=np.zeros((2, 2, 4, 4, 8), "float32")).items() if n != "state_batch_indices"}, "got 2 entries and slot 2 read by sequence 2"),
    "a slot that another reads, which is not empty": (packed(cu_seqlens=array(0, 3, 5, ROWS), state_batch_indices=array(4, 4, 2), dst_state_batch_indices=array(4, 1, 2)), "got 4 read by sequence 1 and written by sequence 0"),
    "a token that is its own parent": (call(parent_tokens=array([-1, 0], [-1, 1], [-1, -1])), "parent_tokens: expected -1 or the number of a token before at token 1 of sequence 1, got 1"),
    "a parent below -1": (packed(parent_tokens=array(-1, 0, 1, -1, 0, -2, 1)), "parent_tokens: .* at token 2 of sequence 2, got -2"),
    "fewer steps than strides": (packed(intermediate_states=np.zeros((6, 1, 4, 4, 8), "float32"), intermediate_stride=2), "intermediate_states: expected a place for every 2 tokens of a sequence, 2 of sequence 2, got 1"),
    "a slot that a fresh sequence and another write": (call(state_batch_indices=array(4, 2, 2), has_initial_state=array(True, True, False, dtype="bool")), "got 2 written by sequences 1 and 2"),
    "an entry twice": (call(intermediate_states=np.zeros((3, 2, 4, 4, 8), "float32"), intermediate_state_indices=array(0, 1, 1)), "intermediate_states: expected an entry to be written by one sequence"),
}  # fmt: skip
RIGHT = {
    "plain": call(),
    "pads twice": call(state_batch_indices=array(-1, 3, -1)),
    "in place and elsewhere": call(dst_state_batch_indices=array(4, 1, 5)),
    "one slot for several tokens": call(dst_state_batch_indices=array([4, 4], [1, 1], [2, 3])),
    "tables": call(state_batch_indices=WIDE, dst_state_batch_indices=WIDE, num_accepted_tokens=array(0, 2, 1)),
    "packed": packed(),
    "a slot of another named by an empty sequence": packed(state_batch_indices=array(4, 4, 2)),
    "no entries for pads and empty sequences": packed(
        cu_seqlens=array(0, 0, 2, ROWS),
        state_batch_indices=array(4, -1, 2),
        intermediate_states=np.zeros((3, 5, 4, 4, 8), "float32"),
    ),
    "trees": call(parent_tokens=array([-1, 0], [-1, -1], [-1, 0])),
    "packed trees": packed(parent_tokens=array(-1, 0, 0, -1, 0, 1, 0)),
    "a slot that a fresh sequence does not read": call(
        dst_state_batch_indices=array(1, 4, 5), has_initial_state=array(False, True, True, dtype="bool")
    ),
    "every second state": packed(intermediate_states=np.zeros((6, 2, 4, 4, 8), "float32"), intermediate_stride=2),
    "no indices": {n: a for n, a in call().items() if n != "state_batch_indices"},
}


# It is told from the tables alone, so that one backend will do; on a GPU they lie there.
CHECKED = [
    *((mode, "reference") for mode in ("numpy", "torch", "jax")),
    *(pytest.param(*pair, marks=pytest.mark.gpu) for pair in GPU_PAIRS if pair[0] in ("torch.cuda", "jax")),
]


@pytest.mark.parametrize(("mode", "backend"), CHECKED)
@pytest.mark.parametrize("what", WRONG)
def test_what_check_indices_finds(what, mode, backend):
    arrays, message = WRONG[what]
    given = convert(arrays, mode)
    with pytest.raises(ValueError, match=message):
        ssu_bridge.update(**given, check_indices=True, backend=backend)
    kept = {name: given[name] for name, array in arrays.items() if isinstance(array, np.ndarray)}
    for name, after in to_host(paired(kept), mode).items():
        np.testing.assert_array_equal(bits(after), bits(arrays[name]))


@pytest.mark.parametrize(("mode", "backend"), CHECKED)
@pytest.mark.parametrize("what", RIGHT)
def test_what_check_indices_lets_through(what, mode, backend):
    expected = to_host(results_by_name(ssu_bridge.update(**convert(RIGHT[what], mode), backend=backend)), mode)
    results = ssu_bridge.update(**convert(RIGHT[what], mode), check_indices=True, backend=backend)
    for name, after in to_host(results_by_name(results), mode).items():
        np.testing.assert_array_equal(bits(after), bits(expected[name]))


def test_check_indices_while_tracing():
    given = convert(call(), "jax")
    with pytest.raises(
        ValueError, match="check_indices: expected False while JAX traces, where indices have no values"
    ):
        jax.jit(lambda given: ssu_bridge.update(**given, check_indices=True, backend="xla"))(given)


def test_check_indices_on_every_backend():
    for mode, backend in (pair for pair in PAIRS if pair[0] in ("numpy", "torch", "jax")):
        given = convert(Case("checked").arrays(seed=1), mode)
        skip_if_refused(explain(**given, backend=backend))
        ssu_bridge.update(**convert(Case("checked").arrays(seed=1), mode), check_indices=True, backend=backend)
        arrays = {**Case("checked").arrays(seed=1), "state_batch_indices": array(1, 2, 99)}
        with pytest.raises(ValueError, match="state_batch_indices: expected"):
            ssu_bridge.update(**convert(arrays, mode), check_indices=True, backend=backend)
