"""The native library by itself: the CPU kernel against NumPy in float64, and what it must never touch."""

import os
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
from native import BF16, F16, F32, ISAS, run, same_bits, view

from ssu_bridge.library import library

DTYPES = [F32, BF16, F16]
# Half a unit in the last place of each type, with some room.
ROUNDING = {F32: 4e-7, BF16: 4.0e-3, F16: 5.0e-4}
INDICES = ("state_batch_indices", "dst_state_batch_indices")


@pytest.fixture
def rng(request):
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


def problem(rng, b=3, heads=4, rows=8, columns=16, groups=2, slots=6, state=F32, other=F32, tied="A dt D", **options):
    """Return the arguments of one step, by name, in the kernel's order."""

    def normal(*shape, dtype=other):
        return rng.standard_normal(shape, dtype=np.float32).astype(dtype)

    per_row = () if "D" in tied else (rows,)
    arguments = {
        "state": normal(slots, heads, rows, columns, dtype=state),
        "x": normal(b, heads, rows),
        "dt": normal(b, heads, *(() if "dt" in tied else (rows,))),
        "A": -np.exp(normal(heads, *(() if "A" in tied else (rows, columns)), dtype=F32)).astype(other),
        "B": normal(b, groups, columns),
        "C": normal(b, groups, columns),
        "D": normal(heads, *per_row),
        "z": normal(b, heads, rows),
        "dt_bias": normal(heads, *per_row),
        "state_batch_indices": rng.permutation(slots)[:b].astype(np.int64 if b % 2 else np.int32),
    }
    arguments.update(options)
    return {name: value for name, value in arguments.items() if value is not None}


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


def test_odd_strides_of_weights(rng):
    arguments = problem(rng, tied="")
    out, state = run(arguments)
    for name in ("A", "D", "dt_bias"):
        arguments[name] = np.asfortranarray(arguments[name])
    assert all(map(same_bits, run(arguments), (out, state)))


def test_padding_behind_a_slot(rng):
    arguments = problem(rng)
    out, state = run(arguments)
    memory = np.full((6, 4 * 8 * 16 + 5), 7, np.float32)
    slots = np.lib.stride_tricks.as_strided(memory, state.shape, (memory.strides[0], 512, 64, 4))
    slots[...] = arguments["state"]
    views = [view(slots if name == "state" else value) for name, value in arguments.items()]
    strided_out = np.full_like(out, np.nan)
    library().cpu_kernel(list(arguments), ["out", "state"], True, -1, 10, "auto")(*views, view(strided_out), views[0])
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
    library().cpu_kernel(list(arguments), ["out", "state"], True, -1, 10, isa)(*views, view(out), views[0])
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


THREADS_SCRIPT = """
import hashlib, sys
import numpy as np
sys.path.insert(0, {tests!r})
from test_native import BF16, library, problem, run
assert library().cpu_num_threads() == {threads}
for state in (np.float32, BF16):
    arguments = problem(np.random.default_rng(5), b=32, heads=8, rows=64, columns=128, slots=33, state=np.dtype(state))
    print(hashlib.sha256(b"".join(a.tobytes() for a in run(arguments))).hexdigest())
"""


def run_script(script, **environment):
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)


def test_threads_do_not_change_the_bits():
    printed = set()
    for threads in (1, 4):
        script = THREADS_SCRIPT.format(tests=os.path.dirname(__file__), threads=threads)
        result = run_script(script, SSU_BRIDGE_NUM_THREADS=str(threads))
        assert result.returncode == 0, result.stderr
        printed.add(result.stdout)
    assert len(printed) == 1
    assert printed.pop().count("\n") == 2


@pytest.mark.parametrize("setting", ["0", "3x"])
def test_wrong_number_of_threads(setting):
    result = run_script(
        "from ssu_bridge.library import library; library().cpu_num_threads()", SSU_BRIDGE_NUM_THREADS=setting
    )
    assert "ValueError" in result.stderr
    assert "SSU_BRIDGE_NUM_THREADS" in result.stderr


CONCURRENT_SCRIPT = """
import os, sys, threading
import numpy as np
sys.path.insert(0, {tests!r})
from test_native import library, problem, run, same_bits
problems = [problem(np.random.default_rng(i), b=16, heads=8, rows=64, columns=128, slots=17) for i in range(8)]
wanted = [run(p) for p in problems]
wrong = []
def work(i):
    for _ in range(20):
        if not all(map(same_bits, run(problems[i]), wanted[i])):
            wrong.append(i)
threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not wrong, wrong
child = os.fork()
if child == 0:
    os._exit(0 if all(map(same_bits, run(problems[0]), wanted[0])) else 1)
assert os.waitpid(child, 0)[1] == 0
assert all(map(same_bits, run(problems[0]), wanted[0]))
"""


def test_many_callers_and_fork():
    script = CONCURRENT_SCRIPT.format(tests=os.path.dirname(__file__))
    result = run_script(script, SSU_BRIDGE_NUM_THREADS="4")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("state", DTYPES, ids=str)
def test_special_values(rng, state, isa):
    arguments = problem(rng, rows=6, columns=33, state=state, slots=3, other=F32)
    values = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0], np.float32).astype(state)
    arguments["state"][:, :, 0, :5] = values
    arguments["state"][:, :, 1, 32] = np.nan
    out, new = run(arguments, isa)
    slots = arguments["state_batch_indices"]
    assert np.isnan(out[:, :, :2]).all()
    assert np.isfinite(out[:, :, 2:].astype(np.float32)).all()
    assert np.isnan(new[slots][:, :, 0, 0].astype(np.float32)).all()
    assert np.isnan(new[slots][:, :, 1, 32].astype(np.float32)).all()
    assert np.isinf(new[slots][:, :, 0, 1:3].astype(np.float32)).all()
    assert np.isfinite(new[slots][:, :, 2:].astype(np.float32)).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000])
def test_every_nan_stays_nan(rng, bits, isa):
    nan = np.uint32(bits).view(np.float32)
    for name in ("x", "B", "dt", "A"):
        for tied in ("A dt D", ""):
            arguments = problem(rng, state=BF16, tied=tied, columns=40)
            arguments[name].ravel().view(np.uint32)[:] = bits
            out, new = run(arguments, isa)
            assert np.isnan(new[arguments["state_batch_indices"]].astype(np.float32)).all(), (name, tied, nan)
            assert np.isnan(out).all()
    arguments = problem(rng, x=np.ones((3, 4, 8), BF16))
    arguments["state"].view(np.uint32)[:] = bits
    assert np.isnan(run(arguments, isa)[0].astype(np.float32)).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("state", [BF16, F16], ids=str)
def test_state_is_rounded_to_nearest_even(rng, state, isa):
    """With x = 0 and dt = 0 a float32 B does not matter, so feed the rounding through B: state = 0, d = x = 1."""
    columns = 4096
    value = np.concatenate(
        [
            rng.integers(0, 2**32, 3072, np.uint32).view(np.float32),
            (rng.integers(0, 2**16, 1024).astype(np.uint32) << 16 | 0x8000).view(np.float32),
        ]
    )
    value = np.where(np.isnan(value), np.float32(1), value)
    ones = np.ones((1, 1, 1), np.float32)
    arguments = {
        "state": np.zeros((1, 1, 1, columns), state),
        "x": ones,
        "dt": ones,
        "A": np.zeros(1, np.float32),
        "B": value.reshape(1, 1, columns),
        "C": np.zeros((1, 1, columns), np.float32),
    }
    _, new = run(arguments, isa, softplus=False)
    with np.errstate(over="ignore"):
        assert (new.ravel() == value.astype(state)).all()


@pytest.mark.parametrize("isa", ISAS)
def test_softplus_and_decay_keep_their_accuracy(isa):
    """State = 1 and x = 0 show exp(A d); state = 0 and x = B = 1 show d."""
    d = np.concatenate([np.linspace(-103, 30, 4001), [-87.5, -95.0, 20.0, 20.000002, 88.0]]).astype(np.float32)
    rows = len(d)
    arguments = {
        "state": np.zeros((1, 1, rows, 2), np.float32),
        "x": np.ones((1, 1, rows), np.float32),
        "dt": d.reshape(1, 1, rows),
        "A": np.zeros(1, np.float32),
        "B": np.ones((1, 1, 2), np.float32),
        "C": np.ones((1, 1, 2), np.float32),
    }
    _, state = run(arguments, isa)
    wanted = np.logaddexp(0.0, d.astype(np.float64))
    wanted = np.where(d < -30, np.exp(d.astype(np.float64)), wanted)
    np.testing.assert_allclose(state[0, 0, :, 0], wanted, rtol=3e-7, atol=1.5e-45)

    arguments.update(state=np.ones_like(state), x=np.zeros_like(arguments["x"]), A=np.ones(1, np.float32))
    for A in (np.ones(1, np.float32), np.ones((1, rows, 2), np.float32)):
        _, state = run({**arguments, "A": A}, isa, softplus=False)
        np.testing.assert_allclose(state[0, 0, :, 1], np.exp(d.astype(np.float64)), rtol=3e-7, atol=1.5e-45)


@pytest.mark.parametrize("isa", ISAS)
def test_exp_of_special_values(isa):
    d = np.array([np.inf, -np.inf, np.nan, 89.0, 1e30, -105.0, -1e30, 0.0], np.float32)
    arguments = {
        "state": np.ones((1, 1, 8, 3), np.float32),
        "x": np.zeros((1, 1, 8), np.float32),
        "dt": np.where(np.isinf(d), 0, d).reshape(1, 1, 8).astype(np.float32),
        "A": np.ones(1, np.float32),
        "B": np.zeros((1, 1, 3), np.float32),
        "C": np.ones((1, 1, 3), np.float32),
    }
    for A in (np.ones(1, np.float32), np.ones((1, 8, 3), np.float32)):
        out, state = run({**arguments, "A": A}, isa, softplus=False)
        np.testing.assert_array_equal(state[0, 0, :, 2], [1, 1, np.nan, np.inf, np.inf, 0, 0, 1])
        np.testing.assert_array_equal(out[0, 0], [3, 3, np.nan, np.inf, np.inf, 0, 0, 3])


@pytest.mark.parametrize("isa", ISAS)
def test_gate_of_large_numbers(rng, isa):
    z = np.tile(np.array([-1e30, -200.0, -90.0, -20.0, 0.0, 20.0, 200.0, 1e30], np.float32), (3, 4, 1))
    arguments = problem(rng, z=None)
    y, _ = run(arguments, isa)
    gated, _ = run({**problem(rng), **arguments, "z": z} | {"dt_bias": arguments["dt_bias"]}, isa)
    with np.errstate(over="ignore"):
        wanted = y.astype(np.float64) * z / (1 + np.exp(-z.astype(np.float64)))
    np.testing.assert_allclose(gated, wanted, rtol=1e-6, atol=1e-37)


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
    for names in (six[:5], [*six, "E"], [*six, "z", "D"], [*six, "D", "D"], ["x", "state", *six[2:]]):
        with pytest.raises(ValueError, match="argument_names"):
            library().cpu_kernel(names, ["out", "state"], True, -1, 10, "auto")
    for results in ([], ["state"], ["state", "out"], ["out", "intermediate_states"], ["out", "state", "state_scale"]):
        with pytest.raises(ValueError, match="result_names"):
            library().cpu_kernel(six, results, True, -1, 10, "auto")
    with pytest.raises(ValueError, match="philox_rounds"):
        library().cpu_kernel(six, ["out", "state"], True, -1, -1, "auto")
    with pytest.raises(ValueError, match=r"isa must be one of auto, .*portable"):
        library().cpu_kernel(six, ["out", "state"], True, -1, 10, "sse9")


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
    kernel = library().cpu_kernel(list(arguments), ["out", "state"], True, -1, 10, "auto")
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
    del arguments["state_batch_indices"]
    with pytest.raises(ValueError, match="2 slots for 3 sequences"):
        run({**arguments, "state": arguments["state"][:2]})
    assert same_bits(arguments["state"], before)
    assert np.isnan(out).all()


@pytest.mark.parametrize("empty", [{"b": 0}, {"heads": 0, "groups": 1}, {"rows": 0}, {"columns": 0}], ids=str)
def test_empty(rng, empty):
    out, state = run(problem(rng, **empty))
    assert state.size == 0 or empty == {"b": 0}
    assert np.isfinite(out).all()


def test_flushing_threads_change_nothing(rng):
    """XLA calls the kernel from threads that flush subnormal numbers to zero."""
    torch = pytest.importorskip("torch")
    arguments = problem(rng, state=F32)
    arguments["state"] *= np.float32(1e-42)
    arguments["x"] *= np.float32(1e-42)
    out, state = run(arguments)
    subnormal = (state != 0) & (np.abs(state) < np.finfo(np.float32).tiny)
    assert subnormal.any()
    results = []

    def flushing():
        assert torch.set_flush_denormal(True)
        results.extend(run(arguments))

    thread = threading.Thread(target=flushing)
    thread.start()
    thread.join()
    assert all(map(same_bits, results, (out, state)))
