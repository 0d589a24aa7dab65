"""Draw where the arrays of a call lie in memory: apart or in one buffer, with gaps, backwards, the output over an input."""

import numpy as np

from fuzz.memory import PROJECTED, VECTOR, Layout, dense

TABLES = (
    "state_batch_indices", "dst_state_batch_indices", "num_accepted_tokens", "cu_seqlens",
    "intermediate_state_indices", "parent_tokens",
)  # fmt: skip
# How many of the leading axes may be strided: those of the tokens for None.
FREE = dict.fromkeys(("x", "dt", "B", "C", "z", "out"))
FREE |= dict.fromkeys(TABLES, 2) | {"has_initial_state": 1}
FREE |= dict.fromkeys(("state", "state_scale", "intermediate_states", "intermediate_state_scales"), 1)
FREE |= dict.fromkeys(("replay_x", "replay_B", "replay_dt", "replay_start", "replay_pending"), 1)


def layouts_of(draw):
    """Return where each array lies, and of each buffer whether it ends at its guard."""
    extent, layouts = draw.extent, {}
    token_axes = len(draw.row_axes)
    for name, shape in draw.shapes.items():
        free = {"rand_seed": 0, "A": 0, "D": 0, "dt_bias": 0}.get(name, FREE.get(name, 0))
        free = min(token_axes if free is None else free, len(shape))
        strides = list(dense(shape))
        if name in draw.repeats:
            kept = len(shape) - draw.repeats[name]
            strides = [*dense(shape[:kept]), *[0] * draw.repeats[name]]
        first, unit = _first(draw, name)
        if free and extent.random() < 0.4:
            _strided(draw, strides, shape, free, unit)
            flip = extent.randrange(free)
            if draw.mode == "numpy" and extent.random() < 0.2 and shape[flip]:
                first += (shape[flip] - 1) * strides[flip]
                strides[flip] = -strides[flip]
        layouts[name] = Layout(name, first, tuple(strides))
    if draw.maybe(0.2):
        _project(draw, layouts)
    if "out" in layouts and draw.maybe(0.25):
        _alias_out(draw, layouts)
    return layouts, {layout.buffer: extent.random() < 0.5 for layout in layouts.values()}


def _first(draw, name):
    """Draw an array's first element in its buffer, and of how many elements its gaps are multiples.

    A kernel is compiled for addresses and strides that are multiples of a vector, or for any.
    """
    if name == "rand_seed":
        return 0, 1
    if not draw.for_kernels:
        return draw.extent.choice([0, 0, 0, 1, 2, 3]), 1
    if draw.maybe(0.15):
        return draw.extent.choice([1, 2, 3]), 1
    unit = VECTOR // np.dtype(draw.dtypes[name]).itemsize
    return unit * draw.extent.choice([0, 0, 1, 2]), unit


def _strided(draw, strides, shape, free, unit):
    """Put gaps between the entries of the free axes."""
    step = 1
    for axis in reversed(range(len(shape))):
        if axis < free:
            step += unit * draw.extent.choice([0, 0, 1, 3, 8])
            strides[axis] = max(step, 1)
            step = strides[axis] * shape[axis]
        elif strides[axis]:
            step = max(step, strides[axis] * shape[axis])


def _project(draw, layouts):
    """Make slices of one buffer of some arrays of one dtype."""
    names = [n for n in PROJECTED if n in draw.shapes and draw.dtypes[n] == draw.dtypes["x"]]
    axes = len(draw.row_axes)
    widths = {n: int(np.prod(draw.shapes[n][axes:])) for n in names}
    width, first = sum(widths.values()) + draw.form.choice([0, 1, 8]), 0
    for name in names:
        inner = dense(draw.shapes[name][axes:])
        layouts[name] = Layout("x", first, (*(width * step for step in dense(draw.row_axes)), *inner))
        first += widths[name]


def _alias_out(draw, layouts):
    """Put the output where x, z or a part of another array of its dtype is."""
    alike = [n for n in ("x", "z") if n in draw.shapes and draw.dtypes[n] == draw.dtypes["out"]]
    others = [n for n in ("B", "C", "dt") if draw.dtypes[n] == draw.dtypes["out"] and n not in draw.repeats]
    name = draw.form.choice(alike + others)
    layouts["out"] = layouts[name] if name in alike else Layout(layouts[name].buffer, 0, dense(draw.shapes["out"]))
