"""The matrix form of several tokens on a machine without a GPU: what takes it, what refuses it, what it compiles to."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
from compiled_kernels import CAPABILITIES, assert_stack, computed_values, problem_of
from kernel_layers import layer
from thinned import covering

from ssu_bridge.backends import triton as backend
from ssu_bridge.backends.triton import forms
from ssu_bridge.backends.triton.compile import compile_step
from ssu_bridge.backends.triton.launch import runtime_arguments
from ssu_bridge.backends.triton.specialisation import launches, specialise

TABLE = ((0, 1, 2, 3),)
CHAIN = (tuple(range(-1, 4)),)


def tile_of(case, **flags):
    return forms.tile(problem_of(case, backend="triton", **flags))


def refusal_of(case, **flags):
    # Another backend explains the arguments: what this one refuses is asked of it alone.
    return backend.refusal(problem_of(case, backend="reference", **flags))


def specialisations(case, capability=(9, 0)):
    """The kernels of a call in the matrix form."""
    problem = problem_of(case, capability, backend="triton", algorithm="matrix")
    return launches(specialise(problem, forms.tile(problem)))


LAYERS = {
    "prompt, float32 inputs": layer(other="float32", tokens=300),
    "few, stochastic": layer("bfloat16", tokens=8, seed=1),
    "prompt, int8": layer("int8", tokens=300),
    "states on the way, int8": layer("int8", tokens=64, steps=2, intermediate_stride=32),
    "large tree": layer(tokens=64, parents=(tuple(range(-1, 63)),)),
    "packed": layer(tokens=40, cu_seqlens=(0, 40)),
    "fresh": layer(tokens=8, has_initial_state=(True,)),
    "few, float32 inputs": layer(other="float32", tokens=8),
    "few, bfloat16": layer("bfloat16", tokens=8),
    "few, float32": layer(tokens=8),
    "few, float16": layer("float16", tokens=8),
    "few, int8": layer("int8", tokens=8),
    "prompt": layer(tokens=300),
    "prompt, bfloat16": layer("bfloat16", tokens=300),
    "prompt, dstate 64": layer(tokens=300, dstate=64),
    "prompt, float16 inputs": layer(other="float16", tokens=300),
    "prompt, int8, float32 inputs": layer("int8", other="float32", tokens=300),
    "prompt, stochastic": layer("bfloat16", tokens=300, seed=1),
    "prompt, stochastic int8": layer("int8", tokens=300, seed=1),
    "prompt, untied D": layer(tokens=300, untied=("D",)),
    "prompt, no z": layer(tokens=300, absent=("z",)),
    "prompt, no D": layer(tokens=300, absent=("D",)),
    "few, bfloat16, float32 inputs": layer("bfloat16", other="float32", tokens=8),
    "few, stochastic int8": layer("int8", tokens=8, seed=1),
    "tree": layer("bfloat16", tokens=5, parents=CHAIN),
    "states on the way": layer(tokens=64, steps=4, intermediate_stride=16),
}


# Bytes that go through the stack. Three parts of each float32 take more registers than there are; with 32 rows and four
# warps none does, and it takes 1.3 to 1.6 times as long. Without z the state is read while the loop's first loads are under
# way: read before them it spills nothing, and takes up to 1.11 times as long. Without D no branch holds z back, and one of
# each row takes registers.
SPILLED = {
    "few, float32 inputs": 8,
    "prompt, float32 inputs": 248,
    "prompt, int8, float32 inputs": 224,
    "prompt, no z": 96,
    "prompt, no D": 80,
    "prompt, untied D": 8,
}


def computed_values_of(name):
    return set().union(*map(computed_values, specialisations(LAYERS[name])))


# By default each value of a field that makes another computation is compiled in some layer; a large tree takes longest.
@pytest.mark.parametrize(
    "name",
    covering(
        {name: name for name in LAYERS}, computed_values_of, weight=lambda name: 0.5 if name == "large tree" else 1
    ),
)
def test_it_compiles_without_spills(name):
    for one in specialisations(LAYERS[name]):
        assert_stack(one, SPILLED.get(name, 0) if one.kernel == "matrix_form" else 0)


# By default each for one GPU: the oldest, a newer one and the newest. Those above are for 9.0.
DAILY = {("few, bfloat16", (8, 0)), ("prompt", (10, 0)), ("tree", (12, 0))}


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        pytest.param(*pair, marks=[pytest.mark.nightly] * (pair not in DAILY))
        for pair in itertools.product(["few, bfloat16", "prompt", "tree"], CAPABILITIES)
    ],
)
def test_it_compiles_for_every_gpu(name, capability):
    for kernel in map(compile_step, specialisations(LAYERS[name], capability)):
        assert f".target sm_{capability[0]}{capability[1]}" in kernel.text["ptx"]
        assert kernel.cubin.startswith(b"\x7fELF")


@pytest.mark.parametrize(
    ("case", "chunk"),
    [
        (layer("bfloat16"), 0),
        (layer("bfloat16", tokens=1), 0),
        (layer("bfloat16", tokens=3), 0),
        (layer("bfloat16", tokens=4), 16),
        (layer(tokens=5), 0),
        (layer(tokens=6), 16),
        (layer("int8", tokens=7), 0),
        (layer("int8", tokens=8), 16),
        (layer(tokens=17), 32),
        (layer(tokens=128), 32),
        (layer(tokens=17, untied=("A",)), 0),
        (layer(other="float32", tokens=17), 0),
        (layer(tokens=17, dstate=256), 0),
        (layer(tokens=11, cu_seqlens=(0, 11)), 0),
        (layer(tokens=12, cu_seqlens=(0, 12)), 32),
        (layer("int16", tokens=5), 0),
        (layer("int16", tokens=6), 16),
        (layer(tokens=4, slots=4, indices=TABLE, destinations=TABLE, accepted=(1,)), 0),
        (layer("bfloat16", tokens=5, parents=CHAIN), 16),
        (layer(tokens=5, cu_seqlens=(0, 5), parents=CHAIN[0]), 0),
        (layer(tokens=20, cu_seqlens=(0, 20), parents=tuple(range(-1, 19))), 64),
    ],
    ids=str,
)
def test_auto_takes_what_was_measured_to_be_faster(case, chunk):
    assert tile_of(case).chunk == chunk


@pytest.mark.parametrize(
    ("case", "capability", "decays"),
    [
        (layer(tokens=256), (9, 0), True),
        (layer("int8", tokens=5000, seed=1), (9, 0), True),
        (layer(tokens=255), (9, 0), False),
        (layer(tokens=256), (8, 0), False),
        (layer(tokens=256), (10, 0), False),
        (layer(tokens=256, headdim=32), (9, 0), False),
        (layer(tokens=256, dstate=64), (9, 0), False),
        (layer(tokens=256, cu_seqlens=(0, 256)), (9, 0), False),
        (layer(tokens=256, steps=8, intermediate_stride=32), (9, 0), False),
        (layer(other="float32", tokens=256), (9, 0), False),
        (layer(other="float16", tokens=256), (9, 0), False),
    ],
    ids=str,
)
def test_which_prompts_have_decays_from_another_kernel(case, capability, decays):
    tile = forms.tile(problem_of(case, capability, backend="triton", algorithm="matrix"))
    assert tile.decays == decays


@pytest.mark.parametrize("name", ["x", "dt", "B", "C", "out", "parent_tokens", "state"])
@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_strides_of_rows_without_gaps_are_compiled_in(tokens, name):
    dense = problem_of(layer(tokens=tokens, parents=(tuple(range(-1, tokens - 1)),)))
    gaps = dataclasses.replace(dense, strided=(name,))
    first, other = (specialise(problem, forms.tile(problem)) for problem in (dense, gaps))
    rows = runtime_arguments(other).keys() - runtime_arguments(first).keys()
    assert (first.target != other.target) == (name != "state")
    assert ("x_token_stride" in rows) == (name != "state")


# By default not the largest chunk, which takes longest to compile.
@pytest.mark.parametrize(
    ("tokens", "chunk"), [(1, 0), (4, 0), (8, 16), pytest.param(40, 64, marks=pytest.mark.nightly)]
)
def test_rows_with_gaps_compile_without_spills(tokens, chunk):
    dense = problem_of(layer(tokens=tokens, parents=(tuple(range(-1, tokens - 1)),)))
    problem = dataclasses.replace(dense, strided=("x",))
    tile = forms.tile(problem)
    assert tile.chunk == chunk
    assert_stack(specialise(problem, tile), 0)


def test_strides_are_not_compiled_in_where_each_token_is_rounded():
    """The loop is 11 % slower with them then, and 4 % faster otherwise."""
    loops = [
        specialise(problem, forms.tile(problem))
        for problem in (
            problem_of(layer("bfloat16", tokens=4), algorithm="loop", round_each_token=each) for each in (False, True)
        )
    ]
    assert ["x_token_stride" in runtime_arguments(loop) for loop in loops] == [False, True]


@pytest.mark.parametrize("algorithm", ["loop", "matrix"])
def test_rows_are_found_beyond_what_32_bits_count(algorithm, ttgir):
    problem = problem_of(layer(tokens=300, nheads=37, ngroups=1), backend="triton", algorithm=algorithm)
    texts = map(ttgir, launches(specialise(problem, forms.tile(problem))))
    # 37 heads of 64: what a token's number is multiplied with, in x and out.
    widths = re.findall(r"(?:%c2368_|dense<2368> : tensor<(?:\d+x)+)i(\d+)", "".join(texts))
    assert widths
    assert {*widths} == {"64"}


def test_a_form_by_name():
    case = layer("bfloat16", tokens=4)
    assert tile_of(case, algorithm="loop").chunk == 0
    assert tile_of(layer(tokens=2), algorithm="matrix").chunk == 16
    assert tile_of(layer(tokens=1), algorithm="matrix").chunk == 0
    assert "matrix form, 16 tokens at a time" in backend.settings(problem_of(case, backend="triton"))


@pytest.mark.parametrize(
    ("case", "flags", "said"),
    [
        (layer("bfloat16", tokens=4), {}, "matrix form, 16 tokens at a time, tile of"),
        (layer("bfloat16", tokens=4), {"algorithm": "loop"}, "loop over the tokens, as requested; tile of"),
        (layer(tokens=4), {}, "loop over the tokens, which is faster for fewer than 6 tokens; tile of"),
        (layer(tokens=9, dstate=256), {}, "loop over the tokens, which is faster for a dstate above 128; tile of"),
        (layer(other="float32", tokens=9), {}, "loop over the tokens, which is faster unless x, B and C have 16 bits"),
        (layer(tokens=9, untied=("A",)), {}, "loop over the tokens, not in the matrix form: it requires parameters"),
        (layer("bfloat16"), {"algorithm": "loop"}, "tile of"),
    ],
    ids=str,
)
def test_why_a_form_is_selected(case, flags, said):
    assert backend.settings(problem_of(case, backend="triton", **flags)).startswith(said)


def test_the_tile_does_not_depend_on_the_batch():
    sizes = {"tokens": 40, "nheads": 8, "ngroups": 1}
    tiles = {tile_of(layer(**sizes, sequences=n, slots=n, indices=tuple(range(n)))) for n in (1, 3, 300)}
    assert len(tiles) == 1


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (layer(tokens=4, untied=("A",)), "tied to the head, and A is not"),
        (layer(tokens=4, untied=("dt", "dt_bias")), "dt and dt_bias is not"),
        (layer(tokens=4, slots=4, indices=TABLE, destinations=TABLE), "no state after every token"),
        (layer(tokens=4, steps=4), "no state after every token"),
        (layer(tokens=4, steps=4, intermediate_stride=15), "no state after every token"),
        (layer(tokens=5, steps=5, parents=CHAIN), "no state after every token"),
    ],
    ids=str,
)
def test_what_it_refuses_by_name(case, reason):
    assert reason in refusal_of(case, algorithm="matrix")


@pytest.mark.parametrize("stride", [16, 17, 31, 32, 100])
def test_chunks_end_where_states_are_stored(stride):
    tile = tile_of(layer(tokens=200, steps=12, intermediate_stride=stride), algorithm="matrix")
    assert not tile.one_chunk
    assert 16 <= tile.chunk <= min(stride, 32)
    assert np.log2(tile.chunk).is_integer()
