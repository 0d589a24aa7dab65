"""The flashinfer backend without a GPU: what FlashInfer is called with, what is refused, and what is said."""

import dataclasses
import logging
import re
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import pytest
import torch
import tvm_ffi
from flashinfer_calls import (
    BARE,
    CASE,
    STEPS,
    TOKENS,
    as_flashinfer_wants,
    draw,
    intermediates,
    packed,
    problem_of,
    quantized,
    sized,
    table,
    tensors_of,
    tokens,
)
from modes import to_mode

import ssu_bridge
from ssu_bridge import choose
from ssu_bridge.backends import flashinfer, flashinfer_module
from ssu_bridge.cases import Case
from ssu_bridge.check import judge
from ssu_bridge.choose import module
from ssu_bridge.config import Backend, SSUConfig
from ssu_bridge.problem import QUANTIZED

# --- What FlashInfer is called with ---


class Seen(NamedTuple):
    """What a tensor looked like while the call lasted; its shape and strides are gone with the call."""

    shape: tuple
    strides: tuple
    dtype: str
    address: int

    @classmethod
    def of(cls, value):
        if not isinstance(value, tvm_ffi.Tensor):
            return value
        return cls(tuple(value.shape), tuple(value.strides), str(value.dtype), value.data_ptr())


def seen(tensor):
    """A Torch tensor in the same words."""
    return Seen(tuple(tensor.shape), tensor.stride(), str(tensor.dtype).removeprefix("torch."), tensor.data_ptr())


@pytest.fixture
def calls(monkeypatch):
    """Record FlashInfer's arguments in place of running it."""
    recorded = []
    stand_in = tvm_ffi.convert(lambda *arguments: recorded.append(tuple(map(Seen.of, arguments))))
    monkeypatch.setattr(flashinfer_module, "load", lambda module: stand_in)
    flashinfer._kernel.cache_clear()
    yield recorded
    flashinfer._kernel.cache_clear()


def run(call, tensors=None, change=lambda problem: problem):
    """Call the kernel of a call as a frontend does; return the tensors, out among them."""
    problem = change(problem_of(call))
    assert flashinfer.refusal(problem) is None
    tensors = dict(tensors or tensors_of(call))
    tensors.setdefault("out", torch.empty_like(tensors["x"]))
    flashinfer.load(problem).function(*(tensors[name] for name in (*problem.names, *problem.results)))
    return tensors


def assert_called(calls, wanted, **scalars):
    (arguments,) = calls
    names = flashinfer_module.ARGUMENTS.split(", ")
    assert len(arguments) == len(names) == 24
    for name, got in zip(names, arguments, strict=True):
        if name in scalars:
            assert got == scalars[name], name
        else:
            assert got == (None if wanted[name] is None else seen(wanted[name])), name


def scalars(**changes):
    usual = {"dt_softplus": True, "pad_slot_id": -1, "disable_state_update": False, "cache_steps": 0, "algorithm": 1}
    return {**usual, **changes}


def aligned(call):
    """The tensors of a call, each at a multiple of 128 bytes."""
    result = {}
    for name, tensor in tensors_of(call).items():
        memory = torch.empty(tensor.nbytes + 128, dtype=torch.uint8)
        first = -memory.data_ptr() % 128
        result[name] = memory[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return result


def test_one_token(calls):
    tensors = run(draw())
    assert_called(calls, as_flashinfer_wants(tensors), **scalars(algorithm=calls[0][-1]))


def test_flags(calls):
    call = draw(dt_softplus=False, pad_slot_id=4, disable_state_update=True)
    tensors = run(call, aligned(call))
    expected = scalars(dt_softplus=False, pad_slot_id=4, disable_state_update=True, algorithm=0)
    assert_called(calls, as_flashinfer_wants(tensors), **expected)


def test_what_is_absent_is_none_and_an_absent_d_has_no_memory(calls):
    call = draw(BARE, state=np.zeros((3, 4, 64, 64), "float32"))
    tensors = run(call, aligned(call))
    arguments = dict(zip(flashinfer_module.ARGUMENTS.split(", "), calls[0], strict=True))
    D = arguments["D"]
    assert Seen((4, 64), (1, 0), "float32", 0) == D
    wanted = as_flashinfer_wants(tensors)
    calls[0] = tuple(None if argument is D else argument for argument in calls[0])
    assert_called(calls, wanted, **scalars(dt_softplus=False, algorithm=0) | {"dt_softplus": call["dt_softplus"]})


@pytest.mark.parametrize("case", [tokens(), tokens(sized(BARE, absent=("z", "dt_bias")))])
def test_many_tokens(calls, case):
    call = draw(case)
    assert_called(calls, as_flashinfer_wants(run(call, aligned(call))), **scalars(algorithm=0))


@pytest.mark.parametrize(
    "case",
    [sized(destinations=(1, -1, 3)), sized(indices=table(), accepted=(1, 2, 0)), quantized()],
    ids=["destinations", "counts", "int16"],
)
def test_what_the_kernels_for_one_token_get_wrong_goes_to_those_for_many(calls, case):
    assert_called(calls, as_flashinfer_wants(run(draw(case)), one_token_axis=True), **scalars())


def test_packed(calls):
    call = draw(sized(packed(), destinations=table()))
    assert_called(calls, as_flashinfer_wants(run(call)), **scalars(cache_steps=3))


def test_intermediate_states(calls):
    call = draw(tokens(intermediates()))
    wanted = as_flashinfer_wants(run(call, aligned(call)))
    assert_called(calls, wanted, **scalars(disable_state_update=True, cache_steps=STEPS, algorithm=0))


def test_quantised_intermediate_states(calls):
    wanted = as_flashinfer_wants(run(draw(tokens(quantized(intermediates())))))
    # FlashInfer insists on an entry for each sequence and writes to those of the slots.
    wanted["intermediate_state_scales"] = wanted["intermediate_state_scales"][:3]
    assert_called(calls, wanted, **scalars(disable_state_update=True, cache_steps=STEPS))


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_seed_is_one_int64_whatever_it_came_as(calls, framework):
    call = draw(sized(dtypes={"state": "float16"}, seed=2**40 + 7))
    tensors = aligned(call)
    if framework == "jax":
        tensors["rand_seed"] = torch.tensor([7, 2**8], dtype=torch.uint32)
    run(call, tensors, lambda problem: dataclasses.replace(problem, framework=framework))
    seed = calls[0][flashinfer_module.ARGUMENTS.split(", ").index("rand_seed")]
    assert seed == Seen((1,), (1,), "int64", tensors["rand_seed"].data_ptr())


def test_strides_of_the_batch_and_of_slots_are_kept(calls):
    call = draw()
    tensors = aligned(call)
    for name in ("state", "x", "B", "C", "z", "dt"):
        wide = torch.zeros(len(tensors[name]), 2, *tensors[name].shape[1:], dtype=tensors[name].dtype)
        wide[:, 0] = tensors[name]
        tensors[name] = wide[:, 0]
    assert_called(calls, as_flashinfer_wants(run(call, tensors)), **scalars(algorithm=calls[0][-1]))


def test_a_broadcast_view_is_passed_as_one(calls):
    call = draw()
    tensors = tensors_of(call)
    views = {name: view for name, view in as_flashinfer_wants({**tensors, "out": None}).items() if name in call}
    run(call, {name: views.get(name, tensor) for name, tensor in tensors.items()})
    arguments = dict(zip(flashinfer_module.ARGUMENTS.split(", "), calls[0], strict=True))
    for name in ("A", "dt", "D", "dt_bias"):
        assert arguments[name] == seen(views[name])


def test_axes_of_one_entry_are_dense_whatever_their_stride(calls):
    case = Case("one", sequences=1, slots=2, nheads=1, ngroups=1, headdim=64, dstate=64, indices=(1,))
    call = draw(case)
    tensors = {n: t.as_strided(t.shape, [7 if s == 1 else d for s, d in zip(t.shape, t.stride(), strict=True)])
               if n in ("x", "B", "C", "z", "dt") else t for n, t in aligned(call).items()}  # fmt: skip
    dense = {
        name: tensor.contiguous().as_strided(tensor.shape, torch.empty(tensor.shape).stride())
        for name, tensor in tensors.items()
    }
    wanted = as_flashinfer_wants({**dense, "out": torch.empty_like(dense["x"])})
    run(call, tensors)
    arguments = dict(zip(flashinfer_module.ARGUMENTS.split(", "), calls[0], strict=True))
    for name in ("x", "B", "C", "z", "dt"):
        assert arguments[name].strides == wanted[name].stride(), name


NONE = sized(sequences=0, indices=())


@pytest.mark.parametrize("case", [NONE, tokens(NONE), tokens(count=0), packed(lengths=(0, 0, 0))])
def test_nothing_to_do_is_not_asked_of_it(calls, case):
    run(draw(case))
    assert calls == []


@pytest.mark.parametrize("name", ["state", "x", "B", "C", "z"])
def test_memory_that_bulk_copies_cannot_read(calls, name):
    """Auto leaves it to the simple kernel; an algorithm that was asked for raises before FlashInfer is called."""
    call = draw()
    tensors = aligned(call)
    run(call, tensors)
    assert calls.pop()[-1] == 0
    memory = torch.empty(tensors[name].nbytes + 256, dtype=torch.uint8)
    first = -memory.data_ptr() % 128 + 16
    view = memory[first : first + tensors[name].nbytes].view(torch.float32).view(tensors[name].shape)
    tensors[name] = view.copy_(tensors[name])
    run(call, tensors)
    assert calls.pop()[-1] == 1
    with (
        ssu_bridge.using(algorithm="vertical"),
        pytest.raises(ValueError, match=f"{name}: .*multiple of 128.*vertical"),
    ):
        run(call, tensors)
    assert calls == []


@pytest.mark.parametrize(("algorithm", "number"), [("simple", 1), ("vertical", 2), ("horizontal", 3)])
def test_the_algorithm_asked_for(calls, algorithm, number):
    call = draw()
    with ssu_bridge.using(algorithm=algorithm):
        run(call, aligned(call))
    assert calls[0][-1] == number


def test_the_adapter_checks_what_it_is_given(calls):
    call = draw()
    problem, tensors = problem_of(call), tensors_of(call)
    function = flashinfer.load(problem).function
    given = [*(tensors[name] for name in problem.names), torch.empty_like(tensors["x"])]
    with pytest.raises(ValueError, match="expected 12 tensors, got 11"):
        function(*given)
    with pytest.raises(ValueError, match="state must be written where it is read"):
        function(*given, tensors["state"].clone())
    assert calls == []


def test_kernels_are_told_apart_by_their_names(calls):
    different = [
        CASE, sized(pad_slot_id=3), sized(dt_softplus=False), sized(disable_state_update=True), tokens(), tokens(count=2),
        packed(), sized(packed(), indices=table(2)), quantized(), BARE, sized(destinations=(1, 2, 3)),
    ]  # fmt: skip
    targets = {flashinfer.load(problem_of(case)).target for case in different}
    assert len(targets) == len(different)
    assert flashinfer.load(problem_of(sized(sequences=2, slots=9, indices=(1, 0)))).target in targets


# --- What is refused ---


def replaced(**fields):
    return lambda problem: dataclasses.replace(problem, **fields)


def with_algorithm(name):
    return lambda p: dataclasses.replace(
        p, options=dataclasses.replace(p.options, config=dataclasses.replace(p.options.config, algorithm=name))
    )


THREE = sized(nheads=6, ngroups=2)
# Calls that FlashInfer rejects or gets wrong: the case, what is changed in its Problem, what the refusal says.
REFUSED = {
    "the CPU": (CASE, lambda p: p.on("cpu"), "runs on CUDA arrays only"),
    "an old GPU": (CASE, lambda p: p.on("cuda", (7, 5)), "compute capability 8.0 or higher, and this one has 7.5"),
    "trees": (draw(tokens(), parent_tokens=np.zeros((3, TOKENS), "int32")), None, "parent_tokens"),
    "small heads": (sized(headdim=16), None, "headdim 64 or 128, and this is 16"),
    "odd heads": (sized(headdim=80), None, "headdim 64 or 128, and this is 80"),
    "large heads": (sized(headdim=256), None, "headdim 64 or 128, and this is 256"),
    "small dstate": (sized(dstate=32), None, "dstate from 64 to 256 in multiples of 32, and this is 32"),
    "odd dstate": (sized(dstate=72), None, "dstate .* and this is 72"),
    "large dstate": (sized(dstate=512), None, "dstate .* and this is 512"),
    "int16, dstate 96": (quantized(sized(dstate=96)), None, "multiples of 64, and this is 96"),
    "heads in a group": (tokens(THREE), None, "heads in a group, and these are 3"),
    "heads in a group, destinations": (sized(THREE, destinations=(1, 5, 3)), None, "heads in a group, and these are 3"),
    "heads in a group, horizontal": (THREE, with_algorithm("horizontal"), "horizontal kernel takes 1"),
    "many heads": (CASE, replaced(nheads=65536, ngroups=65536), "at most 65535 heads"),
    "few slots": (sized(slots=2, indices=(0, 1, -1)), None, "as many slots as sequences, and these are 2 and 3"),
    "a wide pad id": (sized(pad_slot_id=2**40), None, "pad_slot_id of 32 bits"),
    **{
        f"{dtype} states": (quantized(dtype=dtype), None, f"quantised states of int16 alone, and this is {dtype}")
        for dtype in QUANTIZED[1:]
    },
    "rounding bfloat16": (sized(dtypes={"state": "bfloat16"}, seed=1), None, "rounds float16 states alone"),
    **{
        f"{name} unlike {like}": (sized(dtypes={name: "bfloat16"}), None, f"takes {name} in {like}'s dtype float32")
        for name, like in (("B", "x"), ("C", "x"), ("z", "x"), ("D", "dt"), ("dt_bias", "dt"))
    },
    "tables of two dtypes": (
        sized(destinations=(1, 5, 3), dtypes={"dst_state_batch_indices": "int64"}),
        None,
        "takes dst_state_batch_indices in state_batch_indices's dtype int32",
    ),
    **{
        f"untied {name}": (sized(untied=(name,)), None, f"takes {name} as one number a head")
        for name in ("A", "dt", "D", "dt_bias")
    },
    "Mamba-1": (sized(nheads=0, ngroups=1), None, "takes A, dt, D, dt_bias as one"),
    **{
        f"unaligned {name}": (CASE, replaced(unaligned=(name,)), f"takes {name} at multiples of 16 bytes")
        for name in ("state", "x", "B", "C", "z")
    },
    "unaligned out, tokens": (tokens(), replaced(unaligned=("out",)), "takes out at multiples of 16 bytes"),
    "strided out": (CASE, replaced(strided=("out",)), "takes out without gaps"),
    "strided cu_seqlens": (packed(), replaced(strided=("cu_seqlens",)), "takes cu_seqlens without gaps"),
    "intermediates and the state": (tokens(sized(steps=STEPS)), None, "leaves the state as it is"),
    "entries for intermediates": (
        tokens(sized(intermediates(), entries=(1, 5, 3))), None, "write out of bounds for an entry"
    ),
    "intermediates, packed": (packed(intermediates()), None, "steps of the intermediate states for the longest"),
    "few intermediates": (tokens(intermediates()), replaced(entries=5), "for each slot, not 5 for 6"),
    "17 tokens": (tokens(count=17), None, "at most 16 tokens in a call, and these are 17"),
    "17 rows": (packed(lengths=(1, 8, 8)), None, "here none, or from the number of rows, here 17"),
    "17 columns": (sized(packed(lengths=(1, 8, 8)), indices=table(17)), None, "here 17"),
    **{
        f"{name}, tokens": (tokens(), with_algorithm(name), f"{name} kernel for many tokens.* from compute capability 10")
        for name in ("vertical", "horizontal")
    },
    **{
        f"{name}, {what}": (
            case, lambda p, n=name: with_algorithm(n)(p.on("cuda", (10, 0))), f"{name} kernel .*does not do {what}"
        )
        for name in ("vertical", "horizontal")
        for what, case in {
            "destination slots": sized(destinations=(1, 5, 3)),
            "accepted token counts": tokens(sized(indices=table(), accepted=(1, 2, 3))),
            "packed sequences": packed(),
            "int16 states": tokens(quantized()),
        }.items()
    },
    **{
        f"{name} before 9.0": (CASE, lambda p, n=name: with_algorithm(n)(p.on("cuda", (8, 9))), f"{name} kernel runs from")
        for name in ("vertical", "horizontal")
    },
    "horizontal, int16": (
        quantized(sized(indices=None)), with_algorithm("horizontal"), "horizontal kernel takes no int16 states"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    case, change, says = REFUSED[name]
    problem = problem_of(case)
    reason = flashinfer.refusal(change(problem) if change else problem)
    assert reason is not None
    assert re.search(says, reason), reason


@pytest.fixture
def both_there(monkeypatch):
    """As on a machine with a GPU and both of its backends installed."""
    for backend in (flashinfer, module("triton")):
        monkeypatch.setattr(backend, "missing", lambda framework: None)


@pytest.mark.usefixtures("both_there")
def test_what_is_refused_goes_to_triton_under_auto(monkeypatch):
    row = {"form": "single", "state": "float32", "tokens": [1, 1], "elements": [0, np.inf]}
    monkeypatch.setattr(choose, "measured", lambda name, capability: {"flashinfer": [row]})
    for case, taken in ((CASE, "flashinfer"), (sized(headdim=16), "triton")):
        choice = choose.consider_problem(under_auto(problem_of(case)))
        assert choice.backend == taken
        assert [answer.backend for answer in choice.answers[:2]] == ["flashinfer", "triton"]
    assert "flashinfer  refuses: it takes headdim 64 or 128" in str(choose.Explanation((choice,)))


@pytest.mark.usefixtures("both_there")
def test_asked_for_by_name_it_raises_with_the_reason_and_who_can():
    problem = problem_of(sized(headdim=16))
    config = dataclasses.replace(problem.options.config, backend="flashinfer")
    problem = dataclasses.replace(problem, options=dataclasses.replace(problem.options, config=config))
    with pytest.raises(
        ssu_bridge.UnsupportedError, match=r"flashinfer: it takes headdim 64.*backend='triton'.* can do it"
    ):
        choose.load(problem)


def under_auto(problem):
    return dataclasses.replace(problem, options=dataclasses.replace(problem.options, config=SSUConfig()))


WORK = 3 * 4 * 64 * 64  # elements of state that CASE updates
FORMS = {"single": CASE, "multi": tokens(count=4), "packed": packed(lengths=(4, 4, 4))}
ROW = {"form": "multi", "state": "float32", "tokens": [4, 8], "elements": [WORK, np.inf]}


def first_asked(case, row, monkeypatch):
    monkeypatch.setattr(choose, "measured", lambda name, capability: {"flashinfer": [row]})
    return choose.consider_problem(under_auto(problem_of(case))).answers[0].backend


@pytest.mark.parametrize("form", FORMS)
def test_auto_goes_by_a_table(form, monkeypatch):
    row = {**ROW, "form": form, "tokens": [1, 4] if form == "single" else [4, 8]}
    assert first_asked(FORMS[form], row, monkeypatch) == "flashinfer"
    for change in (
        {"form": "another"}, {"state": "bfloat16"}, {"tokens": [5, 8]}, {"tokens": [0, 0]}, {"elements": [WORK + 1, np.inf]},
        {"elements": [0, WORK - 1]},
    ):  # fmt: skip
        assert first_asked(FORMS[form], {**row, **change}, monkeypatch) == "triton"


@pytest.mark.parametrize(
    "fields", [{"disable_state_update": True}, {"steps": 4, "disable_state_update": True}, {"destinations": table(4)}]
)
def test_the_table_is_about_plain_calls(fields, monkeypatch):
    assert first_asked(sized(FORMS["multi"], slots=12, **fields), ROW, monkeypatch) == "triton"


@pytest.mark.parametrize("capability", [None, (8, 0), (9, 0), (12, 1)])
def test_the_committed_table(capability):
    """What was measured on 9.0: many tokens with bfloat16 states are FlashInfer's, from 16 sequences of 64 heads on."""
    slots = tuple(range(16))
    large = sized(sequences=16, slots=16, indices=slots, nheads=64, dstate=128, dtypes={"state": "bfloat16"})
    for case, first in (
        (CASE, "triton"),
        (large, "triton"),
        (tokens(large, 3), "triton"),
        (tokens(large, 4), "flashinfer"),
        (tokens(large, 8), "flashinfer"),
        (tokens(sized(large, nheads=32), 4), "triton"),
        (tokens(sized(large, dtypes={}), 4), "triton"),
        (packed(), "triton"),
    ):
        answers = choose.consider_problem(under_auto(problem_of(case, capability))).answers
        assert answers[0].backend == first, case
        assert {answer.backend for answer in answers[:2]} == {"triton", "flashinfer"}


def test_explain_says_how_it_would_run():
    said = flashinfer.settings(problem_of(CASE))
    assert said == "its kernels for one token, algorithm auto; trusts all values of index arrays but pad_slot_id"
    assert flashinfer.settings(problem_of(tokens(BARE))) == "its kernels for many tokens, algorithm auto"
    said = flashinfer.settings(problem_of(sized(dtypes={"state": "float16"}, seed=1, destinations=(1, 5, 3))))
    assert said.startswith("its kernels for many tokens, algorithm simple; ")
    assert said.endswith("; rounds by random numbers of its own, and to zero below 2**-14")
    assert "; sequences of at most 2 tokens" in flashinfer.settings(problem_of(sized(packed(), destinations=table(2))))


def test_auto_keeps_clear_of_kernels_that_err():
    assert flashinfer._algorithm(problem_of(THREE)) == "simple"
    assert flashinfer._algorithm(problem_of(CASE)) == "auto"
    assert flashinfer._algorithm(problem_of(tokens(), (10, 0))) == "auto"
    assert flashinfer._algorithm(problem_of(packed(), (10, 0))) == "simple"


@pytest.mark.parametrize(
    ("columns", "lengths", "longest"), [(0, (1, 1, 1), 4), (0, (3, 5, 3), 16), (2, (1, 0, 2), 2), (9, (1, 1, 0), 2)]
)
def test_the_longest_packed_sequence(columns, lengths, longest):
    case = packed(sized(indices=table(columns)) if columns else CASE, lengths)
    assert flashinfer._longest(problem_of(case)) == longest


# --- What it is held to ---


def judged(backend, case, spoil, **scales):
    """Whether the state passes that the reference leaves, spoilt; of arrays of which some are scaled."""
    arrays = case.arrays(seed=3)
    arrays |= {name: arrays[name] * arrays[name].dtype.type(scale) for name, scale in scales.items()}
    before = {name: array.copy() for name, array in arrays.items()}
    given = to_mode(arrays, "numpy")
    problem = ssu_bridge.explain(**given, **case.flags, backend="reference").choices[0].problem
    out, state = ssu_bridge.update(**given, **case.flags, backend="reference")
    spoil(before, state)
    rows = judge(problem, Backend(backend), before, {"out": out, "state": state})
    return next(row for row in rows if row.name == "state").passed


SMALL = sized(nheads=2, ngroups=1, headdim=4, dstate=8, dtypes={"state": "float16"}, seed=5, dt_softplus=False)
USED = [4, 0, 2]  # the slots that are written


def test_any_random_numbers_will_do_for_flashinfer():
    def other_words(arrays, state):
        other = to_mode({**arrays, "rand_seed": np.array(77)}, "numpy")
        ssu_bridge.update(**other, **SMALL.flags, backend="reference")
        state[...] = other["state"]

    def two_steps_off(arrays, state):
        state[USED] = (state[USED].view("uint16") + np.uint16(2)).view("float16")

    assert judged("flashinfer", SMALL, other_words)
    assert not judged("triton", SMALL, other_words)
    assert not judged("flashinfer", SMALL, two_steps_off)


def test_small_numbers_may_be_rounded_to_zero_by_flashinfer():
    def to_zero(arrays, state):
        assert state[USED].any()
        state[USED] = 0

    assert judged("flashinfer", SMALL, to_zero, state=1e-5, x=1e-6)
    assert not judged("triton", SMALL, to_zero, state=1e-5, x=1e-6)
    assert not judged("flashinfer", SMALL, to_zero, state=1e-2, x=1e-2)


def test_softplus_may_be_as_coarse_as_numbers_near_one_for_flashinfer():
    # Without a state and softplus of about -20 there is little but x B softplus(dt).
    case = sized(SMALL, dtypes={}, seed=None, dt_softplus=True, absent=("dt_bias", "z"), indices=(-1, 0, 2))
    problem = problem_of({**case.arrays(seed=3), **case.flags}).on("cpu")
    arrays = case.arrays(seed=3) | {"dt": np.full((3, 2), -17, "float32"), "state": np.zeros((6, 2, 4, 8), "float32")}
    given = to_mode({name: array.copy() for name, array in arrays.items()}, "numpy")
    out, state = ssu_bridge.update(**given, **case.flags, backend="reference")
    assert 0 < np.abs(state).max() < 1e-6

    def passes(backend, state):
        return all(row.passed for row in judge(problem, Backend(backend), arrays, {"out": out, "state": state}))

    assert passes("triton", state)
    assert passes("flashinfer", 0 * state)
    assert not passes("triton", 0 * state)
    assert not passes("flashinfer", state + np.float32(1e-3) * (state != 0))


# --- What it takes to be there ---


SOURCE = """
def _get_module({parameters}):
    return None

def _selective_state_update():
    get_selective_state_update_module().selective_state_update({arguments})
"""


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Install a FlashInfer of some version and signature, with or without nvcc, as far as is looked at."""

    def install(version="0.6.18.post1", arguments=flashinfer_module.ARGUMENTS, nvcc=True):
        package = tmp_path / "flashinfer" / "mamba"
        package.mkdir(parents=True)
        (tmp_path / "flashinfer" / "__init__.py").touch()
        parameters = ", ".join(flashinfer_module.Module._fields)
        (package / "selective_state_update.py").write_text(SOURCE.format(parameters=parameters, arguments=arguments))
        metadata = tmp_path / f"flashinfer_python-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flashinfer-python\nVersion: {version}\n")
        (tmp_path / "bin").mkdir()
        compiler = tmp_path / "bin" / "nvcc"
        compiler.touch(mode=0o755)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path if nvcc else tmp_path / "nowhere"))

    return install


def test_it_is_there(installed):
    installed()
    assert flashinfer.missing("torch") is None


def test_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert flashinfer.missing("torch") == 'FlashInfer is not installed: pip install "ssu-bridge[flashinfer]"'
    with pytest.raises(ssu_bridge.BackendNotAvailableError, match=r'pip install "ssu-bridge\[flashinfer\]"'):
        ssu_bridge.update(**to_mode(CASE.arrays(seed=1), "torch"), backend="flashinfer")


def test_too_old(installed):
    installed("0.6.9")
    assert re.search(
        r'FlashInfer 0\.6\.9 is too old, known are 0\.6\.11 to .*: pip install "ssu-', flashinfer.missing("torch")
    )


@pytest.mark.parametrize("arguments", [flashinfer_module.ARGUMENTS + ", more", "", "*everything"])
def test_another_signature(installed, arguments):
    installed("9.0.0", arguments)
    assert re.search(
        r"FlashInfer 9\.0\.0 calls its kernels in another way.*0\.6\.11 to 0\.6", flashinfer.missing("torch")
    )


def test_no_compiler(installed, monkeypatch):
    installed(nvcc=False)
    says = flashinfer.missing("torch")
    assert "nvcc, which was not found" in says
    assert 'backend="triton" needs none' in says
    monkeypatch.setenv("FLASHINFER_NVCC", sys.executable)
    assert flashinfer.missing("torch") is None


def test_the_compiler_on_the_path(installed, monkeypatch, tmp_path):
    installed(nvcc=False)
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert flashinfer.missing("torch") is None


def test_kernels_that_were_compiled_elsewhere_need_no_compiler(installed, tmp_path):
    installed(nvcc=False)
    (tmp_path / "flashinfer_jit_cache").mkdir()
    (tmp_path / "flashinfer_jit_cache" / "__init__.py").touch()
    assert flashinfer.missing("torch") is None


def test_what_flashinfer_says_when_it_cannot_compile_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, ENTRY, None)
    with pytest.raises(ssu_bridge.BackendNotAvailableError, match="ModuleNotFoundError.*triton.* needs no compiler"):
        flashinfer_module.load(flashinfer._module(problem_of(CASE)))


ENTRY = "flashinfer.mamba.selective_state_update"


class Entry:
    """FlashInfer's module, compiling for as long as is wanted."""

    def __init__(self, seconds):
        self.seconds, self.asked = seconds, []

    def _get_module(self, *arguments):
        self.asked.append(arguments)
        time.sleep(self.seconds)
        return self

    selective_state_update = "the function"


def test_it_is_asked_for_a_module(monkeypatch):
    entry = Entry(0)
    monkeypatch.setitem(sys.modules, ENTRY, entry)
    mixed = {"state": "float16", "x": "bfloat16", "B": "bfloat16", "C": "bfloat16", "z": "bfloat16"}
    call = draw(tokens(sized(dtypes=mixed, indices=table(), accepted=(1, 2, 3), seed=1)))
    assert flashinfer_module.load(flashinfer._module(problem_of(call))) == "the function"
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    assert entry.asked == [
        (half, brain, single, single, torch.int32, 64, 64, TOKENS, torch.int32, torch.int32, 9, None, 10)
    ]
    flashinfer_module.load(flashinfer._module(problem_of(quantized())))
    assert entry.asked[1] == (
        torch.int16,
        *[single] * 3,
        torch.int32,
        64,
        64,
        1,
        torch.int32,
        torch.int64,
        9,
        single,
        0,
    )


@pytest.mark.parametrize("seconds", [0.0, 0.2])
def test_a_compilation_is_told_while_it_runs_and_one_that_is_there_is_not(monkeypatch, caplog, seconds):
    monkeypatch.setitem(sys.modules, ENTRY, Entry(seconds))
    monkeypatch.setattr(flashinfer_module, "_PATIENCE", 0.05)
    with caplog.at_level(logging.INFO, logger="ssu_bridge"):
        flashinfer_module.load(flashinfer._module(problem_of(CASE)))
    said = [record.getMessage() for record in caplog.records]
    assert [what.split(" its ")[0] for what in said] == (
        ["FlashInfer compiles", "FlashInfer compiled"] if seconds else []
    )


def test_without_logging_it_is_said_on_stderr():
    code = "from ssu_bridge.backends import flashinfer_module as m; m._say('compiles')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "ssu_bridge: compiles\n"
    configured = f"import logging; logging.basicConfig(level='WARNING'); {code}"
    done = subprocess.run([sys.executable, "-c", configured], capture_output=True, text=True, check=True)
    assert done.stderr == ""
