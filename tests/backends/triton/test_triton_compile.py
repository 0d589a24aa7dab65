"""What Triton's kernels compile to, on a machine without a GPU: for every GPU, and as it should."""

import dataclasses
import re
import subprocess
import sys

import numpy as np
import pytest
import triton
from compiled_kernels import (
    CAPABILITIES,
    PINNED,
    assert_stack,
    compiled,
    computed_values,
    disassembled,
    problem_of,
    specialisation,
    tile_of,
)
from kernel_layers import CLASSES, MANY, SINGLE, STORED, layer
from thinned import covering, thinned

from ssu_bridge import using
from ssu_bridge.backends import triton as backend
from ssu_bridge.backends.triton import forms, tiles
from ssu_bridge.backends.triton.compile import compile_step
from ssu_bridge.backends.triton.launch import launch_of
from ssu_bridge.backends.triton.specialisation import specialise
from ssu_bridge.core.rounding import LARGEST
from ssu_bridge.testing.cases import CASES, Case

# One of each kind of specialisation: tied or not, Mamba-1, sizes that fill no block, all dtypes, all optional arrays.
DISTINCT = {name: spelt for spelt, name in {specialisation(case): name for name, case in CLASSES.items()}.items()}


# Bytes that go through the stack where fewer registers were measured to be faster, or where windows are long.
SPILLED = {
    specialisation(CLASSES[name]): stack
    for name, stack in {
        "layer, bfloat16, replay, tokens": 8,
        "layer, int8, replay, tokens": 8,
        "replay, a long window": 40,
    }.items()
}


# By default each value of a field that makes another computation is compiled in some class, if it can be in one of a
# real size: those fill the registers.
@pytest.mark.parametrize(
    "spelt",
    covering(
        DISTINCT,
        lambda spelt: computed_values(spelt) | ({spelt} & SPILLED.keys()),
        weight=lambda name: 4 if name.startswith("layer") else 1,
    ),
)
def test_every_class_compiles_without_spills(spelt):
    assert_stack(spelt, SPILLED.get(spelt, 0))


FOR_EVERY_GPU = (
    *("mamba2", "mamba1, bfloat16", "odd sizes, untied, float16", "layer, bfloat16", "layer, bfloat16, packed"),
    *(name for name in MANY if "intermediates, stochastic" in name),
    *SINGLE,
    "layer, int16, tables",
    *("layer, bfloat16, replay", "layer, int8, replay", "layer, bfloat16, replay, tokens"),
)


# By default half of them, each for one of the GPUs; the others differ from those in what is compiled for 9.0 above, too.
@pytest.mark.parametrize(
    ("name", "capability"), thinned(FOR_EVERY_GPU, CAPABILITIES, one_in=2 * len(CAPABILITIES), first=3)
)
def test_it_compiles_for_every_gpu(name, capability):
    kernel = compiled(CLASSES[name], capability)
    assert f".target sm_{capability[0]}{capability[1]}" in kernel.text["ptx"]
    assert kernel.cubin.startswith(b"\x7fELF")


@pytest.mark.parametrize("dtype", STORED)
def test_the_state_is_loaded_and_stored_16_bytes_at_a_time(dtype):
    for tile in (None, (32, 8), (64, 4)):
        case = layer(dtype, other="float32" if dtype == "float32" else "bfloat16")
        kernel = compiled(case, tile=tile)
        ptx = kernel.text["ptx"]
        rows = -(-case.nheads * case.headdim // launch_of(specialisation(case, tile=tile)).grids[0].programs)
        vectors = rows * case.dstate * np.dtype(case.arrays(0)["state"].dtype).itemsize // 16 // (32 * kernel.warps)
        assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == vectors
        # Nothing but an element a row of the output and of the scales, and so nothing of the state, is stored in smaller
        # pieces.
        assert len(re.findall(r"st\.global", ptx)) == vectors + 1 + (dtype in LARGEST)
        assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) >= vectors


# Instructions for an element of the state. Moving its bytes takes a Hopper GPU as long as about 10 for each byte.
MOST_INSTRUCTIONS = {"bfloat16": 14, "int16": 22, "int8": 18, "float8_e4m3fn": 18}


@pytest.mark.parametrize(("dtype", "most"), MOST_INSTRUCTIONS.items())
def test_a_step_of_one_token_takes_few_instructions(dtype, most):
    case = layer(dtype, absent=("z",))
    kernel = compiled(case, tile=(64, 4))
    code = disassembled(kernel.cubin)
    allowed = most if triton.__version__ == PINNED else most + 1
    assert len(code) <= allowed * 64 * case.dstate / (32 * kernel.warps)
    # Those that convert to or from integers of 8 and 16 bits have a quarter of the speed, beside which others go on.
    slow = [line for line in code if line.startswith(("I2F.", "F2I.S"))]
    bytes_of_a_thread = 64 * case.dstate // (32 * kernel.warps)
    assert len(slow) == (3 * bytes_of_a_thread // 4 if dtype == "int8" else 0)


@pytest.mark.parametrize(("dtype", "dstate", "rows"), [("int16", 128, 2), ("int8", 256, 2), ("float8_e4m3fn", 512, 1)])
def test_tiles_of_fewer_rows_than_are_taken_together(dtype, dstate, rows):
    small = layer(dtype, headdim=1, dstate=dstate)
    assert specialisation(small).tile.rows == rows
    assert "rcp.rn.f32" in compiled(small).text["ptx"]


@pytest.mark.parametrize(("tokens", "unaligned"), thinned([None, 2], ["state", "intermediate_states"], one_in=2))
def test_a_float8_state_is_stored_in_one_way(tokens, unaligned):
    """By elements wherever it is stored, not by vectors too: ptxas 12.8 would store others."""
    case = layer("float8_e4m3fn", tokens=tokens, steps=tokens or 1, headdim=32, dstate=64, nheads=8)
    problem = dataclasses.replace(problem_of(case), unaligned=(unaligned,))
    kernel = compile_step(specialise(problem, forms.tile(problem)))
    stores = [line for line in disassembled(kernel.cubin) if line.split()[0].startswith("STG")]
    assert any(line.startswith("STG.E.U8") for line in stores)
    assert not any(line.startswith(("STG.E.64", "STG.E.128")) for line in stores)


def test_it_waits_for_other_kernels_before_it_touches_memory():
    ptx = compiled(layer(indices=None)).text["ptx"]
    assert 0 < ptx.index("griddepcontrol.wait") < re.search(r"(ld|st)\.\S*global", ptx).start()
    assert launch_of(specialisation(layer())).overlaps
    old = compiled(layer(), (8, 0))
    assert "griddepcontrol" not in old.text["ptx"]
    assert not launch_of(specialisation(layer(), (8, 0))).overlaps


@pytest.mark.parametrize("name", ["layer, bfloat16", "layer, bfloat16, replay"])
def test_a_slot_that_is_prefetched_before_that_stays_in_no_cache(name):
    """Kernels ahead may still write it, so it is read from memory again, and the tile is not read but prefetched."""
    before, after = compiled(CLASSES[name]).text["ptx"].split("griddepcontrol.wait")
    assert re.findall(r"(?:ld|st)\.\S*global\S*", before) == ["ld.volatile.global.b32"]
    assert before.count("cp.async.bulk.prefetch.L2.global") == 1
    assert "volatile.global" not in after
    assert len(re.findall(r"ld\.global\.b32", after)) > 0


@pytest.mark.parametrize(("dtype", "capability"), thinned(["int16", "int8", "float8_e4m3fn"], CAPABILITIES, one_in=2))
def test_subnormal_rows_and_scales_count(dtype, capability):
    ptx = compiled(layer(dtype, tokens=4, steps=4), capability).text["ptx"]
    flushing = set(re.findall(r"\S+\.ftz\S*", ptx))
    # Of the decay, softplus and the gate; of inverses only where no number of four and no inverse is subnormal.
    assert flushing <= {"ex2.approx.ftz.f32", "rcp.approx.ftz.f32"}
    assert "setp.gt.u32 few, least, 0x00ffffff; setp.lt.and.u32 few, most, 0x7e000000, few;" in ptx
    assert "rcp.rn.f32" in ptx
    # The scale is compared with 2**-128 as a float32.
    assert re.search(r"setp\.\w+\.f32 .*, 0f00200000;", ptx)
    assert not re.search(r"\.f64 \t", ptx)


def test_the_target_tells_everything_that_is_compiled_in():
    problems = [problem_of(case) for case in CASES]
    problems += [problem_of(CASES[0], (8, 0)), problem_of(dataclasses.replace(CASES[0], slots=60, sequences=3))]
    specialisations = {specialise(problem, tile_of(problem)) for problem in problems}
    assert len({s.target for s in specialisations}) == len(specialisations)
    small, large = (layer(sequences=n, slots=n, indices=tuple(range(n))) for n in (1, 2))
    with using(triton_tile=(16, 8)):
        first, second = (specialise(p, tiles.tile(p)) for p in (problem_of(small), problem_of(large)))
    assert first == second


def test_refusals():
    problem = problem_of(CASES[0])
    assert backend.refusal(problem) is None
    assert "CUDA arrays only" in backend.refusal(problem.on("cpu"))
    assert "8.0 or higher, and this one has 7.5" in backend.refusal(problem.on("cuda", (7, 5)))
    assert "less than 2**31 elements" in backend.refusal(dataclasses.replace(problem, headdim=2**27))
    with using(algorithm="matrix"):
        assert backend.refusal(problem_of(Case("tokens", tokens=2))) is None
        assert "tied to the head, and A is not" in backend.refusal(problem_of(Case("tokens", tokens=2, untied=("A",))))
        assert backend.refusal(problem_of(CASES[0])) is None


def test_without_triton(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install triton" in backend.missing("torch")


WITHOUT_TORCH = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
from ssu_bridge.backends import triton
from ssu_bridge.cases import CASES
from ssu_bridge.api import explain
print(triton.load(explain(**CASES[0].arrays(0)).choices[0].problem.on("cuda", (9, 0))).target)
"""


def test_it_loads_without_torch():
    result = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True)
    assert result.stdout.startswith("ssu_bridge.triton(sm90;"), result.stderr
