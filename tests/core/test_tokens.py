"""Several tokens in one call are the same tokens one call at a time, to the bit, where a backend loops over them."""

import functools

import numpy as np
import pytest
from modes import PAIRS, TOKENWISE, bits, convert, run, step, to_host

import ssu_bridge
from ssu_bridge.testing.cases import Case
from ssu_bridge.testing.check import check, results_by_name

# Those that loop, with a mode for each.
LOOPS = [
    ("numpy", "reference"),
    ("numpy", "cpu"),
    ("torch", "cpu"),
    ("jax", "cpu"),
    pytest.param("torch.cuda", "triton", marks=pytest.mark.gpu),
    pytest.param("jax", "triton", marks=pytest.mark.gpu),
]
T = 5


def one_by_one(arrays, tokens, mode, backend, **flags):
    """Run single-token calls; return the outputs and the states after each, with an axis of tokens."""
    state, outs, states = arrays["state"], [], []
    rest = {n: a for n, a in arrays.items() if not n.startswith("intermediate")}
    for t in range(tokens):
        token = {n: a[:, t] if n in TOKENWISE else a for n, a in rest.items()}
        after = run({**token, "state": state}, mode, backend, **flags)
        state = after["state"]
        outs.append(after["out"])
        states.append(state)
    return np.stack(outs, 1), np.stack(states, 1)


def same(got, expected):
    np.testing.assert_array_equal(bits(got), bits(expected))


@pytest.mark.parametrize(("mode", "backend"), LOOPS)
@pytest.mark.parametrize("untied", [(), ("A", "dt", "D", "dt_bias")], ids=["tied", "untied"])
@pytest.mark.parametrize(("headdim", "dstate"), [(16, 32), (64, 128), (7, 19)])
def test_tokens_of_one_call(headdim, dstate, untied, mode, backend):
    case = Case("tokens", tokens=T, steps=T, headdim=headdim, dstate=dstate, untied=untied)
    arrays = case.arrays(seed=3)
    together = run(arrays, mode, backend, **case.flags)
    outs, states = one_by_one(arrays, T, mode, backend, **case.flags)
    same(together["out"], outs)
    same(together["state"], states[:, -1])
    for slot in case.indices:
        same(together["intermediate_states"][slot], states[slot])


@pytest.mark.parametrize(("mode", "backend"), LOOPS)
def test_packed_tokens(mode, backend):
    case = Case("packed", tokens=9, cu_seqlens=(0, 4, 4, 9))
    arrays = case.arrays(seed=4)
    together = run(arrays, mode, backend, **case.flags)
    for i, (begin, end) in enumerate(((0, 4), (4, 9))):
        alone = {n: a[begin:end][None] if n in TOKENWISE else a for n, a in arrays.items() if n != "cu_seqlens"}
        slot = case.indices[2 * i]
        alone["state_batch_indices"] = np.array([slot])
        outs, states = one_by_one(alone, end - begin, mode, backend, **case.flags)
        same(together["out"][begin:end], outs[0])
        same(together["state"][slot], states[slot, -1])


@pytest.mark.parametrize(("mode", "backend"), LOOPS)
def test_the_bits_do_not_depend_on_the_form(mode, backend):
    """One token as a single-token call, as a sequence of one, and packed."""
    case = Case("forms")
    arrays = case.arrays(seed=5)
    first = run(arrays, mode, backend, **case.flags)
    axis = {n: a[:, None] if n in TOKENWISE else a for n, a in arrays.items()}
    packed = {**arrays, "cu_seqlens": np.arange(4)}
    for other in (axis, packed):
        after = run(other, mode, backend, **case.flags)
        same(after["out"].reshape(first["out"].shape), first["out"])
        same(after["state"], first["state"])


@pytest.mark.parametrize(("mode", "backend"), LOOPS)
def test_verifying_drafts(mode, backend):
    """What serving does: score drafts with a destination for each, then go on from the last one that was accepted."""
    case = Case("drafts", tokens=3, slots=9, indices=((0, 1, 2), (3, 4, 5), (6, 7, 8)))
    arrays = {**case.arrays(seed=6), "dst_state_batch_indices": np.array(case.indices)}
    accepted = np.array([3, 1, 2])
    call = functools.partial(run, mode=mode, backend=backend, **case.flags)
    drafted = call(arrays)
    again = call({**arrays, "state": drafted["state"], "num_accepted_tokens": accepted})
    for i, count in enumerate(accepted):
        slot = 3 * i + count - 1
        tokens = {n: a[i : i + 1] if n in TOKENWISE else a for n, a in arrays.items() if n != "dst_state_batch_indices"}
        alone = call({**tokens, "state": drafted["state"], "state_batch_indices": np.array([slot])})
        same(again["out"][i], alone["out"][0])
        same(again["state"][3 * i + 2], alone["state"][slot])


NO_COLUMNS = ((), (), ())


@pytest.mark.parametrize(("mode", "backend"), PAIRS)
@pytest.mark.parametrize(
    "tables",
    [
        {"indices": NO_COLUMNS},
        {"indices": NO_COLUMNS, "accepted": (0, 1, 2)},
        {"indices": NO_COLUMNS, "destinations": NO_COLUMNS},
        {"destinations": NO_COLUMNS},
    ],
    ids=lambda tables: "+".join(tables),
)
def test_no_tokens_and_tables_without_columns(tables, mode, backend):
    """No token needs a column, so there may be none; then nothing is read or written."""
    case = Case("no columns", tokens=0, **tables)
    arrays = case.arrays(seed=4)
    after = to_host(results_by_name(step(mode, convert(arrays, mode), **case.flags, backend=backend)), mode)
    assert after["out"].shape == (3, 0, 4, 16)
    same(after["state"], arrays["state"])
    if mode in ("numpy", "torch", "jax") and backend != "xla":
        assert check(**convert(arrays, mode), **case.flags, backend=backend).passed
        if "accepted" not in tables:  # no count is in range where there is no column
            ssu_bridge.update(**convert(arrays, mode), **case.flags, backend=backend, check_indices=True)
