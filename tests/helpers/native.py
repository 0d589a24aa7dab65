"""Calling the native CPU kernel on NumPy arrays, and what a call must store, to the bit."""

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
from without_torch import WITHOUT_TORCH

from ssu_bridge.backends.rows import row as table_row
from ssu_bridge.core.arguments import ARGUMENTS, MOST_TOKENS_OF_A_TREE, WRITTEN
from ssu_bridge.core.rounding import LARGEST, key_of, rounded, scale_rows, slot_words
from ssu_bridge.native import library

F32, F16 = np.dtype(np.float32), np.dtype(np.float16)
BF16, FP8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
INT8, INT16 = np.dtype(np.int8), np.dtype(np.int16)
ROUNDABLE = (BF16, F16, INT8, FP8)
ISAS = list(library().cpu_isas())
ORDER = tuple(name for name in ARGUMENTS if name != "out")
_GUARD, _GUARD_BYTE = 1024, 0xA5


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


def view(array):
    """Hand a NumPy array over as it lies."""
    strides = tuple(s // array.itemsize for s in array.strides)
    return library().view(array.ctypes.data, array.shape, strides, str(array.dtype))


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def results_of(names, update=True):
    kept = () if update else ("state", "state_scale")
    return ["out", *(name for name in names if name in WRITTEN and name not in kept)]


def cpu_kernel(names, results, softplus=True, pad=-1, rounds=10, isa="auto", stride=1, round_each=False, replay=(0, 0)):
    rows = [
        table_row(name) if name in ARGUMENTS else (name, ["H"], "", 0, False, False, "") for name in (*names, "out")
    ]
    return library().cpu_kernel(rows, "state" in results, softplus, pad, rounds, stride, round_each, *replay, isa)


def run_all(arguments, isa="auto", softplus=True, pad=-1, update=True, rounds=10, stride=1, replay=(0, 0)):
    """Run the kernel and return its results by name, or the input of the name where it is none.

    ``replay`` is the window and the most tokens of a call with a checkpoint.

    What is written is a copy between guard bytes; those and everything that is only read must not change.
    """
    arguments = {name: arguments[name] for name in ORDER if name in arguments}
    results = results_of(arguments, update)
    out = np.full(arguments["x"].shape, np.nan, arguments["x"].dtype)
    guarded = {name: _guarded(array) for name, array in {**arguments, "out": out}.items() if name in results}
    given = {name: guarded[name][1] if name in guarded else array for name, array in arguments.items()}
    before = {name: array.tobytes() for name, array in given.items() if name not in results}

    kernel = cpu_kernel(list(given), results, softplus, pad, rounds, isa, stride, replay=replay)
    views = {name: view(array) for name, array in {**given, "out": guarded["out"][1]}.items()}
    kernel(*(views[name] for name in (*given, *results)))

    for name, content in before.items():
        assert given[name].tobytes() == content, name
    for name, (memory, _) in guarded.items():
        assert (memory[:_GUARD] == _GUARD_BYTE).all(), name
        assert (memory[len(memory) - _GUARD :] == _GUARD_BYTE).all(), name
    return {name: array for name, array in {**given, "out": guarded["out"][1]}.items() if name in ("out", *WRITTEN)}


def _guarded(array):
    memory = np.full(array.nbytes + 2 * _GUARD, _GUARD_BYTE, np.uint8)
    inner = memory[_GUARD : _GUARD + array.nbytes].view(array.dtype).reshape(array.shape)
    inner[...] = array
    return memory, inner


def run(arguments, isa="auto", softplus=True, pad=-1):
    """Run the kernel. Return out and the new state."""
    results = run_all(arguments, isa, softplus, pad)
    return results["out"], results["state"]


def stored(state, dtype, words=None):
    """Return the values, and the scales where they have some, as which a float32 state (..., N) is stored."""
    if dtype.name not in LARGEST:
        return rounded(state, dtype.name, words), None
    with np.errstate(invalid="ignore", over="ignore"):  # a row that is not finite
        values, scale = scale_rows(np, state, dtype.name)
    return rounded(values, dtype.name, words), scale


def loaded(values, scale):
    """Return a stored state in float32."""
    with np.errstate(invalid="ignore"):
        return values.astype(np.float32) * (np.float32(1) if scale is None else scale[..., None])


def expected_all(arguments, isa="auto", softplus=True, pad=-1, update=True, rounds=10, stride=1):
    """Return what a call must give, from float32 calls of one token and one sequence each and the rules of storing.

    Exact to the bit, except for the out of a call that the kernel steps from slot to slot, where the dtype of the state
    decides in which order numbers are added.
    """
    a = arguments
    results = {name: a[name].copy() for name in WRITTEN if name in a}
    results["out"] = np.full(a["x"].shape, np.nan, a["x"].dtype)
    packed = "cu_seqlens" in a
    several = packed or a["x"].ndim == a["state"].ndim
    sequences = len(a["cu_seqlens"]) - 1 if packed else len(a["x"])
    for i in range(sequences):
        if packed:
            first, end = np.clip(a["cu_seqlens"][i : i + 2].astype(object), 0, len(a["x"]))
            tokens = range(first, max(first, end))
            tokens = tokens[:MOST_TOKENS_OF_A_TREE] if "parent_tokens" in a else tokens
            rows = [(j,) for j in tokens]
        else:
            rows = [(i, t) for t in range(a["x"].shape[1])] if several else [(i,)]
        source = _read_slot(a, i, pad)
        initial = np.zeros(a["state"].shape[1:], np.float32)
        if source is not None and ("has_initial_state" not in a or a["has_initial_state"][i]):
            initial = loaded(a["state"][source], a["state_scale"][source] if "state_scale" in a else None)
        # After each token, and last, where -1 finds it, the one before the first.
        states = [None] * len(rows) + [initial.astype(np.float32)]
        for t, row in enumerate(rows):
            state = states[_parent(a, row, t)]
            token = {n: a[n][row][None] for n in ("x", "dt", "B", "C", "z") if n in a}
            weights = {n: a[n] for n in ("A", "D", "dt_bias") if n in a}
            out, new = run({"state": state[None], **token, **weights}, isa, softplus)
            results["out"][row], states[t] = out[0], new[0]
            if source is not None:
                for kind, entry in _stores(a, i, source, t, t == len(rows) - 1, pad, update, stride):
                    _store(results, a, kind, entry, t, states[t], rounds)
    return results


def _parent(a, row, t):
    """Return the token whose state token t continues, -1 for the state before the first."""
    parent = int(a["parent_tokens"][row]) if "parent_tokens" in a else t - 1
    return parent if 0 <= parent < t else -1


def _slot(a, index, pad):
    return int(index) if index != pad and 0 <= index < len(a["state"]) else None


def _read_slot(a, i, pad):
    table = a.get("state_batch_indices")
    if table is None:
        return i
    if table.ndim == 1:
        return _slot(a, table[i], pad)
    accepted = int(a["num_accepted_tokens"][i]) if "num_accepted_tokens" in a else 1
    column = min(max(accepted - 1, 0), table.shape[1] - 1)
    return _slot(a, table[i, column], pad) if table.shape[1] else None


def _stores(a, i, source, t, is_last, pad, update, stride):
    """List the (array, place) that the state after token t goes to."""
    if "intermediate_states" in a:
        entry = int(a["intermediate_state_indices"][i]) if "intermediate_state_indices" in a else source
        step, rest = divmod(t + 1, stride)
        if 0 <= entry < len(a["intermediate_states"]) and not rest and step <= a["intermediate_states"].shape[1]:
            yield "intermediate_states", (entry, step - 1)
    table = a.get("dst_state_batch_indices")
    if table is not None and table.ndim == 2:
        target = _slot(a, table[i, t], pad) if t < table.shape[1] else None
    else:
        target = (source if table is None else _slot(a, table[i], pad)) if is_last else None
        target = None if "parent_tokens" in a else target
    if update and target is not None:
        yield "state", (target,)


def _store(results, a, kind, place, t, state, rounds):
    dtype, words = a[kind].dtype, None
    if "rand_seed" in a:
        words = slot_words(place[0], state.shape, t, kind != "state", key_of(a["rand_seed"]), rounds)
    values, scale = stored(state, dtype, words)
    results[kind][place] = values
    if scale is not None:
        results["state_scale" if kind == "state" else "intermediate_state_scales"][place] = scale


def run_script(script, **environment):
    command = [sys.executable, "-c", script if "torch" in script else WITHOUT_TORCH + script]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)


# The end of a script in which ``prepared(size)`` makes the arrays of a call and the call: it is made once with a small
# size, and with a large one where there is no memory for its scratch, which is printed, and then where there is.
WITHOUT_MEMORY = """
import resource
arrays, kernel = prepared(small)
kernel()
arrays, kernel = prepared(large)
before = {name: array.copy() for name, array in arrays.items()}
room = resource.getrlimit(resource.RLIMIT_AS)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), room[1]))
try:
    kernel()
except MemoryError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, room)
assert all(array.tobytes() == before[name].tobytes() for name, array in arrays.items())
kernel()
assert arrays["out"].any()
"""
