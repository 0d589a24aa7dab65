"""warm_up and torch.compile: kernels ahead of the first call, and the step inside a traced graph."""

import importlib

import jax
import numpy as np
import pytest
import torch
from modes import bits, to_host, to_mode

import ssu_bridge
from ssu_bridge import dispatch
from ssu_bridge.testing.cases import Case
from ssu_bridge.testing.check import results_by_name

CASE = Case("warm", headdim=8, dstate=16)


@pytest.mark.parametrize("mode", ["numpy", "torch", "jax"])
def test_it_loads_and_changes_nothing(mode, monkeypatch):
    loaded = []
    cpu = dispatch.module("cpu")
    real = cpu.load
    monkeypatch.setattr(cpu, "load", lambda problem: loaded.append(problem) or real(problem))
    arrays = CASE.arrays(seed=1)
    given = to_mode(arrays, mode)
    assert ssu_bridge.warm_up(**given, **CASE.flags).backend == "cpu"
    assert len(loaded) == 1
    for name, array in to_host(given, mode).items():
        np.testing.assert_array_equal(bits(array), bits(arrays[name]))


@pytest.mark.parametrize("mode", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("flags", [{}, {"pad_slot_id": 2, "dt_softplus": True}, {"backend": "cpu"}])
def test_the_first_call_finds_what_it_left(mode, flags):
    known = importlib.import_module("ssu_bridge.api")._launchers
    known.clear()
    ssu_bridge.warm_up(**to_mode(CASE.arrays(seed=1), mode), **flags)
    left = dict(known)
    assert len(left) == 1
    ssu_bridge.update(**to_mode(CASE.arrays(seed=1), mode), **flags)
    assert known == left


def test_it_raises_what_update_raises():
    given = CASE.arrays(seed=1)
    with pytest.raises(ssu_bridge.UnsupportedError, match="JAX arrays only"):
        ssu_bridge.warm_up(**given, backend="xla")
    with pytest.raises(ValueError, match="pad_slot_id"):
        ssu_bridge.warm_up(**given, pad_slot_id=2**70)


def test_while_tracing():
    @jax.jit
    def run(arrays):
        assert ssu_bridge.warm_up(**arrays, **CASE.flags).choices[-1].backend == "cpu"
        return arrays["x"]

    run(to_mode(CASE.arrays(seed=1), "jax"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["torch", pytest.param("torch.cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("given_out", [False, True])
def test_torch_compile_of_a_whole_graph(mode, given_out):
    arrays = CASE.arrays(seed=2)

    def model(state, x, rest, out):
        y, state = ssu_bridge.update(state, 2 * x, **rest, **CASE.flags, out=out)
        return y + 1, state

    def run(function):
        tensors = to_mode(arrays, mode)
        state, x = tensors.pop("state"), tensors.pop("x")
        with torch.no_grad():
            y, new = function(state, x, tensors, torch.empty_like(x) if given_out else None)
        assert torch.equal(new, state)
        return y, state

    ssu_bridge.warm_up(**to_mode(arrays, mode), **CASE.flags)
    torch._dynamo.reset()
    # The operator's own bookkeeping is what is tested; "aot_eager" traces as the default does, and compiles nothing.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for mine, eager in zip(run(compiled), run(model), strict=True):
        assert torch.equal(mine, eager)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("changes", [{}, {"dtypes": {"state": "int8"}}, {"dtypes": {"state": "float16"}, "seed": 5}])
def test_torch_compile_of_several_tokens(changes):
    case = Case("compiled", headdim=8, dstate=16, tokens=3, steps=3, **changes)
    flags = {**case.flags, "backend": "reference"}

    def model(given):
        return ssu_bridge.update(**given, **flags)

    def run(function):
        with torch.no_grad():
            return results_by_name(function(to_mode(case.arrays(seed=3), "torch")))

    expected = run(model)
    torch._dynamo.reset()
    compiled = run(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert compiled.keys() == expected.keys()
    for name, tensor in compiled.items():
        assert torch.equal(tensor, expected[name]), name
