"""The native library by itself: the CPU kernel against NumPy in float64, and what it must never touch."""

import platform
import re
from pathlib import Path

import numpy as np
import pytest
from native import BF16, F16, F32, ISAS, cpu_kernel, problem, run, same_bits, view

from ssu_bridge.backends import cpu
from ssu_bridge.native import library

DTYPES = [F32, BF16, F16]
# Half a unit in the last place of each type, with some room.
ROUNDING = {F32: 4e-7, BF16: 4.0e-3, F16: 5.0e-4}
INDICES = ("state_batch_indices", "dst_state_batch_indices")


def expected(arguments, softplus=True, pad=-1):
    """Return out in float64 and {slot: state in float64} for the slots that are written."""
    a = {name: value if name in INDICES else value.astype(np.float64) for name, value in arguments.items()}
    slots, heads, rows, columns = a["state"].shape
    out, written = np.zeros(a["x"].shape), {}

    def valid(slot):
        return slot != pad and 0 <= slot < slots

    def spread(value, *shape):
        return np.broadcast_to(value.reshape(value.shape + (1,) * (len(shape) - value.ndim)), shape)

    for i, x in enumerate(a["x"]):
        d = spread(a["dt"][i], heads, rows) + spread(a.get("dt_bias", np.zeros(heads)), heads, rows)
        d = np.where(d > 20, d, np.log1p(np.exp(np.minimum(d, 20)))) if softplus else d
        B, C = (np.repeat(np.atleast_2d(a[name][i]), heads // len(np.atleast_2d(a[name][i])), axis=0) for name in "BC")
        source = int(a["state_batch_indices"][i]) if "state_batch_indices" in a else i
        target = int(a["dst_state_batch_indices"][i]) if "dst_state_batch_indices" in a else source
        state = a["state"][source] if valid(source) else np.zeros(a["state"].shape[1:])
        decay = np.exp(spread(a["A"], heads, rows, columns) * d[..., None])
        state = state * decay + (d * x)[..., None] * B[:, None]
        y = (state * C[:, None]).sum(-1) + spread(a.get("D", np.zeros(heads)), heads, rows) * x
        out[i] = y * a["z"][i] / (1 + np.exp(-a["z"][i])) if "z" in a else y
        if valid(source) and valid(target):
            written[target] = state
    return out, written


def assert_close(actual, wanted, dtype, scale=1.0):
    error = np.abs(actual.astype(np.float64) - wanted)
    np.testing.assert_array_less(error, scale * 1e-5 + ROUNDING[dtype] * np.abs(wanted) + 1e-5 * np.abs(wanted))


def check(arguments, isa="auto", **options):
    """Compare a step with float64; what is not written must keep its bits."""
    out, state = run(arguments, isa, **options)
    y, written = expected(arguments, **options)
    assert_close(out, y, out.dtype, scale=arguments["state"].shape[-1] ** 0.5)
    for slot, value in enumerate(state):
        if slot in written:
            assert_close(value, written[slot], state.dtype)
        else:
            assert same_bits(value, arguments["state"][slot])
    return out, state


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("other", DTYPES, ids=str)
@pytest.mark.parametrize("state", DTYPES, ids=str)
def test_dtypes(rng, state, other, isa):
    check(problem(rng, state=state, other=other), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tied", ["A dt D", "A D", "dt D", "dt", "A", ""])
@pytest.mark.parametrize("state", [F32, BF16], ids=str)
def test_tying(rng, state, tied, isa):
    check(problem(rng, state=state, tied=tied, rows=11), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("state", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (5, 13), (3, 17), (7, 31), (13, 33), (4, 47), (600, 16), (64, 128)]
)
def test_sizes(rng, rows, columns, state, isa):
    for tied in ("A dt D", ""):
        check(problem(rng, rows=rows, columns=columns, state=state, tied=tied, b=2, heads=2, slots=3), isa)


@pytest.mark.parametrize("absent", ["D", "z", "dt_bias", "state_batch_indices", "D z dt_bias state_batch_indices"])
def test_absent_arguments(rng, absent):
    check(problem(rng, **dict.fromkeys(absent.split())))
    check(problem(rng, **dict.fromkeys(absent.split())), softplus=False)


def test_each_tensor_has_its_own_dtype(rng):
    arguments = problem(rng)
    for i, name in enumerate(arguments):
        if name not in INDICES:
            arguments[name] = arguments[name].astype(DTYPES[i % 3])
    check(arguments)


@pytest.mark.parametrize("tied", ["A dt D", ""])
@pytest.mark.parametrize("state", DTYPES, ids=str)
def test_variants_agree(rng, state, tied):
    arguments = problem(rng, rows=9, columns=37, state=state, tied=tied)
    results = [run(arguments, isa) for isa in ISAS]
    for out, new in results[1:]:
        np.testing.assert_allclose(out, results[0][0], rtol=1e-5, atol=2e-6)
        step = {F32: 0, BF16: 2.0**-7, F16: 2.0**-10}[state]
        np.testing.assert_allclose(
            new.astype(np.float64), results[0][1].astype(np.float64), rtol=1e-5 + step, atol=1e-6
        )


def test_state_without_head_axis(rng):
    with_heads = problem(rng, heads=1, groups=1, tied="", rows=40)
    out, state = check(with_heads)
    dropped = {"state": 1, "x": 1, "dt": 1, "A": 0, "D": 0, "z": 1, "dt_bias": 0}
    for groups in (("B", "C"), ("B",), ()):
        axes = {**dropped, **dict.fromkeys(groups, 1)}
        arguments = {name: value.squeeze(axes[name]) if name in axes else value for name, value in with_heads.items()}
        flat_out, flat_state = run(arguments)
        assert same_bits(flat_out, out.squeeze(1))
        assert same_bits(flat_state, state.squeeze(1))


def test_one_group_without_its_axis(rng):
    arguments = problem(rng, groups=1)
    out, state = check(arguments)
    arguments.update(B=arguments["B"][:, 0])
    assert all(map(same_bits, run(arguments), (out, state)))


@pytest.mark.parametrize("isa", ISAS)
def test_strides(rng, isa):
    tied, rows, columns = problem(rng), 8, 16
    out, state = run(tied, isa)
    strided = dict(tied)
    for name, shape in {"A": (4, rows, columns), "dt": (3, 4, rows), "D": (4, rows), "dt_bias": (4, rows)}.items():
        value = tied[name]
        strided[name] = np.broadcast_to(value.reshape(value.shape + (1,) * (len(shape) - value.ndim)), shape)
    for name in ("x", "z", "B", "C"):
        strided[name] = np.concatenate([tied[name], np.full_like(tied[name], np.nan)], axis=1)[:, : tied[name].shape[1]]
    strided["state_batch_indices"] = np.repeat(tied["state_batch_indices"], 2)[::2]
    assert all(map(same_bits, run(strided, isa), (out, state)))


@pytest.mark.parametrize("name", ["state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias"])
def test_axes_that_must_be_dense(rng, name):
    arguments = problem(rng, tied="")
    dense = arguments[name]
    arguments[name] = np.concatenate([dense, np.full_like(dense, np.nan)], axis=-1)[..., : dense.shape[-1]]
    with pytest.raises(ValueError, match=f"{name} must be contiguous from axis"):
        cpu_kernel(list(arguments), ["out"])(*map(view, arguments.values()), view(np.zeros_like(arguments["x"])))


@pytest.mark.parametrize("name", ["state", "out"])
def test_what_is_written_does_not_overlap_itself(rng, name):
    arguments = {**problem(rng), "out": np.zeros((3, 4, 8), np.float32)}
    arguments[name] = np.broadcast_to(arguments[name][:1], arguments[name].shape)
    views = [*map(view, arguments.values())]
    with pytest.raises(ValueError, match=f"{name} must not overlap itself"):
        cpu_kernel([*arguments][:-1], ["out", "state"])(*views, views[0])


def test_padding_behind_a_slot(rng):
    arguments = problem(rng)
    out, state = run(arguments)
    memory = np.full((6, 4 * 8 * 16 + 5), 7, np.float32)
    slots = np.lib.stride_tricks.as_strided(memory, state.shape, (memory.strides[0], 512, 64, 4))
    slots[...] = arguments["state"]
    views = [view(slots if name == "state" else value) for name, value in arguments.items()]
    strided_out = np.full_like(out, np.nan)
    cpu_kernel(list(arguments), ["out", "state"])(*views, view(strided_out), views[0])
    assert same_bits(strided_out, out)
    assert same_bits(np.ascontiguousarray(slots), state)
    assert (memory[:, -5:] == 7).all()


@pytest.mark.parametrize("dtype", [np.int32, np.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("isa", ISAS)
def test_pads_touch_nothing(rng, isa, dtype):
    edges = np.iinfo(dtype)
    read = np.array([3, -1, 6, edges.max, edges.min, 2, 0, 1, 5, 4], dtype)
    write = np.array([3, 0, 0, 0, 0, 6, edges.max, edges.min, -1, 4], dtype)
    arguments = problem(rng, b=10, state_batch_indices=read)
    check(arguments, isa)
    check({**arguments, "dst_state_batch_indices": write}, isa)
    check(arguments, isa, pad=3)
    guarded = np.full((8, *arguments["state"].shape[1:]), np.nan, np.float32)
    guarded[1:-1] = arguments["state"]
    before = guarded.copy()
    views = [view(guarded[1:-1] if name == "state" else value) for name, value in arguments.items()]
    out = np.full_like(arguments["x"], np.nan)
    cpu_kernel(list(arguments), ["out", "state"], isa=isa)(*views, view(out), views[0])
    assert same_bits(guarded[[0, -1]], before[[0, -1]])
    assert np.isfinite(out).all()


def test_destination_slots(rng):
    arguments = problem(rng, state_batch_indices=np.array([0, 1, 2]))
    check({**arguments, "dst_state_batch_indices": np.array([3, 1, 5])})
    del arguments["state_batch_indices"]
    check({**arguments, "dst_state_batch_indices": np.array([3, 4, 5])})


@pytest.mark.parametrize("state", DTYPES, ids=str)
def test_a_sequence_does_not_depend_on_its_batch(rng, state):
    arguments = problem(rng, b=48, heads=8, rows=32, columns=80, groups=2, slots=50, state=state)
    out, new = run(arguments)
    per_sequence = ("x", "dt", "B", "C", "z", "state_batch_indices")
    for part in (slice(0, 1), slice(17, 20), slice(47, 48), slice(None, None, -1)):
        small = {name: value[part].copy() if name in per_sequence else value for name, value in arguments.items()}
        part_out, part_new = run(small)
        assert same_bits(part_out, np.ascontiguousarray(out[part]))
        assert same_bits(part_new[small["state_batch_indices"]], new[small["state_batch_indices"]])


def test_view():
    array = np.arange(12, dtype=np.float32).reshape(3, 4).astype(BF16)
    array.flags.writeable = False
    tensor = view(array[:, ::2])
    assert tuple(tensor.shape) == (3, 2)
    assert tuple(tensor.strides) == (4, 2)
    assert str(tensor.dtype) == "bfloat16"
    assert tuple(library().view(array.ctypes.data, (5, 2), (0, 1), "bfloat16").strides) == (0, 1)
    with pytest.raises(ValueError, match="strides"):
        library().view(array.ctypes.data, (3, 4), (4,), "bfloat16")


def test_names_and_variants():
    assert library().cpu_isa() == ISAS[0]
    assert ISAS[-1] == "portable"
    six = ["state", "x", "dt", "A", "B", "C"]
    for names in (six[:5], [*six, "E"], [*six, "D", "D"], ["x", *six[2:]]):
        with pytest.raises(ValueError, match=r"arguments: '\w+' is (missing|unknown|twice there)"):
            cpu_kernel(names, ["out", "state"])
    rows = [cpu.row(name) for name in six]
    for wrong in ([], rows, [*rows, cpu.row("out"), cpu.row("D")]):
        with pytest.raises(ValueError, match="arguments: (expected 'out' at the end|'(state|out)' is missing)"):
            library().cpu_kernel(wrong, True, True, -1, 10, 1, False, 0, 0, "auto")
    with pytest.raises(ValueError, match="philox_rounds"):
        cpu_kernel(six, ["out", "state"], rounds=-1)
    with pytest.raises(ValueError, match=r"isa must be one of auto, .*portable"):
        cpu_kernel(six, ["out", "state"], isa="sse9")


def test_the_order_of_the_arguments_is_the_caller_s(rng):
    arguments = problem(rng)
    wanted = run(arguments)
    given = {name: array.copy() for name, array in reversed(arguments.items())}
    out = np.zeros_like(given["x"])
    kernel = cpu_kernel(list(given), ["out", "state"])
    kernel(*map(view, given.values()), view(out), view(given["state"]))
    assert same_bits(out, wanted[0])
    assert same_bits(given["state"], wanted[1])


def test_wrong_tensors(rng):
    arguments = problem(rng)
    wrong = {
        "x": np.zeros((3, 4, 9), np.float32),
        "dt": np.zeros((3, 4, 8, 1), np.float32),
        "A": np.zeros((4, 8), np.float32),
        "B": np.zeros((3, 3, 16), np.float32),
        "C": np.zeros((3, 2, 16), np.float64),
        "D": np.zeros((4, 8), np.int32),
        "state_batch_indices": np.zeros(3, np.float32),
    }
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"{name}|groups"):
            run({**arguments, name: value})
    kernel = cpu_kernel(list(arguments), ["out", "state"])
    views = [view(value) for value in arguments.values()]
    out = np.full_like(arguments["x"], np.nan)
    before = arguments["state"].copy()
    with pytest.raises(ValueError, match="in place"):
        kernel(*views, view(out), view(before))
    spaced = np.zeros((6, 4, 8, 32), np.float32)[..., ::2]
    with pytest.raises(ValueError, match="contiguous"):
        kernel(view(spaced), *views[1:], view(out), view(spaced))
    with pytest.raises(ValueError, match="expected 10 inputs"):
        kernel(*views[1:], view(out), views[0])
    with pytest.raises(ValueError, match="out must have the type of x"):
        kernel(*views, view(out.astype(BF16)), views[0])
    del arguments["state_batch_indices"]
    with pytest.raises(ValueError, match="2 slots for 3 sequences"):
        run({**arguments, "state": arguments["state"][:2]})
    with pytest.raises(ValueError, match="C has no axis for the 2 groups"):
        run({**arguments, "C": arguments["C"][:, 0]})
    assert same_bits(arguments["state"], before)
    assert np.isnan(out).all()


@pytest.mark.parametrize(
    ("empty", "symbol"), [({"heads": 0, "groups": 1}, "nheads"), ({"rows": 0}, "headdim"), ({"columns": 0}, "dstate")]
)
def test_empty_heads(rng, empty, symbol):
    with pytest.raises(ValueError, match=f"expected {symbol} of at least 1, got 0"):
        run(problem(rng, **empty))


def test_no_sequences(rng):
    arguments = problem(rng, b=0)
    out, state = run(arguments)
    assert out.size == 0
    assert same_bits(state, arguments["state"])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only there the kernel has several instruction sets")
def test_the_instruction_sets_are_those_of_the_processor():
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())
    needed = {"avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}, "avx2": {"avx2", "fma", "f16c"}}
    expected = [name for name, features in needed.items() if features <= flags]
    assert list(library().cpu_isas()) == [*expected, "portable"]
