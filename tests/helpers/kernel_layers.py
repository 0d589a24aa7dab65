"""Layers of large models, and of them one for each kind of call that has a kernel of its own."""

import itertools

from ssu_bridge.testing.cases import CASES, Case


def layer(dtype="float32", other="bfloat16", **changes):
    """A layer of a large model."""
    fields = {"sequences": 1, "slots": 1, "nheads": 64, "headdim": 64, "dstate": 128, "ngroups": 8, "indices": (0,)}
    return Case("layer", dtypes={"state": dtype, "*": other, "A": "float32"}, **{**fields, **changes})


STORED = ("float32", "bfloat16", "float16", "int16", "int8", "float8_e4m3fn")
TABLE = ((0, 1, 2, 3),)
# What only the kernel for many tokens does, for a layer: a float state, then a quantised one, with each kind of store.
FEATURES = {
    "tokens": {"tokens": 4},
    "packed": {"tokens": 9, "cu_seqlens": (0, 9)},
    "tables": {"tokens": 4, "slots": 4, "indices": TABLE, "destinations": TABLE, "accepted": (1,)},
    "intermediates": {"tokens": 4, "steps": 4},
    "every second": {"tokens": 4, "steps": 2, "intermediate_stride": 2},
    "rounded each": {"tokens": 4, "steps": 4, "round_each_token": True},
    "rounded each, trees": {
        "tokens": 4,
        "slots": 4,
        "destinations": TABLE,
        "parents": ((-1, 0, 0, 1),),
        "round_each_token": True,
    },
    "fresh": {"tokens": 4, "has_initial_state": (False,)},
    "trees": {"tokens": 4, "steps": 4, "parents": ((-1, 0, 0, 1),)},
    "packed trees": {"tokens": 4, "slots": 4, "cu_seqlens": (0, 4), "destinations": TABLE, "parents": (-1, 0, 0, 1)},
}
MANY = {
    f"layer, {dtype}, {name}{', stochastic' * rounded}": layer(dtype, seed=rounded or None, **changes)
    for dtype, (name, changes), rounded in itertools.product(STORED, FEATURES.items(), (0, 1))
    if not rounded or dtype not in ("float32", "int16")
}
# One token for each sequence, of a state that is quantised or rounded stochastically.
SINGLE = {
    f"layer, {dtype}, one token{', stochastic' * rounded}": layer(dtype, seed=rounded or None)
    for dtype, rounded in itertools.product(STORED, (0, 1))
    if dtype in ("int16", "int8", "float8_e4m3fn")[rounded:] or (rounded and dtype in ("bfloat16", "float16"))
}
RING = {"window": 16, "starts": (0,), "pending": (0,)}
CLASSES = (
    {case.name: case for case in CASES if case.sequences}
    | MANY
    | SINGLE
    | {f"layer, {dtype}, replay": layer(dtype, **RING) for dtype in STORED}
    | {f"layer, {dtype}, replay, tokens": layer(dtype, **RING, most=4, tokens=4) for dtype in STORED}
    | {
        "layer, stochastic int8, replay": layer("int8", **RING, seed=1),
        "layer, float32, long replay": layer(**{**RING, "window": 32}, most=32, cu_seqlens=(0, 9), tokens=9),
        "layer, replay, dstate 256": layer("bfloat16", **RING, dstate=256),
    }
    | {
        "layer, bfloat16": layer("bfloat16"),
        "layer, float16": layer("float16"),
        "layer, float32": layer(),
        "layer, dstate 256": layer(dstate=256),
        "layer, dstate 64": layer("bfloat16", dstate=64),
    }
)
