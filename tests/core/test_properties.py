"""Random problems of every shape on every backend: right, in place, and nothing else changed."""

import jax
import pytest
from contract import assert_step
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from modes import GPU_PAIRS, PAIRS, int64_as_it_is

from ssu_bridge.core.arguments import ROUNDABLE
from ssu_bridge.core.rounding import LARGEST
from ssu_bridge.testing.cases import Case

TABLES = (
    "state_batch_indices",
    "dst_state_batch_indices",
    "num_accepted_tokens",
    "cu_seqlens",
    "intermediate_state_indices",
)
FLOATS = st.sampled_from(["float32", "bfloat16", "float16"])
NAMES = ["x", "dt", "A", "B", "C", "D", "z", "dt_bias"]


@st.composite
def problems(draw):
    """A case in which no two sequences meet in a slot, and everything else may be."""
    nheads = draw(st.sampled_from([0, 1, 2, 3, 4, 6]))
    ngroups = draw(st.sampled_from([g for g in (1, 2, 3, 4, 6) if nheads % g == 0])) if nheads else 1
    b, form = draw(st.integers(0, 4)), draw(st.sampled_from(["single", "multi", "packed"]))
    lengths = draw(st.lists(st.integers(0, 4), min_size=b, max_size=b))
    before = draw(st.integers(0, 2))  # rows ahead of the first sequence
    edges = [before + sum(lengths[:i]) for i in range(b + 1)]
    tokens = {"single": None, "multi": draw(st.integers(0, 4)), "packed": edges[-1] + draw(st.integers(0, 2))}[form]
    longest = max(lengths, default=0) if form == "packed" else tokens or 1
    slots, pad = draw(st.integers(0, 12)), draw(st.sampled_from([-1, 0, 2, 99]))
    indices, destinations, accepted = draw(slot_tables(b, max(slots, 1), max(longest, 1)))
    if indices is None:
        slots = max(slots, b)
    steps = draw(st.sampled_from([0, 0, longest, longest + 1])) if destinations is None else 0
    entries = draw(st.none() | st.permutations(range(-2, 8))) if steps else None
    state = draw(FLOATS | st.sampled_from(list(LARGEST)))
    return Case(
        "property",
        sequences=b,
        slots=slots,
        nheads=nheads,
        headdim=draw(st.integers(1, 70)),
        dstate=draw(st.integers(1, 40) | st.sampled_from([64, 128, 256])),
        ngroups=ngroups,
        dtypes={name: draw(FLOATS) for name in NAMES}
        | {"state": state}
        | {name: draw(st.sampled_from(["int32", "int64"])) for name in TABLES},
        untied=tuple(draw(st.sets(st.sampled_from(["A", "dt", "D", "dt_bias"])))),
        absent=tuple(draw(st.sets(st.sampled_from(["D", "z", "dt_bias"])))),
        indices=indices,
        destinations=destinations,
        accepted=accepted,
        pad_slot_id=pad,
        dt_softplus=draw(st.booleans()),
        disable_state_update=destinations is None and draw(st.booleans()),
        group_axis=ngroups > 1 or draw(st.booleans()),
        tokens=tokens,
        cu_seqlens=tuple(edges) if form == "packed" else None,
        steps=steps,
        spare_entries=draw(st.integers(0, 3)),
        entries=None if entries is None else tuple(entries[:b]),
        seed=draw(st.none() | st.integers(-(2**63), 2**63 - 1)) if state in ROUNDABLE else None,
    )


@st.composite
def slot_tables(draw, b, slots, longest):
    """Draw slots to read, to write and accepted counts; each sequence has slots of its own, some of them pads."""
    width = longest + draw(st.integers(0, 1))
    own = draw(st.permutations(range(b * width)))
    pads = st.sampled_from([-1, slots, slots + 5, -(2**31), 2**31 - 1])

    def entry(number):
        return number if number < slots and draw(st.integers(0, 9)) else draw(pads)

    table = tuple(tuple(entry(n) for n in own[i * width : (i + 1) * width]) for i in range(b))
    kind = draw(st.sampled_from(["none", "one", "table", "accepted", "other"]))
    if kind == "none":
        return None, None, None
    first = tuple(row[0] for row in table)
    if kind == "one":
        return first, None, None
    if kind == "other":  # read one slot of one's own, write another
        return first, tuple(row[-1] for row in table), None
    destinations = draw(st.sampled_from([None, table]))
    if not b:  # a table of no rows has no columns
        return (), None, None
    counts = draw(st.lists(st.integers(-1, width + 2), min_size=b, max_size=b))
    return table, destinations, tuple(counts) if kind == "accepted" else None


# JAX could give the memory of the scales to the output.
OUT_LIKE_SCALES = Case(
    "out like the scales",
    sequences=1,
    slots=4,
    nheads=0,
    headdim=1,
    dstate=1,
    indices=(0,),
    tokens=4,
    cu_seqlens=(0, 4),
    group_axis=False,
    dtypes={"state": "int16"},
)


def in_modes_of(pairs, examples):
    """Draw problems, with the mode and the backend that each is for."""

    def decorate(test):
        test = example(case=OUT_LIKE_SCALES, seed=0, pair=next(pair for pair in pairs if pair[0] == "jax.jit"))(test)
        test = given(case=problems(), seed=st.integers(0, 2**32 - 1), pair=st.sampled_from(pairs))(test)
        return settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])(test)

    return decorate


@in_modes_of(PAIRS, 70)
def test_any_problem(case, seed, pair):
    assert_right(case, seed, pair)


@pytest.mark.nightly  # other random problems, each of which is compiled
@in_modes_of(PAIRS, 200)
def test_more_problems(case, seed, pair):
    assert_right(case, seed, pair)


@pytest.mark.gpu
@in_modes_of(GPU_PAIRS, 100)
def test_any_problem_on_a_gpu(case, seed, pair):
    assert_right(case, seed, pair)


def assert_right(case, seed, pair):
    arrays = case.arrays(seed)
    with int64_as_it_is(arrays):
        assert_step(case, arrays, *pair)
    jax.clear_caches()
