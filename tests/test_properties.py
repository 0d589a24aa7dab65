"""Random problems of every shape on every backend: right, in place, and nothing else changed."""

import jax
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modes import PAIRS, int64_as_it_is
from test_contract import assert_step

from ssu_bridge.cases import Case

FLOATS = st.sampled_from(["float32", "bfloat16", "float16"])
NAMES = ["state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias"]


@st.composite
def problems(draw):
    nheads = draw(st.sampled_from([0, 1, 2, 3, 4, 6]))
    ngroups = draw(st.sampled_from([g for g in (1, 2, 3, 4, 6) if nheads % g == 0])) if nheads else 1
    sequences, slots = draw(st.integers(0, 4)), draw(st.integers(0, 6))
    table = st.integers(-3, 9) | st.sampled_from([-(2**31), 2**31 - 1])
    indices = draw(st.none() | st.lists(table, min_size=sequences, max_size=sequences))
    targets = draw(st.none() | st.permutations(range(-2, 8)))
    destinations = targets and targets[:sequences]
    pad = draw(st.sampled_from([-1, 0, 2, 99]))
    # Two sequences must not write one slot, and none may read what another writes.
    if indices is not None:
        indices = [i if indices.index(i) == n else -1 for n, i in enumerate(indices)]
    elif slots < sequences:
        slots = sequences
    reads = indices if indices is not None else list(range(sequences))
    if destinations is not None:
        destinations = [d if d not in reads or reads.index(d) == n else -1 for n, d in enumerate(destinations)]
    return Case(
        "property",
        sequences=sequences,
        slots=slots,
        nheads=nheads,
        headdim=draw(st.integers(1, 70)),
        dstate=draw(st.integers(1, 40) | st.sampled_from([64, 128, 256])),
        ngroups=ngroups,
        dtypes={name: draw(FLOATS) for name in NAMES}
        | {"dst_state_batch_indices": draw(st.sampled_from(["int32", "int64"]))},
        untied=tuple(draw(st.sets(st.sampled_from(["A", "dt", "D", "dt_bias"])))),
        absent=tuple(draw(st.sets(st.sampled_from(["D", "z", "dt_bias"])))),
        indices=None if indices is None else tuple(indices),
        destinations=None if destinations is None else tuple(destinations),
        pad_slot_id=pad,
        dt_softplus=draw(st.booleans()),
        group_axis=ngroups > 1 or draw(st.booleans()),
    )


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=problems(), seed=st.integers(0, 2**32 - 1), pair=st.sampled_from(PAIRS))
def test_any_problem(case, seed, pair):
    arrays = case.arrays(seed)
    with int64_as_it_is(arrays):
        assert_step(case, arrays, *pair)
    jax.clear_caches()
