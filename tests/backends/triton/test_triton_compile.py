"""The Triton kernel on a machine without a GPU: it compiles for every GPU, as it should, and its steps are right."""

import dataclasses
import itertools
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from jax.export import symbolic_shape
from thinned import covering, thinned

from ssu_bridge.api import explain
from ssu_bridge.core.arguments import FLOATS, WRITTEN
from ssu_bridge.core.rounding import LARGEST
from ssu_bridge.testing.cases import CASES, Case, arguments

triton = pytest.importorskip("triton")
from triton.backends.nvidia.compiler import CUDABackend  # noqa: E402

from ssu_bridge import using  # noqa: E402
from ssu_bridge.backends import triton as backend  # noqa: E402
from ssu_bridge.backends.triton import forms, tiles  # noqa: E402
from ssu_bridge.backends.triton.compile import compile_step, launch_of, specialise  # noqa: E402
from ssu_bridge.bench.cuda.tune import Point, Row, replaced, rows_of  # noqa: E402

HELPERS = str(Path(__file__).parents[2] / "helpers")

CAPABILITIES = ((8, 0), (9, 0), (10, 0), (12, 0))
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory):
    """Compile anew, once for this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def problem_of(case, capability=(9, 0), **flags):
    """The problem of a case, as if its arrays were on a GPU."""
    given = arguments(case.arrays(seed=0), "numpy", lambda array: array, case.window)
    return explain(**given, **case.flags, **flags).choices[0].problem.on("cuda", capability)


def specialisation(case, capability=(9, 0), tile=None):
    with using(triton_tile=tile):
        problem = problem_of(case, capability)
    return specialise(problem, tile_of(problem))


def tile_of(problem):
    """The tile of one token after the other, where there is a choice."""
    return forms.tile(problem) if problem.replays else tiles.tile(problem)


def compiled(case, capability=(9, 0), tile=None):
    return compile_step(specialisation(case, capability, tile))


def layer(dtype="float32", other="bfloat16", **changes):
    """A layer of a large model."""
    fields = {"sequences": 1, "slots": 1, "nheads": 64, "headdim": 64, "dstate": 128, "ngroups": 8, "indices": (0,)}
    return Case("layer", dtypes={"state": dtype, "*": other, "A": "float32"}, **{**fields, **changes})


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
STORED = ("float32", "bfloat16", "float16", "int16", "int8", "float8_e4m3fn")
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


def specialisation_of(case):
    problem = problem_of(case)
    return specialise(problem, tile_of(problem))


# One of each kind of specialisation: tied or not, Mamba-1, sizes that fill no block, all dtypes, all optional arrays.
DISTINCT = {name: spelt for spelt, name in {specialisation_of(case): name for name, case in CLASSES.items()}.items()}
# Those of real sizes first: they fill the registers.
LAYERS_FIRST = dict(sorted(DISTINCT.items(), key=lambda item: not item[0].startswith("layer")))


def values(specialisation):
    """Return the values of its fields, each array's apart: its dtype, and that it is tied, a table or a result."""
    fields = dataclasses.asdict(specialisation).items()
    return {(name, one) for name, value in fields for one in (value if isinstance(value, tuple) else [str(value)])}


def computed_values(specialisation):
    """Return the values that make another computation: not sizes, and not the float dtypes of what is only read."""
    return {
        (field, value)
        for field, value in values(specialisation)
        if field not in ("nheads", "headdim", "dstate", "ngroups", "pad_slot_id")
        and not (field == "dtypes" and value[1] in FLOATS and value[0] not in WRITTEN)
    }


# Bytes that go through the stack where fewer registers were measured to be faster, or where windows are long.
SPILLED = {
    specialisation_of(CLASSES[name]): stack
    for name, stack in {
        "layer, bfloat16, replay": 16,
        "layer, bfloat16, replay, tokens": 8,
        "layer, int8, replay, tokens": 8,
        "replay, a long window": 40,
    }.items()
}


# By default each value of a field that makes another computation is compiled in some class.
@pytest.mark.parametrize(
    "spelt", covering(LAYERS_FIRST, lambda spelt: computed_values(spelt) | ({spelt} & SPILLED.keys()))
)
def test_every_class_compiles_without_spills(spelt):
    assert resources(compile_step(spelt).cubin) == {"STACK": SPILLED.get(spelt, 0), "LOCAL": 0}


FOR_EVERY_GPU = (
    *("mamba2", "mamba1, bfloat16", "odd sizes, untied, float16", "layer, bfloat16", "layer, bfloat16, packed"),
    *(name for name in MANY if "intermediates, stochastic" in name),
    *SINGLE,
    "layer, int16, tables",
    *("layer, bfloat16, replay", "layer, int8, replay", "layer, bfloat16, replay, tokens"),
)


# By default each for one of the GPUs.
@pytest.mark.parametrize(("name", "capability"), thinned(FOR_EVERY_GPU, CAPABILITIES, one_in=len(CAPABILITIES)))
def test_it_compiles_for_every_gpu(name, capability):
    kernel = compiled(CLASSES[name], capability)
    assert f".target sm_{capability[0]}{capability[1]}" in kernel.text["ptx"]
    assert kernel.cubin.startswith(b"\x7fELF")


def resources(cubin, names=("STACK", "LOCAL")):
    """Bytes of stack and of local memory, where what does not fit the registers goes; or other resources."""
    path = Path(os.environ["TRITON_CACHE_DIR"]) / "resources.cubin"
    path.write_bytes(cubin)
    text = subprocess.run([TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return {name: int(re.search(rf"{name}:(\d+)", text)[1]) for name in names}


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
    assert len(code) <= most * 64 * case.dstate / (32 * kernel.warps)
    # Those that convert to or from integers of 8 and 16 bits have a quarter of the speed.
    assert not [line for line in code if line.startswith(("I2F.", "F2I.S"))]


def disassembled(cubin):
    path = Path(os.environ["TRITON_CACHE_DIR"]) / "code.cubin"
    path.write_bytes(cubin)
    text = subprocess.run([TOOLS / "cuobjdump", "-sass", path], capture_output=True, text=True, check=True).stdout
    return re.findall(r"/\*[0-9a-f]{4,5}\*/ +(?:@\S+ )?(?!NOP)(\S+)", text)


PREFETCH = "cp.async.bulk.prefetch.L2.global"


@pytest.mark.parametrize("dtype", ["float32", "int16", "int8"])
def test_tiles_of_large_states_are_prefetched(dtype):
    """4 MiB ahead, from 20 MiB of state on, where GPUs can and memory is what a step waits for."""
    few, many = (dataclasses.replace(problem_of(layer(dtype)), sequences=n) for n in (1, 100))
    tile = tiles.tile(many)
    assert tile.ahead * tile.rows * tile.columns * np.dtype(dtype).itemsize == 4 << 20
    assert PREFETCH in compile_step(specialise(many, tile)).text["ptx"]
    assert "prefetched" in str(tile)
    assert tiles.tile(few).ahead == 0
    assert PREFETCH not in compile_step(specialise(few, tiles.tile(few))).text["ptx"]
    with using(triton_tile=(64, 4)):
        requested = dataclasses.replace(problem_of(layer(dtype)), sequences=100)
    assert tiles.tile(requested).ahead * 64 * 128 * np.dtype(dtype).itemsize == 4 << 20
    # An address is a multiple of 16 bytes, and a tile lies in one piece.
    for other in (
        many.on("cuda", (8, 9)),
        dataclasses.replace(many, unaligned=("state",)),
        dataclasses.replace(many, headdim=72),
        dataclasses.replace(problem_of(layer("int8", seed=1)), sequences=100),
        dataclasses.replace(problem_of(layer(dtype, tokens=2, has_initial_state=(True,))), sequences=100),
        dataclasses.replace(problem_of(layer(dtype, tokens=2, slots=2, indices=((0, 1),))), sequences=100),
    ):
        assert tiles.tile(other).ahead == 0


@pytest.mark.parametrize(("tokens", "algorithm"), [(2, "loop"), (8, "matrix")])
def test_tiles_of_several_tokens_are_prefetched(tokens, algorithm):
    problem = problem_of(layer("bfloat16", tokens=tokens), algorithm=algorithm)
    few, many = (dataclasses.replace(problem, sequences=n) for n in (1, 100))
    found = specialise(many, forms.tile(many))
    assert found.tile.ahead * found.tile.rows * 128 * 2 == 4 << 20
    assert PREFETCH in compile_step(found).text["ptx"]
    assert forms.tile(few).ahead == 0
    # A prompt waits for other things.
    prompt = problem_of(layer("bfloat16", tokens=300), algorithm="matrix")
    assert forms.tile(dataclasses.replace(prompt, sequences=100)).ahead == 0


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.sequences and case.tokens is None], ids=lambda case: case.name
)
def test_a_requested_tile_needs_no_number_of_sequences(case):
    """A symbolic number of jax.export cannot be compared with those of the table."""
    with using(triton_tile=(16, 1)):
        problem = problem_of(case)
    sequences, slots = symbolic_shape("b, s")
    try:
        expected = tile_of(problem)
    except ValueError as impossible:
        pytest.skip(str(impossible))
    # What depends on the number of sequences is left out.
    few = expected._replace(ahead=0, heads=1)
    assert tile_of(dataclasses.replace(problem, sequences=sequences, slots=slots)) == few


def test_it_waits_for_other_kernels_before_it_touches_memory():
    kernel = compiled(layer())
    ptx = kernel.text["ptx"]
    assert 0 < ptx.index("griddepcontrol.wait") < re.search(r"(ld|st)\.global", ptx).start()
    assert launch_of(specialisation(layer())).overlaps
    old = compiled(layer(), (8, 0))
    assert "griddepcontrol" not in old.text["ptx"]
    assert not launch_of(specialisation(layer(), (8, 0))).overlaps


@pytest.mark.parametrize(("dtype", "capability"), thinned(["int16", "int8", "float8_e4m3fn"], CAPABILITIES, one_in=2))
def test_subnormal_rows_and_scales_count(dtype, capability):
    ptx = compiled(layer(dtype, tokens=4, steps=4), capability).text["ptx"]
    flushing = set(re.findall(r"\S+\.ftz\S*", ptx))
    assert flushing <= {"ex2.approx.ftz.f32"}  # of the decay, softplus and the gate
    assert "rcp.rn.f32" in ptx
    # The scale is compared with 2**-128 as a float32.
    assert re.search(r"setp\.\w+\.f32 .*, 0f00200000;", ptx)
    assert not re.search(r"\.f64 \t", ptx)


LAYOUT = re.compile(r"#(\w+) = #ttg.blocked<\{sizePerThread = \[\d+, (\d+)\], threadsPerWarp = \[\d+, (\d+)\], "
                    r"warpsPerCTA = \[\d+, (\d+)\]")  # fmt: skip


class LaidOut(Exception):
    """Raised with a kernel's text when its arrays lie in registers: what follows takes as long again, and moves none."""


@pytest.fixture
def ttgir(monkeypatch):
    """Return a function that compiles so far and returns the text."""

    def stop(self, module, *_):
        raise LaidOut(str(module))

    def text(case, tile=None):
        with pytest.raises(LaidOut) as stopped:
            compiled(case, tile=tile)
        return str(stopped.value)

    monkeypatch.setattr(CUDABackend, "make_llir", stop)
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    return text


def layouts_along_dstate(text):
    """How the tiles that are reduced lie along dstate: elements a thread, threads, warps."""
    by_name = {match[1]: match.groups()[1:] for match in LAYOUT.finditer(text)}
    reduced = re.findall(r"\}\) : \(tensor<\d+x\d+xf32, #(\w+)>\)", text)
    assert reduced
    return {by_name[name] for name in reduced}


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
    kernels = [ttgir(one, tile) for tile in (None, *tiles_of(one))]
    kernels += [ttgir(many), ttgir(many, list(tiles_of(many))[-1])]
    found = set().union(*map(layouts_along_dstate, kernels))
    assert len(found) == 1, found


# By default each two meet, with one choice of the third.
@pytest.mark.parametrize(
    ("dstate", "dtype", "changes"),
    thinned(
        [128, 96, 16],
        ["float16", "int16", "int8", "float8_e4m3fn"],
        [{}, {"tokens": 4, "steps": 4}, {"tokens": 4, "seed": 1}],
        one_in=3,
    ),
    ids=str,
)
def test_every_tile_of_a_state_lies_the_same_way_however_it_is_stored(dstate, dtype, changes, ttgir):
    if "seed" in changes and dtype == "int16":
        pytest.skip("int16 is not rounded stochastically")
    case = layer(dtype, dstate=dstate, **changes)
    kernels = [ttgir(case, tile) for tile in (None, *list(tiles_of(case))[1::2])]
    found = set().union(*map(layouts_along_dstate, kernels))
    assert len(found) == 1, found


def tiles_of(case):
    problem = problem_of(case)
    for warps in (1, 4, 8):
        least = tiles.least_rows(problem, warps)
        if least:
            yield from ((rows, warps) for rows in (least, 4 * least))


def test_tiles_of_the_table_are_allowed():
    problems = [problem_of(CLASSES[name]) for name in DISTINCT if not CLASSES[name].window]
    for first, capability, sequences in itertools.product(problems, CAPABILITIES, (1, 10, 10_000)):
        problem = dataclasses.replace(first, capability=capability, sequences=sequences)
        tile = tiles.tile(problem)
        assert 1 <= tiles.least_rows(problem, tile.warps) <= tile.rows
        assert tile.columns >= problem.dstate


# Bytes of shared memory that a program can have without asking for more, on each GPU that nothing was measured on.
UNMEASURED = {(8, 0): 48, (8, 6): 48, (8, 9): 48, (10, 0): 48, (12, 0): 48}
# What the table can be asked for: every row of it, by the number of sequences.
KINDS = {
    **{f"one token, {dtype}": layer(dtype) for dtype in STORED},
    **{
        f"one token, stochastic {dtype}": layer(dtype, seed=1)
        for dtype in ("int8", "float8_e4m3fn", "bfloat16", "float16")
    },
    **{f"tokens, {dtype}": layer(dtype, tokens=4) for dtype in ("int8", "bfloat16", "float32")},
    **{f"tokens, stochastic {dtype}": layer(dtype, tokens=4, seed=1) for dtype in ("int8", "bfloat16")},
    **{f"steps, stochastic {dtype}": layer(dtype, tokens=4, steps=4, seed=1) for dtype in ("int8", "bfloat16")},
}


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capability", UNMEASURED)
def test_every_tile_of_the_table_fits_gpus_that_it_was_not_measured_on(kind, capability):
    problem = problem_of(KINDS[kind], capability)
    problems = (dataclasses.replace(problem, sequences=n) for n in (1, 8, 100, 10_000))
    for one in {specialise(p, tiles.tile(p)) for p in problems}:
        used = resources(compile_step(one).cubin, ("REG", "STACK", "LOCAL", "SHARED"))
        assert used["STACK"] == used["LOCAL"] == 0
        assert used["SHARED"] <= UNMEASURED[capability] << 10
        assert used["REG"] * 32 * one.tile.warps <= 1 << 16


def test_a_tile_of_a_replay_step():
    case = CLASSES["layer, bfloat16, replay"]
    few, many = (dataclasses.replace(problem_of(case), sequences=n) for n in (1, 1000))
    assert forms.tile(few)[:4] == forms.tile(many)[:4], "the bits depend on it, and not on the number of heads"
    assert "tile=32x1*2" in specialise(many, forms.tile(many)).target
    quantised = problem_of(CLASSES["layer, int8, replay"])
    assert [forms.tile(dataclasses.replace(quantised, sequences=n)).heads for n in (1, 32, 64, 1000)] == [1, 1, 2, 4]
    one_group_each = dataclasses.replace(quantised, sequences=1000, ngroups=64)
    assert forms.tile(one_group_each).heads == 1
    with using(triton_tile=(16, 2)), pytest.raises(ValueError, match="at least 16 rows for each warp"):
        backend.settings(problem_of(case))


@pytest.mark.parametrize("stored", ["bfloat16", "int8"])
def test_every_number_of_heads_of_a_replay_step_lies_the_same_way(stored):
    problem = problem_of(CLASSES[f"layer, {stored}, replay"])
    problems = (dataclasses.replace(problem, sequences=n) for n in (1, 64, 1000))
    kernels = [compile_step(specialise(p, forms.tile(p))) for p in problems]
    reductions = re.compile(r"\}\) : \(tensor<(\d+x\S+)xf32, (#\w+)>\)")
    found = [{(shape, definition(k, name)) for shape, name in reductions.findall(k.text["ttgir"])} for k in kernels]
    assert found[0]
    assert all(one == found[0] for one in found)


def definition(kernel, name):
    """A layout by what it is, whatever its name in a kernel."""
    return re.search(rf"^{name} = (.*)$", kernel.text["ttgir"], re.MULTILINE)[1]


@pytest.mark.parametrize("name", ["layer, bfloat16, replay", "layer, bfloat16, replay, tokens"])
def test_a_replay_step_reads_ahead(name):
    problem = dataclasses.replace(problem_of(CLASSES[name]), sequences=1000)
    found = specialise(problem, forms.tile(problem))
    assert found.tile.heads == 2
    # A head's tile of the checkpoint by each, as many as are read ahead, and the flush's.
    loop = compile_step(found).text["ttgir"]
    assert re.search(r"async_copy_global_to_local .* -> <32x\d+xbf16", loop)


def test_a_tile_can_be_asked_for_and_is_shown():
    with using(triton_tile=(32, 4)):
        assert backend.settings(problem_of(layer())) == "tile of 32 x 128, 4 warps"
        assert "tile=32x4" in specialise(problem_of(layer()), tiles.tile(problem_of(layer()))).target
    with using(triton_tile=(2, 4)), pytest.raises(ValueError, match="at least 4 rows"):
        backend.settings(problem_of(layer()))
    with using(triton_tile=(2, 8)), pytest.raises(ValueError, match="expected 4 warps"):
        backend.settings(problem_of(layer(dstate=1024)))


@pytest.mark.parametrize("tile", [3, (16,), (16, 3), (12, 4), (0, 4), (16, 64)])
def test_no_tile_at_all(tile):
    with pytest.raises((TypeError, ValueError), match="triton_tile: expected"):
        using(triton_tile=tile).__enter__()


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


def test_tuning_rewrites_only_what_it_measured():
    text = (
        "# a comment\n\n[sm80]\nbytes2 = [\n    [inf, 1, 1],\n]\n[sm90]\nbytes2 = [\n    [2, 1, 1],\n    [inf, 1, 1],\n]\n"
        "bytes4 = [\n    [inf, 3, 1],\n]\n\n# another\n[sm90.many_tokens]\nbytes2 = [\n    [inf, 4, 1],\n]\n[sm100]\nx = 1\n"
    )
    rows = {"bytes2": [Row(1e6, 2048, 8), Row(float("inf"), 8192, 4)], "bytes1": [Row(float("inf"), 2, 2)]}
    before, written = tomllib.loads(text), replaced(text, "sm90", rows)
    own = {"bytes2": [[1_000_000, 2048, 8], [float("inf"), 8192, 4]], "bytes1": [[float("inf"), 2, 2]]}
    assert tomllib.loads(written) == {**before, "sm90": {**before["sm90"], **own}}
    assert written.count("#") == 2
    assert tomllib.loads(replaced(written, "sm90", rows)) == tomllib.loads(written)
    assert tomllib.loads(replaced(text, "sm120", rows)) == {**before, "sm120": own}


def test_what_was_not_tuned_comes_from_another_gpu(monkeypatch):
    rows = {"bytes1": [Row(float("inf"), 4096, 8)]}
    text = replaced(Path(tiles.__file__).with_suffix(".toml").read_text(), "sm120", rows)
    tables = {(int(name[2:-1]), int(name[-1])): table for name, table in tomllib.loads(text).items()}
    before = [tiles.tile(problem_of(case, (12, 0))) for case in KINDS.values()]
    monkeypatch.setattr("ssu_bridge.backends.measured._tables", lambda name: tables)
    after = [tiles.tile(problem_of(case, (12, 0))) for case in KINDS.values()]
    changed = {name for name, old, new in zip(KINDS, before, after, strict=True) if old != new}
    assert changed == {"one token, int8", "one token, float8_e4m3fn"}


def test_tuning_takes_the_rows_that_cost_least():
    best, other = (1024, 1), (2048, 2)
    small = [Point(work, {best: 1.0, other: 1.5}) for work in (1, 4)]
    large = [Point(work, {best: 1.2, other: 1.0}) for work in (16, 16)]
    assert rows_of([*large, *small]) == [Row(8.0, *best), Row(float("inf"), *other)]
    # What a row would save is too little.
    alike = [Point(work, {best: 1.0, other: 1.0 + 0.001 * (work < 5)}) for work in (1, 4, 16)]
    assert rows_of(alike) == [Row(float("inf"), *best)]


INTERPRET = """
import sys
sys.path[:0] = {tests!r}
from test_triton_compile import interpreted_cases
interpreted_cases({first})
"""


# By default each value of a field of a specialisation that changes what is computed is in some case of few heads.
@pytest.mark.parametrize("first", [True, pytest.param(False, marks=pytest.mark.nightly)], ids=["first", "others"])
def test_the_interpreter_agrees_with_the_reference(first):
    script = INTERPRET.format(tests=[HELPERS, str(Path(__file__).parent)], first=first)
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


# The interpreter takes about a second for the programs of a head.
MOST_HEADS_AT_FIRST = 8


def interpreted_cases(first):
    """Run in a process of its own, because Triton decides at its import whether it interprets."""
    multiply_bfloat16()
    count_in_numbers()
    seen = set()
    for case in CASES:
        arrays = case.arrays(seed=len(case.name))
        # The interpreter cuts bfloat16 off where a GPU rounds: what is stored in it is tested on a GPU.
        cut_off = arrays["x"].dtype.name == "bfloat16" or (arrays["state"].dtype.name == "bfloat16" and not case.seed)
        if cut_off or case.nheads > 24:
            continue
        # From 9.0 on it waits for other kernels: none here.
        problems = [problem_of(case, (8, 0), algorithm=algorithm) for algorithm in ("loop", "matrix")]
        # One token has one form.
        distinct = {specialise(p, forms.tile(p)): p for p in problems if forms.refusal(p) is None}
        for specialisation, problem in distinct.items():
            own = computed_values(specialisation)
            if (not own <= seen and case.nheads <= MOST_HEADS_AT_FIRST) == first:
                interpret(case, arrays, problem)
            seen |= own


def multiply_bfloat16():
    """Have the interpreter multiply bfloat16 as numbers: it takes their bits for integers."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def numbers(handle):
        data = handle.data
        return (data.astype("uint32") << 16).view("float32") if handle.dtype.scalar == tl.bfloat16 else data

    def create_dot(self, a, b, acc, *options):
        return TensorHandle(np.matmul(numbers(a), numbers(b)) + acc.data, acc.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


def count_in_numbers():
    """Have the interpreter make ints of arrays of one element, which NumPy does not do any more."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patched


def interpret(case, arrays, problem):
    from ssu_bridge.backends import reference
    from ssu_bridge.frontends.torch.host import from_host, to_host
    from ssu_bridge.testing.check import compare

    before = {**arrays, "out": np.full_like(arrays["x"], np.nan)}
    tensors = {name: from_host(array) for name, array in before.items()}
    run_interpreted(problem, tensors)
    after = {name: to_host(tensors[name]) for name in problem.results}
    rows = compare(reference.compute(problem, arrays), before, after)
    assert all(row.passed for row in rows), (case.name, rows)


def run_interpreted(problem, tensors):
    """Run the kernels of a problem on tensors in host memory, by their names, in place."""
    import torch

    from ssu_bridge.backends.triton.compile import (
        Kind,
        constant_arguments,
        grid_of,
        kernel_of,
        launches,
        runtime_arguments,
    )

    whole = specialise(problem, forms.tile(problem))
    # Float8 states are bytes to the kernel.
    bytes_of = {torch.float8_e4m3fn: torch.int8, torch.bool: torch.uint8}
    given = [tensors[name] for name in (*problem.names, "out")]
    given = [tensor.view(bytes_of.get(tensor.dtype, tensor.dtype)) for tensor in given]
    launch = launch_of(whole)
    scratch = launch.scratch // 4 * launch.grids[0].blocks(problem.sequences, problem.tokens)
    places = {**dict(enumerate(given)), launch.tensors: torch.full((scratch,), torch.nan)}
    for specialisation in launches(whole):
        kernel = kernel_of(specialisation)
        values = dict.fromkeys(kernel.arg_names)
        for name, (kind, tensor, axis, _) in runtime_arguments(specialisation).items():
            array = places[tensor]
            read = {Kind.ADDRESS: array, Kind.STRIDE: array.stride, Kind.SIZE: array.size}[kind]
            values[name] = read if kind is Kind.ADDRESS else read(axis)
        values = {**values, **constant_arguments(specialisation)}
        grid = grid_of(specialisation)
        programs = grid.blocks(len(given[grid.tensor]) - grid.less, problem.tokens)
        if programs:
            kernel[(programs,)](**{name: values[name] for name in kernel.arg_names})


SCHEDULE = """
import sys
sys.path[:0] = {tests!r}
from test_triton_compile import interpreted_schedule
interpreted_schedule({number})
"""


# Of one token, and of several in packed sequences.
@pytest.mark.parametrize("number", [1, pytest.param(4, marks=pytest.mark.nightly)])
def test_a_server_decodes_in_the_interpreter(number):
    script = SCHEDULE.format(tests=[HELPERS, str(Path(__file__).parent)], number=number)
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def interpreted_schedule(number):
    """Run in a process of its own a short schedule whose steps the reference backend leaves to the interpreter."""
    import torch
    from replays import CONFIGS, serve

    from ssu_bridge.backends import reference
    from ssu_bridge.backends.base import HostKernel

    multiply_bfloat16()
    count_in_numbers()
    steps = []

    def load(problem):
        def run(arrays, out):
            steps.append(problem)
            tensors = {name: torch.from_numpy(array) for name, array in {**arrays, "out": out}.items()}
            run_interpreted(problem.on("cuda", (8, 0)), tensors)

        return HostKernel(run)

    reference.load = load
    serve(dataclasses.replace(CONFIGS[number], window=5, steps=12), "numpy", "reference", prompts="cpu")
    assert len(steps) == 12


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
