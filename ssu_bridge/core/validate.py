"""The one check of a call's arguments; what passes it becomes a Problem."""

from collections.abc import Mapping

import ml_dtypes  # noqa: F401  (gives NumPy the dtypes "bfloat16" and "float8_e4m3fn")

from ssu_bridge.core import replay_rules
from ssu_bridge.core.arguments import (
    ARGUMENTS,
    ELEMENTWISE,
    MOST_TOKENS_OF_A_TREE,
    QUANTIZED,
    REQUIRED,
    ROUNDABLE,
    SLOT_TABLES,
    STATE,
    TIED_AXES,
)
from ssu_bridge.core.arrays import ArrayInfo
from ssu_bridge.core.problem import Options, Problem
from ssu_bridge.core.quantized import SCALES
from ssu_bridge.core.shapes import Shapes


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
            check_dtype(name, info.dtype)
    _check_contradictions(arrays, options)
    _check_seed(arrays, options, framework)
    if options.replay_window:
        replay_rules.check_arrays(arrays, options)
    shapes = Shapes(arrays)
    for name in ARGUMENTS:
        if name in arrays:
            shapes.match(name, arrays[name])
    shapes.check_sizes(options.intermediate_stride)
    _check_tree(arrays, options, shapes)
    tied = tuple(name for name in TIED_AXES if name in arrays and _is_tied(name, arrays[name], shapes, options))
    if options.replay_window:
        replay_rules.check_sizes(arrays, options, shapes, tied)
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
        layout=shapes.layout,
        sequences=size["b"],
        tokens=size["L"] if shapes.layout == "packed" else size.get("T", 1),
        slots=size["S"],
        nheads=size["H"],
        headdim=size["P"],
        dstate=size["N"],
        ngroups=size["G"],
        heads_axis=shapes.heads_axis,
        dtypes=tuple((name, arrays[name].dtype) for name in ARGUMENTS if name in arrays),
        tied=tied,
        tables=tuple(n for n in arrays if n in SLOT_TABLES and len(arrays[n].shape) == 2),
        columns=min((size[symbol] for symbol in "WV" if symbol in size), default=0),
        entries=size.get("E", 0),
        stochastic_rounding="rand_seed" in arrays,
        unaligned=_unaligned(shapes, arrays, tied),
        strided=tuple(name for name, info in arrays.items() if not shapes.is_dense(name, info, name in tied)),
        options=options,
    )


def axes(arrays: Mapping[str, ArrayInfo]) -> dict[str, str]:
    """Return the symbols of each array's axes, whatever their sizes are."""
    shapes = Shapes(arrays)
    return {name: shapes.pattern(name, len(info.shape)) for name, info in arrays.items()}


def _is_tied(name: str, info: ArrayInfo, shapes: Shapes, options: Options) -> bool:
    # With replay, which takes nothing else, none of no step sizes differs from another.
    return shapes.is_tied(name, info) or (options.replay_window > 0 and 0 in info.shape)


def _unaligned(shapes: "Shapes", arrays: Mapping[str, ArrayInfo], tied: tuple[str, ...]) -> tuple[str, ...]:
    # One element at a time is loaded of what is one number a head, too.
    vectors = {name: info for name, info in arrays.items() if name not in tied and name not in ELEMENTWISE}
    # An output that is not given yet will be dense, as x is in shape and dtype.
    vectors = {"out": ArrayInfo(arrays["x"].shape, arrays["x"].dtype), **vectors}
    return tuple(name for name, info in vectors.items() if not shapes.is_aligned(name, info))


def check_dtype(name: str, dtype: str) -> None:
    """Check that an argument may have a dtype.

    Raises:
        ValueError: it may not; the message says which it may have.
    """
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
    if options.intermediate_stride > 1 and "intermediate_states" not in given:
        raise ValueError(
            f"intermediate_stride: expected 1 without intermediate_states, got {options.intermediate_stride}"
        )
    if "num_accepted_tokens" in given and len(_shape(arrays, "state_batch_indices")) != 2:
        came = _shape(arrays, "state_batch_indices") or "none"
        raise ValueError(f"num_accepted_tokens: expected a 2-D state_batch_indices with it, got {came}")


def _check_tree(arrays: Mapping[str, ArrayInfo], options: Options, shapes: Shapes) -> None:
    if "parent_tokens" not in arrays:
        return
    if options.intermediate_stride > 1:
        raise ValueError(f"intermediate_stride: expected 1 with parent_tokens, got {options.intermediate_stride}")
    if len(came := _shape(arrays, "dst_state_batch_indices")) == 1:
        raise ValueError(
            "dst_state_batch_indices: expected a column for each token with parent_tokens, because a tree has no last "
            f"state; got shape {came}"
        )
    if (tokens := shapes.sizes.get("T", 1)) > MOST_TOKENS_OF_A_TREE:
        raise ValueError(f"parent_tokens: expected at most {MOST_TOKENS_OF_A_TREE} tokens of a sequence, got {tokens}")


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
