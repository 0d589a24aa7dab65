"""``jax.vmap`` of the step: equal to a loop over the calls, whatever is mapped, and nothing is donated."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from copied import copied, jax_array
from matrix_cases import MATRIX_CASES
from modes import GPU_BACKENDS, bits, int64_as_it_is, skip_if_refused, to_mode
from thinned import covering, thinned

import ssu_bridge
from ssu_bridge.api import explain
from ssu_bridge.core.arguments import CURSOR, MOST_TOKENS_OF_A_TREE
from ssu_bridge.core.quantized import paired, unpaired
from ssu_bridge.core.rounding import LARGEST
from ssu_bridge.testing.cases import CASES, Case

SHARED = ("A", "D", "dt_bias", "rand_seed")
CALLS = 3
# Where numbers are drawn, no two calls would give the same.
DETERMINED = [case for case in CASES if case.seed is None]


def structure(case):
    """Return the pairs of what jax.vmap depends on in a case: its arrays with their axes and numbers, its options."""
    arrays = {name: array for name, array in case.arrays(0).items() if name not in CURSOR}
    facts = {(name, array.ndim, array.size > 0, array.dtype.name in LARGEST) for name, array in arrays.items()}
    tables = {name: array for name, array in arrays.items() if array.dtype.kind == "i" and array.dtype.itemsize > 2}
    slots = len(arrays["state"])
    facts |= {(name, table.dtype.name, bool((table < 0).any())) for name, table in tables.items()}
    # What another call's slots and rows begin at.
    facts |= {(name, "slots", bool((table >= slots).any())) for name, table in tables.items()}
    facts |= {
        ("cu_seqlens", "decrease", bool((np.diff(arrays[name]) < 0).any())) for name in tables if name == "cu_seqlens"
    }
    facts |= {("pad_slot_id", 0 <= case.flags.get("pad_slot_id", -1) < slots)}
    facts |= {(name, value if isinstance(value, bool) else value > 0) for name, value in case.flags.items()}
    return set(itertools.combinations(sorted(facts, key=str), 2))


def in_one_program(function, backend):
    """Compile what the xla backend computes as a whole: outside of ``jax.jit`` JAX compiles each of its operations."""
    return jax.jit(function) if backend == "xla" else function


# Not flashinfer where a table may hold anything: it trusts all values but pad_slot_id.
ANY_TABLE = ("cpu", *GPU_BACKENDS[:1])
KERNELS = ("cpu", *GPU_BACKENDS)
# Their bits depend on no batch; flashinfer takes one of its kernels by the batch's size.
EXACT = ("cpu", "triton")


def drawn(case, seed=0):
    """Draw the arrays of several calls that differ in all that a call can have of its own."""
    calls = [case.arrays(seed + j) for j in range(CALLS)]
    for j, arrays in enumerate(calls):
        for name in SHARED:
            if name in arrays:
                arrays[name] = calls[0][name]
        for name, array in arrays.items():
            if name == "cu_seqlens":
                arrays[name] = np.where(np.abs(array.astype(np.int64)) < 99, array + j, array)
            elif name.endswith("indices") or name == "num_accepted_tokens":
                arrays[name] = np.roll(array, j, axis=0)
    return calls


def as_jax(arrays):
    return unpaired(to_mode(arrays, "jax"))


def call(flags, arrays, window=0):
    return ssu_bridge.update(**paired(arrays, window), **flags)


def unmapped(flags, arrays, backend, window):
    """Make one of the calls. The cpu backend gives the same bits for NumPy arrays, with which JAX compiles nothing."""
    if backend != "cpu" or "rand_seed" in arrays:
        return call({**flags, "donate": False}, arrays, window)
    return call(flags, {name: np.array(array) for name, array in arrays.items()}, window)


def stacked(calls, mapped):
    """Return the arrays of all calls: those that ``mapped`` gives an axis have them all, the others those of the first."""
    # By NumPy, which compiles nothing.
    stack = copied({n: np.stack([c[n] for c in calls], axis) for n, axis in mapped.items() if n in calls[0]})
    return {**calls[0], **stack}


def assert_loop(case, calls, mapped, transform=lambda f: f, vmap=jax.vmap, **flags):
    """Assert that a mapped step gives what a loop over the calls does: the same bits, where a kernel promises them."""
    flags = {**case.flags, **flags}
    together = stacked(calls, mapped)
    axes = {name: mapped.get(name) for name in together}
    alone = [{n: c[n] if n in mapped else calls[0][n] for n in c} for c in calls]
    backend = explain(**paired(alone[0], case.window), **flags).backend
    run = transform(vmap(functools.partial(call, flags, window=case.window), in_axes=(axes,)))
    if backend is None:
        with pytest.raises(ssu_bridge.UnsupportedError):
            run(together)
        return
    results = [np.array(result) for result in jax.tree.leaves(run(together))]
    for j, one in enumerate(alone):
        expected = jax.tree.leaves(unmapped(flags, one, backend, case.window))
        for number, (got, array) in enumerate(zip(results, expected, strict=True)):
            assert got.dtype == array.dtype
            # The output's rows that belong to no sequence may hold anything.
            rows = owned(case, one) if number == 0 and "cu_seqlens" in one else slice(None)
            assert_close(got[j][rows], np.array(array)[rows], exact=backend in EXACT)
    assert not any(array.is_deleted() for array in jax.tree.leaves((together, calls)))


def owned(case, arrays):
    """Return which rows of a packed call belong to a sequence."""
    rows = np.arange(len(arrays["x"]))
    edges = np.clip(np.array(arrays["cu_seqlens"]), 0, len(rows))
    most = MOST_TOKENS_OF_A_TREE if "parent_tokens" in arrays else case.most if case.window else len(rows)
    ends = np.minimum(edges[1:], edges[:-1] + most)
    return np.array([((edges[:-1] <= row) & (row < ends)).any() for row in rows], bool)


def assert_close(got, expected, exact):
    if exact:
        np.testing.assert_array_equal(bits(got), bits(expected))
    else:
        step = {2: 2.0**-7, 4: 1e-5}[got.itemsize]
        np.testing.assert_allclose(*(a.astype("float32") for a in (got, expected)), rtol=step, atol=step)


def some(names, seed):
    """Choose about half of the names, at least one, and an axis for each."""
    rng = np.random.default_rng(seed)
    chosen = [n for n in names if rng.random() < 0.5] or [names[0]]
    return {name: int(rng.integers(2)) for name in chosen}


# By default each pair of arrays, with their axes and numbers, and of options occurs in some case.
@pytest.mark.parametrize("backend", ANY_TABLE)
@pytest.mark.parametrize("case", covering({case.name: case for case in DETERMINED}, structure))
def test_everything_mapped(case, backend):
    calls = drawn(case)
    with int64_as_it_is(calls[0]):
        calls = [as_jax(arrays) for arrays in calls]
        assert_loop(case, calls, {name: 0 for name in calls[0] if name not in SHARED}, jax.jit, backend=backend)


@pytest.mark.parametrize("backend", ("xla", *GPU_BACKENDS[:1]))
@pytest.mark.parametrize("what", MATRIX_CASES)
def test_everything_of_the_matrix_form_mapped(what, backend):
    case = MATRIX_CASES[what]
    calls = [as_jax(arrays) for arrays in drawn(case)]
    mapped = {name: 0 for name in calls[0] if name not in SHARED}
    assert_loop(case, calls, mapped, jax.jit, backend=backend, algorithm="matrix")


@pytest.mark.parametrize("backend", ANY_TABLE)
@pytest.mark.parametrize("case", thinned(DETERMINED[::3], one_in=3), ids=lambda case: case.name)
def test_some_mapped_eagerly(case, backend):
    calls = drawn(case, seed=len(case.name))
    with int64_as_it_is(calls[0]):
        calls = [as_jax(arrays) for arrays in calls]
        names = [name for name in calls[0] if name not in SHARED and calls[0][name].ndim]
        assert_loop(case, calls, some(names, seed=len(case.name)), backend=backend)


def test_packed_sequences_on_xla():
    """Those of one call begin where those of another do not, and some are empty because the edges decrease."""
    case = Case("packed", tokens=7, cu_seqlens=(0, 2, 5, 7), steps=3, headdim=4, dstate=8)
    calls = [as_jax(arrays) for arrays in drawn(case)]
    for one, edges in zip(calls[1:], [(1, 2, 4, 7), (6, 2, 2, 7)], strict=True):
        one["cu_seqlens"] = jax_array(edges, "int32")
    assert_loop(case, calls, {name: 0 for name in calls[0] if name not in SHARED}, jax.jit, backend="xla")


SMALL = {"sequences": 2, "slots": 3, "nheads": 2, "ngroups": 1, "headdim": 2, "dstate": 4}
TABLES = {
    "none": {},
    "none, state kept": {"disable_state_update": True},
    "none, as many slots": {"slots": 2},
    "none, as many slots, state kept": {"slots": 2, "disable_state_update": True},
    "packed": {"tokens": 3, "cu_seqlens": (0, 2, 3)},
    "slots": {"indices": (2, 0)},
    "destinations": {"destinations": (2, 1)},
    "both": {"indices": (0, 1), "destinations": (2, 1)},
    "columns": {"tokens": 2, "indices": ((0, 2), (2, 1)), "destinations": ((0, 2), (3, 1)), "accepted": (1, 2)},
    "columns of none": {"tokens": 2, "destinations": ((2, 0), (3, 1))},
    "entries": {"tokens": 2, "steps": 2, "entries": (2, 0)},
    "entries by slot": {"tokens": 2, "steps": 2, "indices": (2, 0)},
    "entries by sequence": {"tokens": 2, "steps": 2, "spare_entries": 1},
    "all that packed has": {"tokens": 3, "cu_seqlens": (0, 2, 3), "indices": (2, 0), "steps": 2, "entries": (0, 2)},
}


@pytest.mark.parametrize("backend", ANY_TABLE)
@pytest.mark.parametrize(("tables", "pad"), thinned(TABLES, range(-2, SMALL["slots"] + 1), one_in=3))
def test_every_pad_beside_every_table(tables, pad, backend):
    """Numbers that the fold makes up for tables that were not given are not the caller's, and never his pad."""
    case = Case(tables, **{**SMALL, "indices": None, **TABLES[tables]}, pad_slot_id=pad)
    calls = [as_jax(arrays) for arrays in drawn(case)]
    mapped = {name: 0 for name in calls[0] if name not in SHARED}
    if case.disable_state_update:
        del mapped["state"]
    assert_loop(case, calls, mapped, backend=backend)


# What of a call has 2^30 slots, entries or rows.
HUGE = {
    "state_batch_indices": ("state",),
    "intermediate_state_indices": ("intermediate_states",),
    "cu_seqlens": ("x", "dt", "B", "C", "z"),
}


@pytest.mark.parametrize("backend", ANY_TABLE)
@pytest.mark.parametrize("table", HUGE)
def test_numbers_beyond_int32(table, backend):
    """Of four calls' slots, entries or rows, which are one step's: in int64 if JAX has it, else an error."""
    case = Case("huge", **SMALL, **TABLES["all that packed has"])
    arrays = as_jax(case.arrays(0))
    shapes = {n: (*[4] * (n not in SHARED), *[2**30] * (n in HUGE[table])) for n in arrays}
    given = {n: jax.ShapeDtypeStruct((*shapes[n], *a.shape[n in HUGE[table] :]), a.dtype) for n, a in arrays.items()}
    axes = ({n: None if n in SHARED else 0 for n in arrays},)
    lower = jax.jit(jax.vmap(functools.partial(call, {**case.flags, "backend": backend}), in_axes=axes)).lower
    with pytest.raises(
        ssu_bridge.UnsupportedError, match=rf"^{table}: .* to {2**32} in it, beyond int32.*jax_enable_x64"
    ):
        lower(given)
    with jax.enable_x64(True):
        (step,) = re.findall(rf'custom_call @"ssu_bridge\.{backend}.*', lower(given).as_text())
    assert re.search(r"tensor<\d+xi64>", step)


CASE = Case("vmap", headdim=64, dstate=64, destinations=(1, -1, 5))  # which FlashInfer takes


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", [name for name in CASE.arrays(0) if name not in SHARED])
@pytest.mark.parametrize("transform", (lambda f: f, jax.jit), ids=("eager", "jit"))
def test_one_mapped(name, transform, backend):
    """With a state that is not, too: each call then changes a state of its own, and the caller's stays."""
    assert_loop(CASE, [as_jax(arrays) for arrays in drawn(CASE)], {name: 0}, transform, backend=backend)


@pytest.mark.parametrize("backend", ANY_TABLE)
@pytest.mark.parametrize("name", ("state", "state_scale"))
@pytest.mark.parametrize("kept", (False, True))
def test_one_array_of_a_quantised_state_mapped(kept, name, backend):
    case = Case("quantised", headdim=64, dstate=64, dtypes={"state": "int8"}, disable_state_update=kept)
    assert_loop(case, [as_jax(arrays) for arrays in drawn(case)], {name: 0}, backend=backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_there_is_no_loop(backend):
    calls = [as_jax(arrays) for arrays in drawn(CASE)]
    mapped = {name: 0 for name in calls[0] if name not in SHARED}
    together = stacked(calls, mapped)
    flags = {**CASE.flags, "backend": backend}
    run = jax.vmap(functools.partial(call, flags), in_axes=({**dict.fromkeys(SHARED[:3]), **mapped},))
    text = jax.jit(run).lower(together).as_text()
    assert text.count(f'"ssu_bridge.{backend}(') == 1
    assert "stablehlo.while" not in text


@pytest.mark.parametrize("backend", ("xla", *KERNELS))
@pytest.mark.parametrize("name", ("state", "x"))
def test_with_a_name_for_the_mapped_axis(name, backend):
    """It is for sharding constraints inside of the function, of which a step has none."""
    transform = functools.partial(jax.vmap, spmd_axis_name="calls")
    with jax.set_mesh(jax.make_mesh((1,), ("calls",), devices=jax.devices()[:1])):
        calls = [as_jax(arrays) for arrays in drawn(CASE)]
        assert_loop(CASE, calls, {name: 0}, jax.jit, transform, backend=backend)


@pytest.mark.parametrize("backend", ("xla", *KERNELS))
def test_nested(backend):
    inner, outer = ([as_jax(arrays) for arrays in drawn(CASE, seed)] for seed in (0, 10))
    both = [{**a, "B": b["B"]} for b in outer for a in inner]
    flags = {**CASE.flags, "backend": backend}
    arrays = {**stacked(inner, {"state": 0, "x": 0}), "B": jnp.stack([b["B"] for b in outer])}
    given = dict.fromkeys(arrays)
    run = jax.vmap(functools.partial(call, flags), in_axes=({**given, "state": 0, "x": 0},))
    results = in_one_program(jax.vmap(run, in_axes=({**given, "B": 0},)), backend)(arrays)
    for k, one in enumerate(both):
        one = {**inner[0], **{name: one[name] for name in ("state", "x", "B")}}
        for got, expected in zip(results, call({**flags, "donate": False}, one), strict=True):
            assert_close(np.array(got[divmod(k, CALLS)]), np.array(expected), exact=backend in EXACT)


@pytest.mark.parametrize("backend", KERNELS)
def test_inside_scan_and_scan_inside(backend):
    """In a scan whose carry is the mapped state, that ends up where it was."""
    flags = {**CASE.flags, "backend": backend}
    calls = [as_jax(arrays) for arrays in drawn(CASE)]
    together = stacked(calls, {"state": 0, "x": 0})
    axes = {name: 0 if name in ("state", "x") else None for name in together}
    mapped = jax.vmap(functools.partial(call, flags), in_axes=(axes,))

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state, rest):
        return jax.lax.scan(lambda s, _: mapped({**rest, "state": s})[::-1], state, None, length=4)

    def alone(arrays):
        def token(state, _):
            return call(flags, {**arrays, "state": state})[::-1]

        return jax.lax.scan(token, arrays["state"], None, length=4)

    inside = jax.jit(jax.vmap(alone, in_axes=(axes,)))(together)
    rest = {name: array for name, array in together.items() if name != "state"}
    before = together["state"].unsafe_buffer_pointer()
    state, outs = run(together["state"], rest)
    assert state.unsafe_buffer_pointer() == before
    np.testing.assert_array_equal(inside[0], state)
    np.testing.assert_array_equal(inside[1], jnp.swapaxes(outs, 0, 1))
    for j, one in enumerate(calls):
        one = {**calls[0], "state": one["state"], "x": one["x"]}
        for _ in range(4):
            _, one["state"] = call(flags, one)
        assert_close(np.array(state[j]), np.array(one["state"]), exact=backend in EXACT)


def scan_of_vmap(step):
    return lambda states: jax.lax.scan(lambda s, _: jax.vmap(step)(s), states, None, length=4)


def vmap_of_scan(step):
    return jax.vmap(lambda state: jax.lax.scan(lambda s, _: step(s), state, None, length=4))


def twice(step):
    return jax.vmap(jax.vmap(step))


AROUND = [
    (jax.vmap, (3,)),
    (scan_of_vmap, (3,)),
    (vmap_of_scan, (3,)),
    (twice, (2, 3)),
    (twice, (1, 3)),
    (twice, (3, 1)),
]


# By default each transform meets each number of slots, with one of the dtypes.
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    ("transform", "slots", "dtype"),
    thinned(AROUND, (8, 1), ("float32", "bfloat16", "int8"), one_in=3),
    ids=lambda value: f"{value[0].__name__}{value[1]}" if isinstance(value, tuple) else None,
)
def test_a_mapped_state_is_not_copied(transform, slots, dtype, backend):
    around, sizes = transform
    sizes_of_one = {"nheads": 16, "headdim": 64, "dstate": 128}
    case = Case("large", sequences=1, slots=slots, indices=None, dtypes={"state": dtype}, **sizes_of_one)
    arrays = to_mode(case.arrays(0), "jax")
    skip_if_refused(explain(**arrays, **case.flags, backend=backend))
    states = jax.tree.map(lambda a: jnp.tile(a, (*sizes, *[1] * a.ndim)), arrays.pop("state"))
    program = around(lambda state: ssu_bridge.update(state, **arrays, **case.flags, backend=backend)[::-1])
    compiled = jax.jit(program, donate_argnums=0).lower(states).compile()
    size = sum(array.nbytes for array in jax.tree.leaves(states))
    assert compiled.memory_analysis().temp_size_in_bytes < size / 4
    expected = jax.tree.leaves(jax.jit(program)(states))
    before = [array.unsafe_buffer_pointer() for array in jax.tree.leaves(states)]
    results = jax.tree.leaves(compiled(states))
    assert [array.unsafe_buffer_pointer() for array in results[: len(before)]] == before
    for got, array in zip(results, expected, strict=True):
        np.testing.assert_array_equal(bits(got), bits(array))


def test_a_mapped_state_of_another_layout():
    """XLA may lay an array out otherwise between two operations, but not where the step reads and writes it."""
    calls = [as_jax(arrays) for arrays in drawn(CASE)]
    together = stacked(calls, {"state": 0})
    mapped = jax.vmap(lambda state: call({**CASE.flags, "backend": "cpu"}, {**calls[0], "state": state}))
    turned = jax.jit(lambda states: mapped(states.T)[1].T)
    kept = jax.jit(lambda states: jax.lax.map(lambda factor: mapped(factor * states)[1], jnp.arange(1.0, 3.0)))
    expected = mapped(together["state"])[1]
    np.testing.assert_array_equal(bits(turned(together["state"].T).T), bits(expected))
    np.testing.assert_array_equal(bits(kept(together["state"])[0]), bits(expected))


def in_scan(f):
    return lambda x: [result[1] for result in jax.lax.scan(lambda x, _: (x, f(x)), x, None, length=2)[1]]


def in_cond(f):
    return lambda x: jax.lax.cond(True, f, lambda x: f(2 * x), x)


@pytest.mark.parametrize("backend", ("xla", *KERNELS))
@pytest.mark.parametrize("inside", (jax.jit, jax.checkpoint, in_scan, in_cond))
def test_a_closed_over_state_stays_the_callers(inside, backend):
    arrays = as_jax(CASE.arrays(0))
    flags = {**CASE.flags, "backend": backend}
    xs = jnp.stack([arrays["x"], -arrays["x"]])
    mapped = jax.vmap(inside(lambda x: call(flags, {**arrays, "x": x})))
    # Inside of jax.jit the arrays are constants, which nothing could donate; that one is a program by itself.
    mapped = mapped if inside is jax.jit else in_one_program(mapped, backend)
    for _ in range(2):
        results = mapped(xs)
        assert not any(array.is_deleted() for array in arrays.values())
    for j, x in enumerate(xs):
        for got, expected in zip(results, call({**flags, "donate": False}, {**arrays, "x": x}), strict=True):
            assert_close(np.array(got[j]), np.array(expected), exact=backend in EXACT)


@pytest.mark.parametrize("backend", ("xla", *KERNELS))
@pytest.mark.parametrize("inside", (jax.jit, in_scan, in_cond))
def test_a_call_that_takes_nothing_of_what_is_mapped(inside, backend):
    arrays = as_jax(CASE.arrays(0))
    flags = {**CASE.flags, "backend": backend}
    for _ in range(2):
        results = jax.vmap(inside(lambda x: call(flags, arrays)))(jnp.arange(2))
    for got, expected in zip(results, call({**flags, "donate": False}, arrays), strict=True):
        for one in got:
            assert_close(np.array(one), np.array(expected), exact=backend in EXACT)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", SHARED)
def test_a_mapped_parameter_is_refused(name, backend):
    case = Case("parameters", headdim=64, dstate=64, dtypes={"state": "float16"}, seed=5)
    arrays = as_jax(case.arrays(0))
    together = {**arrays, name: jnp.stack([arrays[name]] * 2)}
    axes = {n: 0 if n == name else None for n in arrays}
    flags = {**case.flags, "backend": backend, "donate": False}
    with pytest.raises(ssu_bridge.UnsupportedError, match=rf"{name}: .*jax\.lax\.map"):
        jax.vmap(functools.partial(call, flags), in_axes=(axes,))(together)
    assert not any(array.is_deleted() for array in arrays.values())
    _, states = jax.lax.map(lambda p: call(flags, {**arrays, name: p}), together[name])
    expected = call(flags, arrays)[1]
    for state in states:
        np.testing.assert_array_equal(bits(state), bits(expected))


@pytest.mark.parametrize("backend", ("xla", *KERNELS))
def test_a_choice_by_a_mapped_predicate(backend):
    """JAX computes both branches for each call, and maps the parameters that they close over."""
    arrays = as_jax(CASE.arrays(0))
    flags = {**CASE.flags, "backend": backend, "donate": False}

    def chosen(x):
        return jax.lax.cond(
            x[0, 0, 0] > 0, lambda x: call(flags, {**arrays, "x": x}), lambda x: (x, arrays["state"]), x
        )

    xs = jnp.stack([arrays["x"], -arrays["x"]])
    if backend == "xla":
        results = jax.jit(jax.vmap(chosen))(xs)
    else:
        with pytest.raises(
            ssu_bridge.UnsupportedError, match=r"A: jax\.vmap cannot map it, .*cond on a mapped predicate"
        ):
            jax.vmap(chosen)(xs)
        results = jax.lax.map(chosen, xs)
    for j, x in enumerate(xs):
        for got, expected in zip(results, chosen(x), strict=True):
            assert_close(np.array(got[j]), np.array(expected), exact=backend in EXACT)


@pytest.mark.parametrize("name", ("A", "D", "dt_bias"))
def test_the_xla_backend_maps_parameters_too(name):
    calls = [as_jax(arrays) for arrays in drawn(CASE)]
    for j, arrays in enumerate(calls):
        arrays[name] = (1 + j) * calls[0][name]
    assert_loop(CASE, calls, {name: 0}, backend="xla")


@pytest.mark.parametrize("backend", KERNELS)
def test_no_calls_at_all(backend):
    arrays = as_jax(CASE.arrays(0))
    axes = {name: 0 if name in ("state", "x") else None for name in arrays}
    empty = {n: jnp.zeros((0, *a.shape), a.dtype) if axes[n] == 0 else a for n, a in arrays.items()}
    out, state = jax.vmap(functools.partial(call, {**CASE.flags, "backend": backend}), in_axes=(axes,))(empty)
    assert (out.shape, state.shape) == (empty["x"].shape, empty["state"].shape)


@pytest.mark.parametrize("backend", KERNELS)
def test_calls_that_round_stochastically_draw_numbers_of_their_own(backend):
    case = Case("stochastic", headdim=64, dstate=64, dtypes={"state": "float16"}, seed=5)
    arrays = as_jax(case.arrays(0))
    flags = {**case.flags, "backend": backend, "donate": False}
    mapped = jax.vmap(lambda x: call(flags, {**arrays, "x": x})[1])
    first, second = np.array(mapped(jnp.stack([arrays["x"]] * 2)))
    assert (first != second).any()
    nearest = call(flags, {n: a for n, a in arrays.items() if n != "rand_seed"})[1]
    smallest = 2.0**-14 if backend == "flashinfer" else 2.0**-24  # below which it rounds to zero
    for state in (first, second):
        np.testing.assert_allclose(
            state.astype("float32"), np.array(nearest).astype("float32"), rtol=2.0**-10, atol=smallest
        )
