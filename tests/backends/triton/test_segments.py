"""Long sequences in segments, in Triton's interpreter: right for every kind of call, with the same bits in any batch."""

import dataclasses

import pytest
from compiled_kernels import assert_stack, problem_of
from interpreter import interpret, mend_interpreter, run_in_interpreter
from kernel_layers import layer
from test_matrix_form import tile_of

from ssu_bridge.backends import triton as backend
from ssu_bridge.backends.triton import forms
from ssu_bridge.backends.triton.specialisation import launches, specialise
from ssu_bridge.backends.triton.tiles import Segments
from ssu_bridge.testing.cases import Case

LAYER = {
    "sequences": 3,
    "slots": 5,
    "indices": (4, 0, 2),
    "tokens": 150,
    "dtypes": {"*": "float32"},
    "nheads": 1,
    "headdim": 16,
    "dstate": 16,
    "ngroups": 1,
}
TABLE = tuple((slot, 3, *[0] * 148) for slot in (4, 0, 2))
# What a call can ask for, with sequences of more than the 32 tokens that a segment has here.
CALLS = {
    "several": {"nheads": 2},
    "one": {"tokens": 200, "sequences": 1, "indices": (2,)},
    "odd sizes": {
        "nheads": 4,
        "ngroups": 2,
        "headdim": 20,
        "dstate": 24,
        "sequences": 1,
        "indices": (2,),
        "tokens": 100,
    },
    "packed": {"tokens": 200, "cu_seqlens": (0, 1, 90, 200)},
    "packed, many": {
        "tokens": 200,
        "cu_seqlens": (0, 3, 5, 7, 9, 11, 140, 141, 200),
        "sequences": 8,
        "slots": 9,
        "indices": (0, 1, 2, 3, -1, 5, 6, 7),
    },
    "packed, out of order": {"tokens": 200, "cu_seqlens": (100, 200, 3, 100)},
    # So many that a record is found by its block of rows.
    "packed, with shared rows": {
        "tokens": 200,
        "cu_seqlens": (0, 200, 0, 200, 64, 150, 10, 110),
        "sequences": 7,
        "slots": 9,
        "indices": (0, 1, 2, 3, 4, 5, 6),
    },
    "states on the way": {"steps": 4, "intermediate_stride": 40},
    "states on the way, packed": {
        "tokens": 200,
        "steps": 12,
        "intermediate_stride": 16,
        "cu_seqlens": (0, 1, 90, 200),
    },
    "from zeros": {"has_initial_state": (True, False, True)},
    "not stored": {"disable_state_update": True},
    "stored elsewhere": {"destinations": (1, -1, 3)},
    "accepted": {"indices": TABLE, "accepted": (1, 2, 7), "destinations": (4, -1, 2)},
    "int8": {"nheads": 2, "dtypes": {"*": "float32", "state": "int8"}},
}

# For these the kernels read strides at run time, as where rows have gaps.
WITH_GAPS = ("packed, many", "accepted")

# Of which each does what no other does.
DAILY = ("odd sizes", "packed, many", "packed, with shared rows", "states on the way, packed", "accepted", "int8")


def in_segments(programs, least):
    """The table of forms with another split."""
    return {**forms.measured("triton/forms", (9, 0)), "segments": {"programs": programs, "most": 16, "least": least}}


@pytest.fixture
def split(monkeypatch):
    table = in_segments(264, 256)
    monkeypatch.setattr(forms, "measured", lambda *_: table)


@pytest.mark.parametrize("daily", [True, pytest.param(False, marks=pytest.mark.nightly)], ids=["daily", "others"])
def test_every_call_and_prompt_agrees_with_the_reference(daily):
    calls = [name for name in CALLS if (name in DAILY) == daily]
    prompts = [name for name in PROMPTS if (name in DAILY_PROMPTS) == daily]
    # In one process, which takes seconds to begin.
    run_in_interpreter(__file__, f"interpreted_calls({calls})", f"interpreted_prompts({prompts})")


def interpreted_calls(names):
    mend_interpreter()
    for name in names:
        case = Case(name, **{**LAYER, **CALLS[name]})
        table = in_segments(3 * case.nheads, 32)
        forms.measured = lambda *_, table=table: table
        problem = problem_of(case, (8, 0), algorithm="matrix")
        assert forms.tile(problem).segments.most == 3
        if name in WITH_GAPS:
            problem = dataclasses.replace(problem, strided=("x",))
        interpret(case, case.arrays(seed=1), problem)


# With decays from another kernel: float16, so that the interpreter rounds as a GPU does.
PROMPT = {
    **LAYER,
    "dtypes": {"*": "float16", "A": "float32", "state": "float32"},
    "nheads": 1,
    "headdim": 64,
    "dstate": 128,
}
PROMPTS = {
    "blocks": {"sequences": 1, "indices": (4,), "tokens": 600, "absent": ("z", "dt_bias")},
    "odd sizes": {"headdim": 50, "dstate": 100, "tokens": 140, "has_initial_state": (True, False, True)},
    "pads": {"indices": (-1, 3, 0), "tokens": 130, "destinations": (2, -1, 4)},
    "accepted": {"indices": TABLE, "accepted": (1, 2, 7), "destinations": (4, -1, 2)},
    "int8": {"tokens": 65, "dtypes": {"*": "float16", "A": "float32", "state": "int8"}},
}
DAILY_PROMPTS = ("odd sizes", "pads")


def interpreted_prompts(names):
    mend_interpreter()
    table = {**in_segments(3, 64), "least_tokens_of_a_prompt": 65}
    forms.measured = lambda *_: table
    # From 9.0 on a kernel waits for others: none here. Decays are another kernel's for bfloat16 alone.
    forms._WITH_DECAYS, forms._takes_registers = 8, lambda *_: False
    for name in names:
        case = Case(name, **{**PROMPT, **PROMPTS[name]})
        problem = problem_of(case, (8, 0), algorithm="matrix")
        assert forms.tile(problem).decays
        assert forms.tile(problem).segments.most == (3 if case.tokens >= 128 else 1)
        if name == "pads":  # strides are read at run time, as above
            problem = dataclasses.replace(problem, strided=("x",))
        interpret(case, case.arrays(seed=1), problem)


@pytest.mark.parametrize(
    ("case", "segments"),
    [
        (layer(tokens=511), Segments()),
        (layer(tokens=512), Segments(4, 256, 64)),
        (layer(tokens=512, nheads=80, ngroups=1), Segments(3, 256, 64)),
        (layer(tokens=512, nheads=8, ngroups=1), Segments(16, 256, 64)),
        (layer(tokens=512, nheads=264, ngroups=1), Segments()),
        (layer(tokens=512, nheads=64, headdim=128), Segments(2, 256, 64)),
        (layer(tokens=600, cu_seqlens=(0, 600)), Segments(4, 256, 32)),
        (layer(tokens=600, steps=6, intermediate_stride=100), Segments(4, 256, 100)),
        (layer(tokens=64, parents=(tuple(range(-1, 63)),)), Segments()),
    ],
    ids=str,
)
def test_into_how_many_segments_a_prompt_is_split(case, segments, split):
    assert tile_of(case, algorithm="matrix").segments == segments


def test_a_split_does_not_depend_on_the_batch(split):
    sizes = {"tokens": 4000, "nheads": 8, "ngroups": 1}
    problem = problem_of(layer(**sizes), algorithm="matrix")
    tiles = {forms.tile(dataclasses.replace(problem, sequences=n, slots=n)) for n in (1, 3, 300)}
    assert len(tiles) == 1
    assert tiles.pop().segments.most > 1


SPLIT = {
    "float32": layer(tokens=1100),
    "bfloat16": layer("bfloat16", tokens=1100),
    "int8": layer("int8", tokens=1100),
    "float16 inputs": layer(other="float16", tokens=1100),
    "packed": layer(tokens=1100, cu_seqlens=(0, 1100)),
    "states on the way": layer(tokens=1100, steps=32, intermediate_stride=64),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.nightly] * (name not in ("packed", "int8"))) for name in SPLIT]
)
def test_they_compile_without_spills(name):
    problem = problem_of(SPLIT[name], backend="triton", algorithm="matrix")
    kernels = launches(specialise(problem, forms.tile(problem)))
    with_decays = problem.layout == "multi" and not (SPLIT[name].steps or "inputs" in name)
    assert [kernel.kernel for kernel in kernels] == ["decays"] * with_decays + ["segment_states", "matrix_form"]
    for kernel in kernels:
        assert_stack(kernel, 0)


def test_a_split_is_told(split):
    said = backend.settings(problem_of(layer(tokens=2048), backend="triton"))
    assert said.startswith("matrix form, 32 tokens at a time, in up to 4 segments of at least 256 tokens, tile of")
