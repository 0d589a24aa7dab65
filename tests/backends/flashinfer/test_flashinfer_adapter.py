"""What FlashInfer's function is called with, seen by one that stands in for it."""

import dataclasses
from typing import NamedTuple

import numpy as np
import pytest
import torch
import tvm_ffi
from flashinfer_calls import (
    BARE,
    CASE,
    STEPS,
    address,
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

import ssu_bridge
from ssu_bridge.backends.flashinfer import backend as flashinfer
from ssu_bridge.backends.flashinfer import kernel as flashinfer_kernel
from ssu_bridge.backends.flashinfer import module
from ssu_bridge.testing.cases import Case


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
        return cls(tuple(value.shape), tuple(value.strides), str(value.dtype), address(value))


def seen(tensor):
    """A Torch tensor in the same words."""
    return Seen(tuple(tensor.shape), tensor.stride(), str(tensor.dtype).removeprefix("torch."), tensor.data_ptr())


@pytest.fixture
def calls(monkeypatch):
    """Record FlashInfer's arguments in place of running it."""
    recorded = []
    stand_in = tvm_ffi.convert(lambda *arguments: recorded.append(tuple(map(Seen.of, arguments))))
    monkeypatch.setattr(module, "load", lambda module: stand_in)
    flashinfer_kernel.load.cache_clear()
    yield recorded
    flashinfer_kernel.load.cache_clear()


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
    names = module.ARGUMENTS.split(", ")
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
    arguments = dict(zip(module.ARGUMENTS.split(", "), calls[0], strict=True))
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
    seed = calls[0][module.ARGUMENTS.split(", ").index("rand_seed")]
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
    arguments = dict(zip(module.ARGUMENTS.split(", "), calls[0], strict=True))
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
    arguments = dict(zip(module.ARGUMENTS.split(", "), calls[0], strict=True))
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
    with pytest.raises(ValueError, match="neither the memory of the input that is updated in place nor like it"):
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
