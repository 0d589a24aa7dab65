"""How the tiles of Triton's kernels lie along dstate: for each the same way, so that sums have the same bits."""

import dataclasses
import re

import pytest
from compiled_kernels import problem_of, specialisation
from kernel_layers import CLASSES, layer
from thinned import thinned

from ssu_bridge.backends.triton import forms, tiles
from ssu_bridge.backends.triton.specialisation import specialise

LAYOUT = re.compile(r"#(\w+) = #ttg.blocked<\{sizePerThread = \[\d+, (\d+)\], threadsPerWarp = \[\d+, (\d+)\], "
                    r"warpsPerCTA = \[\d+, (\d+)\]")  # fmt: skip


def layouts_along_dstate(text):
    """How the tiles that are reduced lie along dstate: elements a thread, threads, warps."""
    by_name = {match[1]: match.groups()[1:] for match in LAYOUT.finditer(text)}
    reduced = re.findall(r"\}\) : \(tensor<\d+x\d+xf32, #(\w+)>\)", text)
    assert reduced
    return {by_name[name] for name in reduced}


def tiles_of(case):
    problem = problem_of(case)
    for warps in (1, 4, 8):
        least = tiles.least_rows(problem, warps)
        if least:
            yield from ((rows, warps) for rows in (least, 4 * least))


SHAPES = [
    {"dstate": 128},
    {"dstate": 256},
    {"dstate": 64, "headdim": 128},
    {"dstate": 96},
    {"dstate": 33, "headdim": 5, "nheads": 3, "ngroups": 3},
    {"dstate": 16, "headdim": 1536, "nheads": 0, "ngroups": 1, "group_axis": False},
]


# By default each shape with one or two of the choices of the others.
@pytest.mark.parametrize(
    ("shape", "untied", "dtype"),
    thinned(SHAPES, [(), ("A", "dt", "D", "dt_bias")], ["float32", "bfloat16"], one_in=4),
    ids=str,
)
def test_every_tile_lies_the_same_way_along_dstate(shape, untied, dtype, ttgir):
    """For one token and for many: the same sums are taken in the same order."""
    one, many = layer(dtype, untied=untied, **shape), layer(dtype, untied=untied, tokens=2, **shape)
    kernels = [specialisation(one, tile=tile) for tile in (None, *tiles_of(one))]
    kernels += [specialisation(many, tile=tile) for tile in (None, list(tiles_of(many))[-1])]
    found = set().union(*(layouts_along_dstate(ttgir(kernel)) for kernel in kernels))
    assert len(found) == 1, found


# By default each dtype with one or two choices of the others.
@pytest.mark.parametrize(
    ("dstate", "dtype", "changes"),
    thinned(
        [128, 96, 16],
        ["float16", "int16", "int8", "float8_e4m3fn"],
        [{}, {"tokens": 4, "steps": 4}, {"tokens": 4, "seed": 1}],
        one_in=5,
        first=1,
    ),
    ids=str,
)
def test_every_tile_of_a_state_lies_the_same_way_however_it_is_stored(dstate, dtype, changes, ttgir):
    if "seed" in changes and dtype == "int16":
        pytest.skip("int16 is not rounded stochastically")
    case = layer(dtype, dstate=dstate, **changes)
    kernels = [specialisation(case, tile=tile) for tile in (None, *list(tiles_of(case))[1::2])]
    found = set().union(*(layouts_along_dstate(ttgir(kernel)) for kernel in kernels))
    assert len(found) == 1, found


# That of int8 takes the same reductions.
@pytest.mark.parametrize("stored", ["bfloat16", pytest.param("int8", marks=pytest.mark.nightly)])
def test_every_number_of_heads_of_a_replay_step_lies_the_same_way(stored, ttgir):
    problem = problem_of(CLASSES[f"layer, {stored}, replay"])
    problems = (dataclasses.replace(problem, sequences=n) for n in (1, 64, 1000))
    kernels = [ttgir(specialise(p, forms.tile(p))) for p in problems]
    reductions = re.compile(r"\}\) : \(tensor<(\d+x\S+)xf32, (#\w+)>\)")
    found = [{(shape, definition(k, name)) for shape, name in reductions.findall(k)} for k in kernels]
    assert found[0]
    assert all(one == found[0] for one in found)


def definition(text, name):
    """A layout by what it is, whatever its name in a kernel."""
    return re.search(rf"^{name} = (.*)$", text, re.MULTILINE)[1]
