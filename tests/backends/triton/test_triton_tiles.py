"""Tiles of Triton's kernels: which one a call gets from the table or by request, and how the table is tuned."""

import dataclasses
import itertools
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from compiled_kernels import CAPABILITIES, problem_of, resources, tile_of
from jax.export import symbolic_shape
from kernel_layers import CLASSES, STORED, layer

from ssu_bridge import using
from ssu_bridge.backends import triton as backend
from ssu_bridge.backends.triton import forms, tiles
from ssu_bridge.backends.triton.compile import compile_step
from ssu_bridge.backends.triton.specialisation import specialise
from ssu_bridge.bench.cuda.tune import Point, Row, replaced, rows_of
from ssu_bridge.testing.cases import CASES

PREFETCH = "cp.async.bulk.prefetch.L2.global"


@pytest.mark.parametrize("dtype", ["float32", "int16", "int8"])
def test_tiles_of_large_states_are_prefetched(dtype):
    """4 MiB ahead, from 20 MiB of state on, where GPUs can and memory is what a step waits for; the first 4 MiB always."""
    few, many = (dataclasses.replace(problem_of(layer(dtype)), sequences=n) for n in (1, 100))
    tile = tiles.tile(many)
    assert tile.ahead * tile.rows * tile.columns * np.dtype(dtype).itemsize == 4 << 20
    assert tile.early == tile.ahead
    assert compile_step(specialise(many, tile)).text["ptx"].count(PREFETCH) == 2
    assert "prefetched" in str(tile)
    assert tiles.tile(few).ahead == 0
    assert tiles.tile(few).early > 0
    assert compile_step(specialise(few, tiles.tile(few))).text["ptx"].count(PREFETCH) == 1
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
        assert tiles.tile(other)[-2:] == (0, 0)


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


def test_tiles_of_the_table_are_allowed():
    problems = {problem_of(case) for case in CLASSES.values() if not case.window}
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
    assert [forms.tile(dataclasses.replace(quantised, sequences=n)).heads for n in (1, 16, 32, 64, 128)] == [
        1,
        1,
        2,
        2,
        4,
    ]
    plain = problem_of(case)
    assert [forms.tile(dataclasses.replace(plain, sequences=n)).heads for n in (1, 128, 256)] == [1, 1, 2]
    one_group_each = dataclasses.replace(quantised, sequences=1000, ngroups=64)
    assert forms.tile(one_group_each).heads == 1
    with using(triton_tile=(16, 2)), pytest.raises(ValueError, match="at least 16 rows for each warp"):
        backend.settings(problem_of(case))


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
