"""Run a drawn call and hold it against the oracle."""

import functools
import warnings
from typing import NamedTuple

import numpy as np

import ssu_bridge
from fuzz import judge
from fuzz.draw_layouts import TABLES
from fuzz.judge import Wrong
from fuzz.memory import VECTOR, Buffers, placed
from fuzz.oracle import Oracle, owners, sequences
from ssu_bridge.testing.tolerances import ROUNDINGS

# What may be wrong with a call, as the package says.
ERRORS = (ValueError, TypeError, NotImplementedError)
UNIT = ROUNDINGS * 2.0**-24
PAIRS = {"state": "state_scale", "intermediate_states": "intermediate_state_scales"}
RINGS = ("replay_x", "replay_B", "replay_dt")


class Outcome(NamedTuple):
    """What became of a call: "computed", "unsupported" or "rejected"; what is wrong with that, or None; its error."""

    what: str
    wrong: Wrong | None
    error: Exception | None


@functools.cache
def _buffers():
    return Buffers(count=30, capacity=1 << 25)


def run(call):
    """Run a call and return its Outcome."""
    return _Run(call).outcome()


class _Run:
    """A call that is being run: its arrays in NumPy, and where they are read again after it."""

    def __init__(self, call):
        self.call, self.framework = call, call.mode.split(".")[0]
        arrays = call.arrays
        self.windows = {}
        if self.framework != "jax":
            unit = VECTOR if call.on_gpu else 1
            arrays, self.windows = placed(_buffers(), arrays, call.layouts, call.at_end, unit)
        self.views = arrays
        self.on_gpu = _gpu_windows(self.windows) if call.mode == "torch.cuda" else {}
        self.before = {name: np.array(array) for name, array in arrays.items()}
        self.bytes = {name: window.copy() for name, window in self.windows.items()}

    def outcome(self):
        given = arguments({n: self._converted(n, a) for n, a in self.views.items()}, self.call)
        if self.framework == "jax":
            self._keep_host_tables(given)
        if self.call.spoils:
            exec(self.call.spoils, {"np": np, "given": given})
        self.passed = {name: _to_host(array) for name, array in _by_name_of(given).items()}
        try:
            results = self._updated(given)
            self._read_back()
        except ERRORS as error:
            self._read_back()
            unsupported = isinstance(error, ssu_bridge.UnsupportedError)
            wrong = self._changed(given) or self._unexpected(error, unsupported)
            return Outcome("unsupported" if unsupported else "rejected", wrong, error)
        if self.call.spoils:
            return Outcome("computed", Wrong("the call", (), f"an error, for {self.call.spoils}", "none"), None)
        return Outcome("computed", self._judged(given, results), None)

    def _unexpected(self, error, unsupported):
        if self.call.spoils or unsupported:
            return None
        return Wrong("the call", (), "results", f"{type(error).__name__}: {error}")

    def _converted(self, name, view):
        if not self.on_gpu:
            return _converted(self.framework, name, view)
        buffer = self.call.layouts[name].buffer
        return _on_gpu(self.on_gpu[buffer], view, view.ctypes.data - self.windows[buffer].ctypes.data)

    def _keep_host_tables(self, given):
        """JAX takes tables of NumPy too; int64 it has none of otherwise."""
        for name in TABLES:
            if name in given and (self.call.host_tables or self.before[name].dtype == np.int64):
                given[name] = self.before[name].copy()

    def _updated(self, given):
        if self.call.mode == "jax.jit":
            return _jitted(self.call, given)
        if self.framework == "jax" and not self.call.donates:
            given = {**given, "donate": False}
        return ssu_bridge.update(**given)

    # --- Afterwards ---

    def _read_back(self):
        """Put the bytes that are on a GPU into those that are looked at."""
        for name, window in self.on_gpu.items():
            self.windows[name][...] = window.cpu().numpy()

    def _judged(self, given, results):
        call = self.call
        expected = Oracle(
            {n: a for n, a in self.before.items() if n != "out"}, call.options, UNIT,
            self._smallest(), exact := self._is_exact(),
        ).expected()  # fmt: skip
        if exact and "z" in self.before:  # a gate is not exact
            expected = _with_inexact_gate(expected, self.before["z"])
        if call.backend == "xla":
            expected = _without_sharing(expected, self.before, call.options)
        if self.framework != "jax" and (wrong := _other_objects(given, results)):
            return wrong
        by_name = {name: _to_host(array) for name, array in _by_name(results).items()}
        shape = self._state_shape()
        return judge.judged(expected, UNIT, by_name, shape) or self._changed(given, expected, by_name)

    def _is_exact(self):
        """Return whether a backend computes without an error."""
        return self.call.exact and not self._splits()

    def _splits(self):
        """Return whether a GPU may compute products of matrices, whose numbers are split into parts of bfloat16."""
        by_token = "cu_seqlens" not in self.before and self.before["x"].ndim < self.before["state"].ndim
        by_token |= self.call.flags.get("algorithm") == "loop"
        return self.call.on_gpu and (self.call.options.window > 0 or not by_token)

    def _smallest(self):
        """Return what the backend may take for zero.

        XLA all subnormal numbers, cpu those that replay leaves of a token, triton what no part of a number holds.
        """
        flushes = self.call.backend == "xla" or (self.call.backend == "cpu" and self.call.options.window)
        return 2.0**-126 if flushes else 2.0**-133 if self._splits() else 2.0**-149

    def _state_shape(self):
        shape = self.before["state"].shape
        return shape[1:] if len(shape) == 4 else (1, *shape[1:])

    def _changed(self, given, expected=None, results=None):
        """Return what a call has changed that it must not, in bytes, or None."""
        if self.framework == "jax":
            return self._changed_in_jax(given, expected, results)
        after = {name: window.copy() for name, window in self.windows.items()}
        for name, view in self.views.items() if expected else ():
            moved = self._in(after, name, view)
            for part, old in zip(judge.may_change(expected, name, moved), self._old_parts(expected, name), strict=True):
                part[...] = old
        for name, window in after.items():
            places = np.flatnonzero(window != self.bytes[name])
            if len(places):
                where = self._where(name, int(places[0]))
                return Wrong(f"memory of {where}", (), f"{self.bytes[name][places[0]]:#x}", f"{window[places[0]]:#x}")
        return None

    def _in(self, windows, name, view):
        """Return a view of copied bytes as the array ``name`` is one of the call's memory."""
        window = self.windows[self.call.layouts[name].buffer]
        offset = view.ctypes.data - window.ctypes.data if view.size else 0
        return np.ndarray(view.shape, view.dtype, windows[self.call.layouts[name].buffer], offset, view.strides)

    def _old_parts(self, expected, name):
        return judge.may_change(expected, name, self._in(self.bytes, name, self.views[name]))

    def _where(self, buffer, byte):
        """Say which array a byte of a buffer belongs to."""
        for name, view in self.views.items():
            if self.call.layouts[name].buffer == buffer and view.size:
                low, high = np.lib.array_utils.byte_bounds(view)
                byte_address = self.windows[buffer].ctypes.data + byte
                if low <= byte_address < high:
                    return f"{name}, byte {byte_address - low}"
        return f"{buffer}'s surroundings, byte {byte}"

    def _changed_in_jax(self, given, expected, results):
        for name, array in _by_name_of(given).items():
            if getattr(array, "is_deleted", bool)():
                if expected is None:
                    return Wrong(name, (), "nothing donated by a call that raises", "a deleted array")
            elif not _same_bits(_to_host(array), self.passed[name]):
                return Wrong(name, (), "an argument that stays as it was", "another one")
        for name, after in (results or {}).items():
            if name == "out":
                continue
            before = self.before[name].copy()
            after = after.copy()
            pairs = zip(judge.may_change(expected, name, after), judge.may_change(expected, name, before), strict=True)
            for part, old in pairs:
                part[...] = old
            if not _same_bits(after, before):
                return Wrong(f"rest of {name}", (), "what it was", "other bits")
        return None


def _with_inexact_gate(expected, z):
    z = np.abs(z.astype(np.float64).reshape(expected.out.shape))
    return expected._replace(errors=np.abs(expected.out) * (4 + z) + 2.0**-126)


def _without_sharing(expected, a, options):
    """On xla all results of sequences that share rows are undefined."""
    found = sequences(a, options)
    count = owners(found, len(expected.written))
    sharing = [one for one in found if len(one.rows) and count[one.rows.start : one.rows.stop].max() > 1]
    places = {("state", (s,)) for one in sharing for s in one.states if s is not None}
    places |= {("intermediate_states", e) for one in sharing for e in one.entries if e is not None}
    slots = {one.read for one in sharing} if options.window else set()
    known = expected.known.copy()
    for one in sharing:
        known[one.rows.start : one.rows.stop] = False
    stores = [
        store._replace(known=np.zeros_like(store.known))
        if (store.name, store.place) in places or store.place[0] in slots
        else store
        for store in expected.stores
    ]
    return expected._replace(known=known, stores=stores)


def arguments(arrays, call):
    """Return the arguments of ``update`` for arrays by kernels' names."""
    given = dict(arrays)
    for name, scale in PAIRS.items():
        if scale in given:
            given[name] = ssu_bridge.QuantizedState(given[name], given.pop(scale))
    if call.options.window:
        given["state"] = ssu_bridge.ReplayState(given["state"], *map(given.pop, RINGS))
        cursor = given.pop("replay_start"), given.pop("replay_pending")
        given["replay"] = ssu_bridge.ReplayCursor(*cursor, call.options.window, call.options.tokens)
    return {**given, **call.flags}


def _by_name(results):
    """Return the arrays that ``update`` returned, by kernels' names."""
    return _by_name_of(dict(zip(("out", "state", "intermediate_states"), results, strict=False)))


def _by_name_of(given):
    arrays = dict(given)
    if isinstance(state := arrays.get("state"), ssu_bridge.ReplayState):
        arrays |= zip(("state", *RINGS), state, strict=True)
    for name, scale in PAIRS.items():
        if isinstance(pair := arrays.get(name), ssu_bridge.QuantizedState):
            arrays[name], arrays[scale] = pair
    return {name: array for name, array in arrays.items() if hasattr(array, "dtype")}


def _other_objects(given, results):
    """Torch and NumPy get back what they passed."""
    for name, result in zip(("out", "state", "intermediate_states"), results, strict=False):
        passed = given.get(name)
        parts = zip(passed, result, strict=True) if isinstance(passed, tuple) else [(passed, result)]
        if passed is not None and not all(a is b or isinstance(a, tuple) for a, b in parts):
            return Wrong(name, (), "the object that was passed", "another one")
    return None


def _same_bits(a, b):
    return a.tobytes() == b.tobytes()


def _converted(framework, name, array):
    """Return a NumPy array as one of a framework: of the same memory, but for JAX."""
    if framework == "numpy":
        return array
    if framework == "jax":
        import jax

        if name == "rand_seed":
            array = np.array(array).reshape(1).view(np.uint32)
        array = array if array.dtype != np.int64 else array.astype(np.int32)
        # Memory of its own, which the first may not have. jnp.array compiles a program for each shape.
        return jax.block_until_ready(jax.device_put(jax.device_put(array), may_alias=False))
    import torch

    names = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn}
    if array.dtype.name not in names:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(f"int{8 * array.itemsize}")).view(names[array.dtype.name])


def _gpu_windows(windows):
    """Return copies of bytes on a GPU."""
    import torch

    return {name: torch.from_numpy(window).cuda() for name, window in windows.items()}


def _on_gpu(window, view, offset):
    """Return the tensor of bytes on a GPU that lie there as an array does among its own."""
    import torch

    dtype = getattr(torch, view.dtype.name)
    whole = window.view(torch.uint8 if dtype is torch.bool else dtype)
    strides = [stride // view.itemsize for stride in view.strides]
    tensor = whole.as_strided(view.shape, strides, offset // view.itemsize if view.size else 0)
    return tensor.view(dtype)


def _to_host(array):
    if isinstance(array, np.ndarray):
        return np.array(array)
    if type(array).__module__.split(".")[0] != "torch":
        return np.array(array)
    import torch

    kinds = {torch.bfloat16: (torch.int16, "bfloat16"), torch.float8_e4m3fn: (torch.int8, "float8_e4m3fn")}
    array = array.cpu()
    if array.dtype not in kinds:
        return np.array(array.numpy())
    integers, name = kinds[array.dtype]
    return np.array(array.view(integers).numpy()).view(name)


@functools.cache
def _program(flags, types, donates):
    """Return a jitted step; flags count with their types, because 1 equals True."""
    import jax

    names = ("state", "intermediate_states") if donates else ()

    @functools.partial(jax.jit, donate_argnames=names)
    def step(**arrays):
        return ssu_bridge.update(**arrays, **dict(flags))

    return step


def _jitted(call, given):
    arrays = {n: a for n, a in given.items() if hasattr(a, "shape") or isinstance(a, tuple) or n == "replay"}
    flags = {n: v for n, v in given.items() if n not in arrays}
    with warnings.catch_warnings():  # of a donated state that is not written, or that JAX could not take
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        return _program(tuple(flags.items()), tuple(map(type, flags.values())), call.donates)(**arrays)
