"""Arrays of a call that share memory: right where they may, an error before anything is written where not."""

import dataclasses

import numpy as np
import pytest
import torch
from compiled_kernels import problem_of
from modes import bits, to_host, to_mode

import ssu_bridge
from ssu_bridge.core.aliasing import needs_fresh_output
from ssu_bridge.testing.cases import CASES as CONTRACT
from ssu_bridge.testing.cases import Case

SINGLE = Case("single")
MULTI = Case("multi", tokens=3)
# The first and the third sequence share rows, of which the second has none: what it says ends before it begins.
SHARED_ROWS = Case("packed", tokens=3, cu_seqlens=(0, 3, 0, 2), indices=(4, -1, 2))
# Tokens that descend from others than the one before them.
TREE = next(case for case in CONTRACT if case.name == "tree")
CASES = [SINGLE, MULTI, SHARED_ROWS, TREE]
PAIRS = [
    *((mode, backend) for mode in ("numpy", "torch") for backend in ("cpu", "reference")),
    pytest.param("torch.cuda", "triton", marks=pytest.mark.gpu),
    pytest.param("torch.cuda", "reference", marks=pytest.mark.gpu),
]


def separate(case, mode, backend):
    """Run a call none of whose arrays share memory; return its results."""
    given = to_mode(case.arrays(seed=5), mode)
    names = ("out", "state", "intermediate_states")
    return to_host(dict(zip(names, ssu_bridge.update(**given, **case.flags, backend=backend), strict=False)), mode)


def unshared(case, out):
    """The rows of an output that are defined: a row of several sequences is not."""
    return out[2:] if case is SHARED_ROWS else out


def assert_equal(case, given, out, expected, mode):
    after = to_host({"out": out, "state": given["state"]}, mode)
    np.testing.assert_array_equal(bits(unshared(case, after["out"])), bits(unshared(case, expected["out"])))
    np.testing.assert_array_equal(bits(after["state"]), bits(expected["state"]))


def pair_in_one_buffer(array, distance, mode):
    """Return two arrays of the same shape in one buffer, ``distance`` elements apart; the first has the values."""
    if mode == "numpy":
        buffer = np.zeros(array.size + distance, array.dtype)
        first, second = buffer[: array.size], buffer[distance:]
    else:
        buffer = torch.zeros(array.numel() + distance, dtype=array.dtype, device=array.device)
        first, second = buffer[: array.numel()], buffer[distance:]
    first, second = first.reshape(array.shape), second.reshape(array.shape)
    first[...] = array
    return first, second


@pytest.mark.parametrize(("mode", "backend"), PAIRS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("distance", [0, 1, 16 * 4, 10**4], ids="{} apart".format)
@pytest.mark.parametrize("name", ["x", "z"])
def test_out_beside_what_is_read_row_by_row(name, distance, case, mode, backend):
    """Out is x or z, overlaps it in part, or lies behind it: in a first call, and in one that is like it but for that."""
    expected = separate(case, mode, backend)
    for warm in (False, True):
        given = to_mode(case.arrays(seed=5), mode)
        if warm:
            ssu_bridge.update(**to_mode(case.arrays(seed=5), mode), **case.flags, backend=backend)
        given[name], out = pair_in_one_buffer(given[name], distance, mode)
        for _ in range(2):
            result, state = ssu_bridge.update(**given, **case.flags, out=out, backend=backend)
            assert result is out
            assert state is given["state"]
            assert_equal(case, given, out, expected, mode)
            fresh = to_mode(case.arrays(seed=5), mode)
            given["state"][...], given[name][...] = fresh["state"], fresh[name]


@pytest.mark.parametrize(
    ("case", "names"),
    [(SINGLE, ["x", "z"]), (MULTI, ["x", "z"]), (SHARED_ROWS, []), (TREE, ["z"])],
    ids=["single", "multi", "packed", "tree"],
)
def test_out_is_written_where_nothing_is_read_again(case, names):
    """Every token of a packed call may be another sequence's too, and that of a tree's x another token's."""
    arrays = case.arrays(seed=5)
    problem = problem_of(case)
    in_their_place = [name for name in "xzBC" if not needs_fresh_output(problem, arrays | {"out": arrays[name]})]
    assert in_their_place == names


REPLAYS = [{"tokens": None}, {"tokens": 2}, {"tokens": 4, "cu_seqlens": (0, 1, 2, 4)}]


@pytest.mark.parametrize(("mode", "backend"), PAIRS)
@pytest.mark.parametrize("layout", REPLAYS, ids=["single", "multi", "packed"])
@pytest.mark.parametrize("name", ["x", "z"])
def test_rings_keep_the_tokens_where_out_is_x(name, layout, mode, backend):
    """Not the output that is written over them."""
    case = Case("replay", **layout, window=3, most=2, starts=(0, 1, 2, 3, 4, 0), pending=(0, 3, 1, 2, 3, 2))
    separate, given = (to_mode(case.arrays(seed=5), mode, case.window) for _ in range(2))
    out, expected = ssu_bridge.update(**separate, **case.flags, backend=backend)
    ssu_bridge.update(**given, **case.flags, out=given[name], backend=backend)
    after, expected = (
        to_host({"out": o, "state": state}, mode) for o, state in ((given[name], given["state"]), (out, expected))
    )
    for array in expected:
        np.testing.assert_array_equal(bits(after[array]), bits(expected[array]), array)


@pytest.mark.parametrize(("mode", "backend"), PAIRS)
@pytest.mark.parametrize("name", ["x", "z", "C"])
def test_rows_of_no_sequence_keep_what_an_overlapping_out_has(name, mode, backend):
    """As those of an out apart from all else do: what is computed elsewhere is not copied there."""
    case = Case("rows of none", tokens=7, cu_seqlens=(1, 3, 3, 5), headdim=8, nheads=4, ngroups=1)
    expected = separate(case, mode, backend)
    for _ in range(2):
        given = to_mode(case.arrays(seed=5), mode)
        given[name], inside = pair_in_one_buffer(given[name], 0, mode)
        out = inside.reshape(given["x"].shape)
        before = to_host({"out": out}, mode)["out"].copy()
        np.full_like(before, 9e9)  # the next array of this size finds other numbers than the last results
        ssu_bridge.update(**given, **case.flags, out=out, backend=backend)
        after = to_host({"out": out}, mode)["out"]
        np.testing.assert_array_equal(after[[0, 5, 6]], before[[0, 5, 6]])
        np.testing.assert_array_equal(after[1:5], expected["out"][1:5])


@pytest.mark.parametrize(("mode", "backend"), PAIRS)
@pytest.mark.parametrize("case", [SINGLE, MULTI], ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["dt", "B", "C"])
def test_out_in_what_many_threads_read(name, case, mode, backend):
    """Out is dt of a number for each channel, or begins where B or C do."""
    case = dataclasses.replace(case, untied=("dt",), dtypes={})
    expected = separate(case, mode, backend)
    for _ in range(2):
        given = to_mode(case.arrays(seed=5), mode)
        shape, size = given["x"].shape, int(np.prod(given["x"].shape))
        both = np.zeros(size, "float32") if mode == "numpy" else torch.zeros(size, device=given["x"].device)
        inside = both[: int(np.prod(given[name].shape))].reshape(given[name].shape)
        inside[...] = given[name]
        given[name], out = inside, both.reshape(shape)
        ssu_bridge.update(**given, **case.flags, out=out, backend=backend)
        assert_equal(case, given, out, expected, mode)


@pytest.mark.parametrize(("mode", "backend"), PAIRS)
def test_slices_of_one_projection_share_nothing(mode, backend):
    """Their elements alternate in one buffer, and the output may be one of them."""
    expected = separate(MULTI, mode, backend)
    given = to_mode(MULTI.arrays(seed=5), mode)
    x = given["x"]
    whole = np.zeros((3, 3, 12, 16), "float32") if mode == "numpy" else torch.zeros(3, 3, 12, 16, device=x.device)
    for i, name in enumerate(("x", "z")):
        whole[:, :, 4 * i : 4 * i + 4] = given[name]
        given[name] = whole[:, :, 4 * i : 4 * i + 4]
    out = whole[:, :, 8:]
    ssu_bridge.update(**given, **MULTI.flags, out=out, backend=backend)
    assert_equal(MULTI, given, out, expected, mode)
    np.testing.assert_array_equal(to_host({"x": whole[:, :, :4]}, mode)["x"], MULTI.arrays(seed=5)["x"])


STEPS = dataclasses.replace(MULTI, steps=3, dtypes={})


def inside_state(name):
    """Put an array that is only read, or is written as well, into the memory of the state's last slots."""

    def overlap(given):
        flat = given["state"].reshape(-1)
        size = int(np.prod(given[name].shape))
        place = flat[len(flat) - size :].reshape(given[name].shape)
        place[...] = given[name]
        return {**given, name: place}

    return overlap


def state_in_intermediates(given):
    state = given["state"]
    place = given["intermediate_states"].reshape(-1)[: int(np.prod(state.shape))].reshape(state.shape)
    place[...] = state
    return {**given, "state": place}


def out_in_intermediates(given):
    shape = given["x"].shape
    return {**given, "out": given["intermediate_states"].reshape(-1)[: int(np.prod(shape))].reshape(shape)}


WRONG = [
    ("x", inside_state("x"), "x: expected memory apart from that of state"),
    ("z", inside_state("z"), "z: expected memory apart from that of state"),
    ("B", inside_state("B"), "B: expected memory apart from that of state"),
    ("A", inside_state("A"), "A: expected memory apart from that of state"),
    ("the state", state_in_intermediates, "intermediate_states: expected memory apart from that of state"),
    ("out", out_in_intermediates, "out: expected memory apart from that of intermediate_states"),
]


@pytest.mark.parametrize(("mode", "backend"), PAIRS)
@pytest.mark.parametrize(("overlap", "message"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
@pytest.mark.parametrize("warm", [False, True], ids=["first", "repeated"])
def test_what_is_updated_in_place_shares_no_memory(warm, overlap, message, mode, backend):
    given = overlap(to_mode(STEPS.arrays(seed=5), mode))
    if warm:
        ssu_bridge.update(**to_mode(STEPS.arrays(seed=5), mode), **STEPS.flags, backend=backend)
    before = to_host(given, mode)
    with pytest.raises(ValueError, match=message):
        ssu_bridge.update(**given, **STEPS.flags, backend=backend)
    for name, array in to_host(given, mode).items():
        np.testing.assert_array_equal(bits(array), bits(before[name]), err_msg=name)


@pytest.mark.parametrize(("mode", "backend"), PAIRS)
def test_out_in_a_state_that_is_only_read(mode, backend):
    case = dataclasses.replace(SINGLE, disable_state_update=True, indices=(0, 1, 2))
    expected = separate(case, mode, backend)
    given = to_mode(case.arrays(seed=5), mode)
    shape = given["x"].shape
    out = given["state"].reshape(-1)[: int(np.prod(shape))].reshape(shape)
    ssu_bridge.update(**given, **case.flags, out=out, backend=backend)
    np.testing.assert_array_equal(bits(to_host({"out": out}, mode)["out"]), bits(expected["out"]))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("names", [("out",), ("state",), ("out", "state")], ids="+".join)
@pytest.mark.parametrize("apart", [True, False], ids=["apart", "overlapping"])
def test_inference_tensors_outside_of_inference_mode(apart, names, backend):
    """They are written as others are, also where the output is computed elsewhere and copied."""
    expected = separate(MULTI, "torch", backend)
    given = to_mode(MULTI.arrays(seed=5), "torch")
    with torch.inference_mode("out" in names):
        given["x"], beside = pair_in_one_buffer(given["x"], 1, "torch")
        out = torch.zeros_like(given["x"]) if apart else beside
    with torch.inference_mode("state" in names):
        given["state"] = given["state"].clone()
    assert [name for name, t in {"out": out, "state": given["state"]}.items() if t.is_inference()] == [*names]
    result, state = ssu_bridge.update(**given, **MULTI.flags, out=out, backend=backend)
    assert result is out
    assert state is given["state"]
    assert_equal(MULTI, given, out, expected, "torch")
