"""Trees of draft tokens are their branches, each followed alone, to the bit, where a backend loops over the tokens."""

import numpy as np
import pytest
from modes import TOKENWISE, bits, convert, run, skip_if_refused, to_host

import ssu_bridge
from ssu_bridge.api import explain
from ssu_bridge.core.arguments import MOST_TOKENS_OF_A_TREE
from ssu_bridge.core.quantized import SCALES
from ssu_bridge.testing.cases import Case

LOOPS = [
    ("numpy", "reference"),
    ("numpy", "cpu"),
    ("torch", "cpu"),
    ("jax", "cpu"),
    pytest.param("torch.cuda", "triton", marks=pytest.mark.gpu),
    pytest.param("jax", "triton", marks=pytest.mark.gpu),
]
STATES = ("float32", "bfloat16", "float16", "int16", "int8", "float8_e4m3fn")
SLOT = 2


def same(got, expected):
    np.testing.assert_array_equal(bits(got), bits(expected))


def branches(parents):
    """Return the tokens from the root to each leaf."""
    paths = []
    for token, parent in enumerate(parents):
        paths.append([*(paths[parent] if 0 <= parent < token else []), token])
    inner = {token for path in paths for token in path[:-1]}
    return [path for token, path in enumerate(paths) if token not in inner]


def random_parents(rng, tokens):
    """Any tree: each token continues some token before it, or the state that the sequence starts from."""
    return np.array([rng.integers(-1, token) if token else -1 for token in range(tokens)], "int32")


def tree(tokens, seed, **fields):
    """A call of one sequence whose tokens are a tree, with the state after each token kept."""
    case = Case("tree", sequences=1, slots=4, tokens=tokens, steps=tokens, indices=(SLOT,), **fields)
    parents = random_parents(np.random.default_rng(seed), tokens)
    return case, {**case.arrays(seed), "parent_tokens": parents[None]}


def assert_branches(case, arrays, together, mode, backend):
    """Assert that a tree's outputs and states are those of its branches."""
    parents = arrays["parent_tokens"][0]
    kept = [name for pair in SCALES.items() for name in pair if name in arrays and name.startswith("intermediate")]
    for path in branches(parents):
        alone = {n: a[:, path] if n in TOKENWISE else a for n, a in arrays.items() if n != "parent_tokens"}
        branch = run(alone, mode, backend, **case.flags)
        same(together["out"][:, path], branch["out"])
        for name in kept:
            same(together[name][SLOT, path], branch[name][SLOT, : len(path)])


@pytest.mark.parametrize(("mode", "backend"), LOOPS)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("untied", [(), ("A", "dt", "D", "dt_bias")], ids=["tied", "untied"])
def test_a_tree_is_its_branches(untied, state, mode, backend):
    case, arrays = tree(9, seed=7, dtypes={"state": state}, untied=untied)
    before = arrays["state"].copy()
    together = run(arrays, mode, backend, **case.flags)
    assert_branches(case, arrays, together, mode, backend)
    same(together["state"], before)


@pytest.mark.parametrize(("mode", "backend"), LOOPS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_inputs_of_16_bits(dtype, mode, backend):
    case, arrays = tree(6, seed=3, dtypes={"state": dtype, "*": dtype}, headdim=7, dstate=19)
    assert_branches(case, arrays, run(arrays, mode, backend, **case.flags), mode, backend)


@pytest.mark.parametrize(("mode", "backend"), LOOPS)
def test_the_largest_tree(mode, backend):
    case, arrays = tree(MOST_TOKENS_OF_A_TREE, seed=5, headdim=4, dstate=8)
    assert_branches(case, arrays, run(arrays, mode, backend, **case.flags), mode, backend)


@pytest.mark.parametrize(("mode", "backend"), LOOPS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_chain_is_no_tree(dtype, mode, backend):
    """It has the bits of the same call without parent_tokens, but for the state, which only that call writes."""
    case, arrays = tree(5, seed=2, dtypes={"state": dtype})
    chain = {**arrays, "parent_tokens": np.arange(-1, 4, dtype="int64")[None]}
    expected = run({n: a for n, a in arrays.items() if n != "parent_tokens"}, mode, backend, **case.flags)
    got = run(chain, mode, backend, **case.flags)
    for name in got:
        if name not in ("state", "state_scale"):
            same(got[name], expected[name])


@pytest.mark.parametrize(("mode", "backend"), LOOPS)
def test_packed_trees_and_those_with_an_axis_of_tokens(mode, backend):
    """The bits do not depend on which; a packed one starts behind other rows."""
    case, arrays = tree(6, seed=8, dtypes={"state": "bfloat16"})
    expected = run(arrays, mode, backend, **case.flags)
    rows = {n: np.concatenate([a[0, :2], a[0]]) for n, a in arrays.items() if n in TOKENWISE}
    parents = np.concatenate([[5, 5], arrays["parent_tokens"][0]]).astype("int64")
    packed = {**arrays, **rows, "parent_tokens": parents, "cu_seqlens": np.array([2, 8])}
    got = run(packed, mode, backend, **case.flags)
    same(got["out"][2:], expected["out"][0])
    same(got["intermediate_states"], expected["intermediate_states"])


@pytest.mark.parametrize(("mode", "backend"), LOOPS)
def test_destinations(mode, backend):
    """A slot for each token, the one that is read among them; the accepted leaf's is then read by a column plus 1."""
    case, arrays = tree(5, seed=4)
    arrays = {n: a for n, a in arrays.items() if n != "intermediate_states"}
    arrays["state"] = np.random.default_rng(1).standard_normal((8, *arrays["state"].shape[1:]), "float32")
    table = np.array([[SLOT, 7, 3, 4, 5]], "int32")
    drafted = {**arrays, "state_batch_indices": table, "dst_state_batch_indices": table}
    together = run(drafted, mode, backend, **case.flags)
    for path in branches(arrays["parent_tokens"][0]):
        alone = {n: a[:, path] if n in TOKENWISE else a for n, a in arrays.items() if n != "parent_tokens"}
        branch = run({**alone, "dst_state_batch_indices": np.array([0])}, mode, backend, **case.flags)
        same(together["state"][table[0, path[-1]]], branch["state"][0])
        same(together["out"][:, path], branch["out"])
        accepted = {**drafted, "state": together["state"], "num_accepted_tokens": np.array([path[-1] + 1])}
        following = run({**accepted, "parent_tokens": np.full((1, 5), -1)}, mode, backend, **case.flags)
        again = {**arrays, "state": branch["state"], "state_batch_indices": np.array([0])}
        expected = run({**again, "parent_tokens": np.full((1, 5), -1)}, mode, backend, **case.flags)
        same(following["out"], expected["out"])


@pytest.mark.parametrize(("mode", "backend"), [*LOOPS, ("jax", "xla")])
@pytest.mark.parametrize("flag", [False, True])
def test_the_state_is_neither_written_nor_given_up(flag, mode, backend):
    case, arrays = tree(4, seed=6)
    given = convert(arrays, mode)
    skip_if_refused(explain(**given, **case.flags, backend=backend))
    results = ssu_bridge.update(**given, **case.flags, backend=backend, disable_state_update=flag)
    assert results[1] is given["state"]
    same(to_host({"state": given["state"]}, mode)["state"], arrays["state"])


@pytest.mark.parametrize(("mode", "backend"), [*LOOPS, ("jax", "xla")])
def test_a_fresh_sequence_takes_nothing_from_its_slot(mode, backend):
    """Not a NaN, and it stores there what the same call gives that starts from a slot of zeros."""
    for fields in ({}, {"tokens": 3}, {"tokens": 3, "steps": 3}):
        case = Case("fresh", has_initial_state=(False, True, False), **fields)
        arrays = case.arrays(seed=9)
        zeros = {n: a for n, a in arrays.items() if n != "has_initial_state"}
        zeros["state"] = np.nan_to_num(arrays["state"])
        got, expected = (run(a, mode, backend, **case.flags) for a in (arrays, zeros))
        for name in got:
            if backend == "xla":  # two programs, in which XLA may fuse a product and a sum in other places
                np.testing.assert_allclose(np.asarray(got[name]), np.asarray(expected[name]), rtol=1e-5, atol=1e-6)
            else:
                same(got[name], expected[name])


@pytest.mark.parametrize(("mode", "backend"), [*LOOPS, ("jax", "xla")])
@pytest.mark.parametrize("stride", [2, 3, 7, 8, 2**31 - 1])
def test_every_so_many_states(stride, mode, backend):
    tokens = 7
    case = Case("all", tokens=tokens, steps=tokens, dtypes={"state": "bfloat16"})
    arrays = case.arrays(seed=1)
    every = run(arrays, mode, backend, **case.flags)
    some = run(arrays, mode, backend, **case.flags, intermediate_stride=stride)
    same(some["out"], every["out"])
    same(some["state"], every["state"])
    count = tokens // stride
    for slot in case.indices:
        same(some["intermediate_states"][slot, :count], every["intermediate_states"][slot, stride - 1 :: stride])
    same(some["intermediate_states"][:, count:], arrays["intermediate_states"][:, count:])
