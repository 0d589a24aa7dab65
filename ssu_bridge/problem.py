"""Problem: the one description of a call, and the one check of its arrays."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (gives NumPy the dtypes "bfloat16" and "float8_e4m3fn")
import numpy as np

from ssu_bridge.arrays import SCALES, ArrayInfo
from ssu_bridge.config import SSUConfig, replaced
from ssu_bridge.rounding import LARGEST

FLOATS = ("float32", "bfloat16", "float16")
INDICES = ("int32", "int64")
QUANTIZED = tuple(LARGEST)
# A state of one of these can be rounded stochastically; float32 holds the result as it is, int16 all but so.
ROUNDABLE = ("float16", "bfloat16", "int8", "float8_e4m3fn")
# The most that a thread of a GPU loads at once, and from multiples of it only.
VECTOR_BYTES = 16


class _Argument(NamedTuple):
    """What an array argument must look like.

    ``shapes`` spells each allowed shape in the symbols of semantics: S slots, H nheads, P headdim, N dstate, G ngroups,
    b sequences, W table columns, E and K entries and steps of the intermediate buffer, Q = b + 1; * stands for the
    token axes (b; b T; or L packed rows). ``free`` of its leading axes (all of the token axes for *) may be strided.
    """

    shapes: tuple[str, ...]
    dtypes: tuple[str, ...]
    free: str = ""
    written: bool = False


# In the order in which kernels take them. A shape that lacks H or G stands for one that repeats along P, or for G = 1.
ARGUMENTS: dict[str, _Argument] = {
    "state": _Argument(("SHPN",), FLOATS + QUANTIZED, "S", written=True),
    "x": _Argument(("*HP",), FLOATS, "*"),
    "dt": _Argument(("*HP", "*H"), FLOATS, "*"),
    "A": _Argument(("HPN", "H"), FLOATS),
    "B": _Argument(("*GN", "*N"), FLOATS, "*"),
    "C": _Argument(("*GN", "*N"), FLOATS, "*"),
    "D": _Argument(("HP", "H"), FLOATS),
    "z": _Argument(("*HP",), FLOATS, "*"),
    "dt_bias": _Argument(("HP", "H"), FLOATS),
    "state_batch_indices": _Argument(("b", "bW"), INDICES, "bW"),
    "dst_state_batch_indices": _Argument(("b", "bV"), INDICES, "bV"),
    "num_accepted_tokens": _Argument(("b",), INDICES, "b"),
    "cu_seqlens": _Argument(("Q",), INDICES, "Q"),
    "intermediate_states": _Argument(("EKHPN",), FLOATS + QUANTIZED, "E", written=True),
    "intermediate_state_indices": _Argument(("b",), INDICES, "b"),
    "parent_tokens": _Argument(("bT",), INDICES, "bT"),
    "state_scale": _Argument(("SHP",), ("float32",), "S", written=True),
    "intermediate_state_scales": _Argument(("EKHP",), ("float32",), "E", written=True),
    "rand_seed": _Argument(("", "1", "2"), ("int64", "uint32")),
    "out": _Argument(("*HP",), FLOATS, "*", written=True),
}
REQUIRED = ("state", "x", "dt", "A", "B", "C")
# What disable_state_update leaves alone.
STATE = ("state", "state_scale")
# These say tied by leaving an axis out, or by a stride of 0 along the axes that this names.
_TIED_AXES = {"dt": 1, "A": 2, "D": 1, "dt_bias": 1}
# The names of the sizes that the symbols stand for.
SIZES = {"S": "slots", "H": "nheads", "P": "headdim", "N": "dstate", "G": "ngroups", "b": "sequences", "T": "tokens"}


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """The arguments of a call that are not arrays, checked."""

    dt_softplus: bool
    pad_slot_id: int
    disable_state_update: bool
    donate: bool
    check_indices: bool
    config: SSUConfig


def options_of(
    dt_softplus: Any,
    pad_slot_id: Any,
    disable_state_update: Any,
    donate: Any,
    check_indices: Any,
    backend: Any,
    algorithm: Any,
    config: SSUConfig,
) -> Options:
    """Check the arguments of a call that are not arrays, and put the configuration in force with them.

    Raises:
        ValueError, TypeError: one is wrong; the message names it, what was expected and what came.
    """
    flags = {"dt_softplus": dt_softplus, "disable_state_update": disable_state_update}
    for name, flag in {**flags, "donate": donate, "check_indices": check_indices}.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected a Python bool, got {_came(flag)}")
    if isinstance(pad_slot_id, bool) or not isinstance(pad_slot_id, int | np.integer):
        raise TypeError(f"pad_slot_id: expected a Python int, got {_came(pad_slot_id)}")
    if not -(2**63) <= pad_slot_id < 2**63:
        raise ValueError(f"pad_slot_id: expected an int of 64 bits, got {pad_slot_id}")
    in_force = replaced(config, backend, algorithm)
    return Options(dt_softplus, int(pad_slot_id), disable_state_update, donate, check_indices, in_force)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One call of ``update`` without its arrays: what a backend needs to refuse it or to load a kernel for it.

    Attributes:
        framework: "jax", "torch" or "numpy".
        platform: "cpu", "cuda" or what else the framework calls it; None while JAX traces and has not lowered.
        capability: of a CUDA device, such as (9, 0).
        traced: JAX is tracing, so there are no values.
        form: "single" token, x (b, H, P); "multi", x (b, T, H, P); or "packed", x (rows, H, P) and cu_seqlens.
        sequences, tokens, slots, nheads, headdim, dstate, ngroups: sizes; tokens is the number of packed rows when
            packed. A state without a head axis has nheads = ngroups = 1.
        heads_axis: the arrays have an axis of heads.
        dtypes: (name, dtype) of every array that was given, in the order of ``ARGUMENTS``.
        tied: names of the parameters that are one number a head.
        tables: names of the slot tables that have a column for each token. How many columns they have, how many steps
            the intermediate states, a kernel reads from the arrays: a token past the last one stores nothing there.
        columns: how many columns the slot tables have, the fewest of them; 0 without tables.
        entries: how many entries the intermediate states have.
        stochastic_rounding: the state is to be rounded stochastically, by ``options.config.philox_rounds`` rounds of
            Philox with the key in ``rand_seed``: 8 bytes, the low word first, whatever its dtype and shape.
        unaligned: names of the arrays, out included, that do not lie so that all that a kernel reads of them in
            vectors begins at a multiple of VECTOR_BYTES.
        strided: names of the arrays that have gaps between their entries.
        options: the arguments that are not arrays.
    """

    framework: str
    platform: str | None
    capability: tuple[int, int] | None = None
    traced: bool = False
    form: str
    sequences: int
    tokens: int
    slots: int
    nheads: int
    headdim: int
    dstate: int
    ngroups: int
    heads_axis: bool
    dtypes: tuple[tuple[str, str], ...]
    tied: tuple[str, ...]
    tables: tuple[str, ...]
    columns: int
    entries: int
    stochastic_rounding: bool
    unaligned: tuple[str, ...]
    strided: tuple[str, ...]
    options: Options

    @property
    def names(self) -> tuple[str, ...]:
        """The arrays that were given, in the order in which kernels take them, without ``out``."""
        return tuple(name for name, _ in self.dtypes if name != "out")

    @property
    def results(self) -> tuple[str, ...]:
        """What the call computes, in the order in which kernels take it: "out", then the arrays it writes in place."""
        kept = STATE if self.options.disable_state_update else ()
        return ("out", *(name for name in self.names if ARGUMENTS[name].written and name not in kept))

    def axes(self, name: str, count: int) -> str:
        """Return the symbols of an array's axes, as ``ARGUMENTS`` has them, for an array of so many."""
        return _pattern(name, self.form, self.heads_axis, count)

    def on(self, platform: str, capability: tuple[int, int] | None = None) -> "Problem":
        """Return the same problem on a platform."""
        return dataclasses.replace(self, platform=platform, capability=capability)


def describe(
    arrays: Mapping[str, ArrayInfo],
    options: Options,
    *,
    framework: str,
    platform: str | None,
    capability: tuple[int, int] | None = None,
    traced: bool = False,
) -> Problem:
    """Check the arguments of a call and return its Problem.

    Args:
        arrays: the arrays that were given, by their names in ``ARGUMENTS``.
        options: the rest of the arguments.
        framework, platform, capability, traced: as in :class:`Problem`.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, what was expected and what came.
    """
    # The strides of an empty array say nothing.
    arrays = {name: info._replace(strides=None) if 0 in info.shape else info for name, info in arrays.items()}
    for name in REQUIRED:
        if name not in arrays:
            raise TypeError(f"{name}: expected an array, got None")
    for name, info in arrays.items():
        if name != "rand_seed":  # of which each framework has its own
            _check_dtype(name, info.dtype)
    _check_contradictions(arrays, options)
    _check_seed(arrays, options, framework)
    shapes = _Shapes(arrays)
    for name in ARGUMENTS:
        if name in arrays:
            shapes.match(name, arrays[name])
    shapes.check_sizes()
    tied = tuple(name for name in _TIED_AXES if name in arrays and shapes.is_tied(name, arrays[name]))
    for name, info in arrays.items():
        _check_device(name, info, arrays)
        shapes.check_strides(name, info, name in tied)
        if ARGUMENTS[name].written and not info.writeable and not (name in STATE and options.disable_state_update):
            raise ValueError(f"{name}: expected a writeable array, because it is updated in place; got a read-only one")
    size = shapes.sizes
    return Problem(
        framework=framework,
        platform=platform,
        capability=capability,
        traced=traced,
        form=shapes.form,
        sequences=size["b"],
        tokens=size["L"] if shapes.form == "packed" else size.get("T", 1),
        slots=size["S"],
        nheads=size["H"],
        headdim=size["P"],
        dstate=size["N"],
        ngroups=size["G"],
        heads_axis=shapes.heads_axis,
        dtypes=tuple((name, arrays[name].dtype) for name in ARGUMENTS if name in arrays),
        tied=tied,
        tables=tuple(n for n in arrays if n.endswith("state_batch_indices") and len(arrays[n].shape) == 2),
        columns=min((size[symbol] for symbol in "WV" if symbol in size), default=0),
        entries=size.get("E", 0),
        stochastic_rounding="rand_seed" in arrays,
        unaligned=_unaligned(shapes, arrays, tied),
        strided=tuple(name for name, info in arrays.items() if name not in tied and not _is_dense(info)),
        options=options,
    )


def axes(arrays: Mapping[str, ArrayInfo]) -> dict[str, str]:
    """Return the symbols of each array's axes, whatever their sizes are."""
    shapes = _Shapes(arrays)
    return {name: shapes.pattern(name, len(info.shape)) for name, info in arrays.items()}


def _unaligned(shapes: "_Shapes", arrays: Mapping[str, ArrayInfo], tied: tuple[str, ...]) -> tuple[str, ...]:
    # A kernel loads one element at a time of a table, and of one number a head.
    vectors = {name: info for name, info in arrays.items() if name not in tied and ARGUMENTS[name].dtypes != INDICES}
    # An output that is not given yet will be dense, as x is in shape and dtype.
    vectors = {"out": ArrayInfo(arrays["x"].shape, arrays["x"].dtype), **vectors}
    return tuple(name for name, info in vectors.items() if not shapes.is_aligned(name, info))


def _is_dense(info: ArrayInfo) -> bool:
    step = 1
    for n, stride in zip(reversed(info.shape), reversed(info.strides or ()), strict=False):
        if n > 1 and stride != step:
            return False
        step *= n
    return True


def _came(value: object) -> str:
    """Say what came where a Python scalar was expected; tracers print badly, so those by their type alone."""
    return repr(value) if isinstance(value, (int, float, str, type(None), np.generic)) else type(value).__name__


def _check_dtype(name: str, dtype: str) -> None:
    allowed = ARGUMENTS[name].dtypes
    if dtype in allowed:
        return
    plain = [a for a in allowed if a not in QUANTIZED]
    quantized = f" (or a QuantizedState of {', '.join(QUANTIZED)})" if len(plain) < len(allowed) else ""
    raise ValueError(f"{name}: expected dtype {' or '.join(plain)}{quantized}, got {dtype}")


def _check_contradictions(arrays: Mapping[str, ArrayInfo], options: Options) -> None:
    given = arrays.keys()
    for name, scale in SCALES.items():
        if name in given and (arrays[name].dtype in QUANTIZED) != (scale in given):
            raise ValueError(
                f"{name}: expected a QuantizedState(values, scale) for a quantised dtype and a plain array for a float "
                f"one, got {'values and a scale' if scale in given else 'a plain array'} of {arrays[name].dtype}"
            )
    if "intermediate_states" in given and arrays["intermediate_states"].dtype != arrays["state"].dtype:
        raise ValueError(
            f"intermediate_states: expected the state's dtype {arrays['state'].dtype}, "
            f"got {arrays['intermediate_states'].dtype}"
        )
    if "out" in given and arrays["out"].dtype != arrays["x"].dtype:
        raise ValueError(f"out: expected x's dtype {arrays['x'].dtype}, got {arrays['out'].dtype}")
    if "dst_state_batch_indices" in given:
        if options.disable_state_update:
            raise ValueError("dst_state_batch_indices: expected None with disable_state_update=True, got an array")
        if "intermediate_states" in given:
            raise ValueError("dst_state_batch_indices: expected None with intermediate_states, got an array")
    if "intermediate_state_indices" in given and "intermediate_states" not in given:
        raise ValueError("intermediate_state_indices: expected None without intermediate_states, got an array")
    if "num_accepted_tokens" in given and len(_shape(arrays, "state_batch_indices")) != 2:
        came = _shape(arrays, "state_batch_indices") or "none"
        raise ValueError(f"num_accepted_tokens: expected a 2-D state_batch_indices beside it, got {came}")


def _check_seed(arrays: Mapping[str, ArrayInfo], options: Options, framework: str) -> None:
    dtype, seed = arrays["state"].dtype, arrays.get("rand_seed")
    if seed is None:
        if options.config.stochastic_rounding and dtype in ROUNDABLE:
            raise ValueError(
                "rand_seed: expected a key, because stochastic rounding is configured, got None; pass a key of its own "
                "to each call, such as rand_seed=jax.random.key_data(key) with key, next = jax.random.split(next)"
            )
        return
    if dtype not in ROUNDABLE:
        raise ValueError(
            f"rand_seed: expected None for a {dtype} state, which is not rounded stochastically "
            f"({', '.join(ROUNDABLE)} are), got a seed"
        )
    shapes = {"uint32": [(2,)]} if framework == "jax" else {"int64": [(), (1,)]}
    if seed.shape not in shapes.get(seed.dtype, ()):
        expected = "a uint32[2] array or a jax.random.key" if framework == "jax" else "an int, or one int64 in an array"
        raise ValueError(f"rand_seed: expected {expected}, got {seed.dtype} of shape {seed.shape}")


def _shape(arrays: Mapping[str, ArrayInfo], name: str) -> tuple[int, ...]:
    return arrays[name].shape if name in arrays else ()


def _check_device(name: str, info: ArrayInfo, arrays: Mapping[str, ArrayInfo]) -> None:
    expected = arrays["state"].device
    if None not in (info.device, expected) and info.device != expected:
        raise ValueError(f"{name}: expected an array on {expected}, where the state is, got one on {info.device}")


_TOKEN_AXES = {"single": "b", "multi": "bT", "packed": "L"}


def _patterns(name: str, form: str, heads_axis: bool) -> tuple[str, ...]:
    """Return the shapes that an array may have in a call, in symbols."""
    shapes = [shape.replace("*", _TOKEN_AXES[form]) for shape in ARGUMENTS[name].shapes]
    if not heads_axis:
        # Without heads nothing can be tied to one; what is left after H is taken out stands once.
        shapes = [shape.replace("H", "") for shape in shapes if not shape.endswith("H")]
    return tuple(shapes)


def _pattern(name: str, form: str, heads_axis: bool, count: int) -> str:
    """Return the one of them that has so many axes."""
    return next(pattern for pattern in _patterns(name, form, heads_axis) if len(pattern) == count)


class _Shapes:
    """Matches the arrays' shapes against ``ARGUMENTS``, learning the sizes on the way."""

    def __init__(self, arrays: Mapping[str, ArrayInfo]):
        state, x = arrays["state"], arrays["x"]
        if len(state.shape) not in (3, 4):
            raise ValueError(
                f"state: expected shape (slots, nheads, headdim, dstate) or (slots, headdim, dstate), got {state.shape}"
            )
        self.heads_axis = len(state.shape) == 4
        self.state_shape = state.shape
        self.state_axes = "slots, nheads, headdim, dstate" if self.heads_axis else "slots, headdim, dstate"
        self.indexed = "state_batch_indices" in arrays
        self.sizes: dict[str, int] = {} if self.heads_axis else {"H": 1, "G": 1}
        extra = len(x.shape) - (len(state.shape) - 1)
        if extra not in (0, 1):
            raise ValueError(
                f"x: expected {len(state.shape) - 1} axes, or {len(state.shape)} for several tokens, got shape "
                f"{x.shape}, beside a state of ({self.state_axes}) {state.shape}"
            )
        if "cu_seqlens" in arrays:
            if extra:
                raise ValueError(f"cu_seqlens: expected None with x of shape (sequences, tokens, ...), {x.shape}")
            if len(arrays["cu_seqlens"].shape) != 1 or arrays["cu_seqlens"].shape[0] < 1:
                raise ValueError(f"cu_seqlens: expected shape (sequences + 1,), got {arrays['cu_seqlens'].shape}")
            self.form = "packed"
            self.sizes["b"] = arrays["cu_seqlens"].shape[0] - 1
        else:
            self.form = "multi" if extra else "single"
        self.token_axes = _TOKEN_AXES[self.form]
        self.sizes["Q"] = self.sizes.get("b", x.shape[0]) + 1

    def match(self, name: str, info: ArrayInfo) -> None:
        patterns = self._patterns(name)
        for pattern in patterns:
            if self._fits(pattern, info.shape):
                self.sizes.update(
                    (symbol, n) for symbol, n in zip(pattern, info.shape, strict=True) if not symbol.isdigit()
                )
                if name in ("B", "C") and len(pattern) == len(self.token_axes) + 1:
                    self.sizes["G"] = 1
                return
        expected = " or ".join(map(self._spell, patterns))
        beside = "" if name == "state" else f", beside a state of ({self.state_axes}) {self.state_shape}"
        raise ValueError(f"{name}: expected shape {expected}, got {info.shape}{beside}")

    def check_sizes(self) -> None:
        size = self.sizes
        for symbol in "HPNG":
            if size[symbol] < 1:
                raise ValueError(f"{'B' if symbol == 'G' else 'state'}: expected {SIZES[symbol]} of at least 1, got 0")
        if size["H"] % size["G"]:
            raise ValueError(f"B: expected ngroups to divide nheads = {size['H']}, got ngroups = {size['G']}")
        if not self.indexed and size["S"] < size["b"]:
            raise ValueError(
                f"state: expected at least {size['b']} slots, one for each sequence, because state_batch_indices is "
                f"None; got {size['S']}"
            )
        tokens = size.get("T", 1)
        for symbol, name in (("W", "state_batch_indices"), ("V", "dst_state_batch_indices")):
            if size.get(symbol, tokens) < tokens:
                raise ValueError(f"{name}: expected at least {tokens} columns, one a token, got {size[symbol]}")
        if size.get("K", tokens) < tokens:
            raise ValueError(f"intermediate_states: expected at least {tokens} steps, one a token, got {size['K']}")

    def is_tied(self, name: str, info: ArrayInfo) -> bool:
        if len(info.shape) < len(self._patterns(name)[0]):
            return True
        tied = _TIED_AXES[name]
        return self.heads_axis and info.strides is not None and not any(info.strides[-tied:])

    def check_strides(self, name: str, info: ArrayInfo, tied: bool) -> None:
        if info.strides is None:
            return
        pattern, inner = self._inner(name, info)
        # Behind the free axes: dense, but for the trailing axes of a tied view, which repeat one element.
        repeated = _TIED_AXES[name] if tied and len(pattern) == len(self._patterns(name)[0]) else 0
        dense, step = [0] * repeated, 1
        for n in reversed(info.shape[len(info.shape) - inner : len(info.shape) - repeated]):
            dense.insert(0, step)
            step *= n
        axes = list(zip(info.shape, info.strides, strict=True))
        behind = zip(axes[len(axes) - inner :], dense, strict=True)
        if any(n > 1 and stride != expected for (n, stride), expected in behind):
            raise ValueError(
                f"{name}: expected {self._spell(pattern[len(pattern) - inner :])} to be dense in memory "
                f"(strides {tuple(dense)}), got strides {info.strides}; make it contiguous"
            )
        if ARGUMENTS[name].written:
            for n, stride in sorted(axes[: len(axes) - inner], key=lambda axis: abs(axis[1])):
                if n > 1 and abs(stride) < step:
                    raise ValueError(
                        f"{name}: expected memory that does not overlap itself, got strides {info.strides}"
                    )
                step = max(step, n * abs(stride))

    def is_aligned(self, name: str, info: ArrayInfo) -> bool:
        if not info.aligned:
            return False
        _, inner = self._inner(name, info)
        size, step = np.dtype(info.dtype).itemsize, 1
        for axis in reversed(range(len(info.shape))):
            # The stride of a single entry means nothing: as if dense, so that it has the kernel that several have.
            stride = step if info.strides is None or info.shape[axis] == 1 else info.strides[axis]
            if axis < len(info.shape) - inner and stride * size % VECTOR_BYTES:
                return False
            step *= info.shape[axis]
        return True

    def _inner(self, name: str, info: ArrayInfo) -> tuple[str, int]:
        """Return the pattern of an array and how many of its last axes must be dense."""
        pattern = self.pattern(name, len(info.shape))
        return pattern, len(pattern.lstrip(ARGUMENTS[name].free.replace("*", self.token_axes)))

    def pattern(self, name: str, count: int) -> str:
        """Return the symbols of an array's axes, for an array of so many."""
        return _pattern(name, self.form, self.heads_axis, count)

    def _patterns(self, name: str) -> tuple[str, ...]:
        return _patterns(name, self.form, self.heads_axis)

    def _fits(self, pattern: str, shape: tuple[int, ...]) -> bool:
        if len(pattern) != len(shape):
            return False
        return all(n == (int(s) if s.isdigit() else self.sizes.get(s, n)) for s, n in zip(pattern, shape, strict=True))

    def _spell(self, pattern: str) -> str:
        """Write a shape out as sizes where they are known: (4, 64, dstate=128) says too little, (4, 64, 128) enough."""
        sizes = [s if s.isdigit() else str(self.sizes.get(s, SIZES.get(s, ">=1"))) for s in pattern]
        return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"
