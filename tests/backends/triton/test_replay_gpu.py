"""The kernels of a ReplayState on a GPU: a layer with sequences at every phase, and bits whatever the batch."""

import dataclasses

import pytest
import torch
from contract import assert_step
from modes import to_mode

import ssu_bridge
from ssu_bridge.testing.cases import Case

pytestmark = pytest.mark.gpu

STORED = ("float32", "bfloat16", "float16", "int16", "int8", "float8_e4m3fn")
SLOTS = 24


def layer(stored, tokens, sequences=20, **changes):
    """A layer of a large model: slots at each phase of a window of 16, their rings begun anywhere."""
    return Case(
        "layer", sequences=sequences, slots=SLOTS, nheads=64, headdim=64, dstate=128, ngroups=8,
        indices=tuple(5 * i % SLOTS for i in range(sequences)), tokens=tokens, window=16, most=4,
        starts=tuple(range(SLOTS)), pending=tuple(i % 17 for i in range(SLOTS)),
        dtypes={"state": stored, "*": "bfloat16", "A": "float32"}, **changes,
    )  # fmt: skip


@pytest.mark.parametrize("tokens", [None, 4])
@pytest.mark.parametrize("stored", STORED)
def test_a_layer_at_every_phase(stored, tokens):
    case = layer(stored, tokens)
    assert_step(case, case.arrays(seed=3), "torch.cuda", "triton")


@pytest.mark.parametrize("tokens", [None, 4])
@pytest.mark.parametrize("stored", ["bfloat16", "int8"])
def test_bits_depend_on_neither_batch_nor_place(stored, tokens):
    """A program does more heads where there are more sequences."""
    case = layer(stored, tokens)
    arrays = case.arrays(seed=3)
    results = []
    for first, count in ((0, 20), (7, 1), (3, 9)):
        part = {
            name: array[first : first + count] if name in ("x", "dt", "B", "C", "z", "state_batch_indices") else array
            for name, array in arrays.items()
        }
        alone = dataclasses.replace(case, sequences=count)
        given = to_mode({name: array.copy() for name, array in part.items()}, "torch.cuda", case.window)
        out, state = ssu_bridge.update(**given, **alone.flags, backend="triton")
        results.append((out[7 - first], state))
    slot = int(arrays["state_batch_indices"][7])
    for out, state in results[1:]:
        assert torch.equal(out, results[0][0])
        for mine, whole in zip(leaves(state), leaves(results[0][1]), strict=True):
            assert torch.equal(mine[slot].view(torch.uint8), whole[slot].view(torch.uint8))


def leaves(state):
    return [array for part in state for array in (part if isinstance(part, tuple) else (part,))]
