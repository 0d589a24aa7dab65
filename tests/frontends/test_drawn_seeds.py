"""Seeds that are drawn: one for each call that runs, and none for a call that raises or runs nothing."""

import jax
import numpy as np
import pytest
import torch
from drop_ins import H, P, model
from modes import to_host, to_mode
from torch.utils._python_dispatch import TorchDispatchMode

import ssu_bridge
from ssu_bridge.compat import flashinfer, mamba_ssm, vllm
from ssu_bridge.testing.cases import Case

CASE = Case("drawn", sequences=2, slots=3, nheads=2, ngroups=1, headdim=4, dstate=8, indices=(2, 0),
            dtypes={"*": "float16", "state": "float16"})  # fmt: skip
MODES = ("numpy", "torch")
NARROW = np.iinfo(np.int64)


@pytest.fixture(autouse=True)
def configured():
    with ssu_bridge.using(stochastic_rounding=True):
        yield


def generators():
    """Return the states of both generators, to compare."""
    _, words, place, *_ = np.random.get_state()
    return words.tobytes(), place, torch.get_rng_state().numpy().tobytes()


def seed_both():
    np.random.seed(5)
    torch.manual_seed(5)


def draw_one(mode):
    if mode == "numpy":
        np.random.randint(NARROW.min, NARROW.max, dtype=np.int64)
    else:
        torch.randint(NARROW.min, NARROW.max, ())


def arrays(mode):
    return to_mode(CASE.arrays(seed=1), mode)


def in_state(a):
    """Return what looks like x, in the memory of the state."""
    x = a["x"]
    return a["state"].reshape(-1)[: int(np.prod(x.shape))].reshape(x.shape)


# How to make a call wrong, and its error.
WRONG = {
    "a shape": (lambda a: {"x": a["x"][:, :1]}, ValueError),
    "a size": (lambda a: {"B": a["B"][:1]}, ValueError),
    "a dtype": (lambda a: {"state_batch_indices": a["x"]}, ValueError),
    "no array": (lambda a: {"C": [1.0]}, TypeError),
    "x in the state": (lambda a: {"x": in_state(a)}, ValueError),
    "out in the state": (lambda a: {"out": in_state(a)}, ValueError),
    "a backend": (lambda a: {"backend": "xla"}, ssu_bridge.UnsupportedError),
    "a flag": (lambda a: {"dt_softplus": 1}, TypeError),
    "a copy": (lambda a: {"donate": False}, TypeError),
    "an index": (lambda a: {"state_batch_indices": a["state_batch_indices"] + 7, "check_indices": True}, ValueError),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("mode", MODES)
def test_what_raises_draws_none(mode, wrong):
    spoil, error = WRONG[wrong]
    for _ in range(2):  # a first call, and one after a right one
        a = arrays(mode)
        before = generators()
        with pytest.raises(error):
            ssu_bridge.update(**{**a, **spoil(a)})
        assert generators() == before
        ssu_bridge.update(**arrays(mode))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("mode", MODES)
def test_what_runs_draws_one(mode, backend):
    runs = []
    for _ in range(3):  # the first call of all, and repeated ones
        seed_both()
        states = [to_host({"s": ssu_bridge.update(**arrays(mode), backend=backend)[1]}, mode)["s"] for _ in range(2)]
        runs.append(states)
        after = generators()
    seed_both()
    draw_one(mode)
    draw_one(mode)
    assert generators() == after
    assert not np.array_equal(*runs[0])
    np.testing.assert_array_equal(runs[1:], runs[:1] * 2)


@pytest.mark.parametrize("mode", MODES)
def test_an_output_that_is_computed_apart_takes_one(mode):
    case = Case(
        "rows",
        tokens=2,
        sequences=1,
        cu_seqlens=(0, 2),
        slots=1,
        indices=(0,),
        dtypes={"*": "float16", "state": "float16"},
    )
    a = to_mode(case.arrays(seed=1), mode)
    seed_both()
    draw_one(mode)
    after = generators()
    seed_both()
    ssu_bridge.update(**a, out=a["x"])
    assert generators() == after


@pytest.mark.parametrize("mode", MODES)
def test_what_runs_nothing_draws_none(mode):
    before = generators()
    ssu_bridge.explain(**arrays(mode))
    ssu_bridge.warm_up(**arrays(mode))
    for wrong in ("a shape", "no array", "a backend", "a flag"):
        spoil, error = WRONG[wrong]
        a = arrays(mode)
        with pytest.raises(error):
            ssu_bridge.check(**{**a, **spoil(a)})
    assert generators() == before
    assert ssu_bridge.check(**arrays(mode))
    assert generators() != before


def test_jax_draws_none():
    before = generators()
    with pytest.raises(ValueError, match="rand_seed: expected a key"):
        ssu_bridge.update(**arrays("jax"))
    ssu_bridge.update(**arrays("jax"), rand_seed=jax.random.key(1))
    assert generators() == before


PEERS = {
    "mamba_ssm": lambda a: mamba_ssm.selective_state_update(**a),
    "vllm": lambda a: vllm.selective_state_update(**a, out=torch.empty(2, H, P)),
    "vllm's own": lambda a: vllm.selective_state_update(**a, out=torch.empty(2, H, P), enable_stochastic_rounding=True),
    "flashinfer": lambda a: flashinfer.selective_state_update(**a, out=torch.empty(2, H, P)),
}


@pytest.mark.parametrize("peer", PEERS)
def test_the_drop_ins(peer):
    a = model(2) | {"state": model(2)["state"].half()}
    for _ in range(2):
        for name, wrong in {"B": a["B"][:1], "x": a["x"].to(torch.int16), "C": None}.items():
            before = generators()
            with pytest.raises((ValueError, TypeError)):
                PEERS[peer](a | {name: wrong})
            assert generators() == before, name
        seed_both()
        PEERS[peer](a | {"state": a["state"].clone()})
        after = generators()
        seed_both()
        draw_one("torch")
        assert generators() == after


class Watching(TorchDispatchMode):
    """A dispatch mode that changes nothing."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_where_a_mode_of_torch_records():
    a = arrays("torch")
    seed_both()
    expected = ssu_bridge.update(**arrays("torch"))[1]
    after = generators()
    with Watching():
        seed_both()
        before = generators()
        with pytest.raises(ValueError, match="state_batch_indices: expected dtype"):
            ssu_bridge.update(**{**a, "state_batch_indices": a["x"]})
        assert generators() == before
        assert torch.equal(ssu_bridge.update(**a)[1], expected)
        assert generators() == after


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_calls(backend):
    step = torch.compile(lambda a: ssu_bridge.update(**a)[1], backend=backend, fullgraph=True)
    seed_both()
    expected = [ssu_bridge.update(**arrays("torch"))[1] for _ in range(2)]
    after = generators()
    step(arrays("torch"))
    seed_both()
    for state in expected:
        assert torch.equal(step(arrays("torch")), state)
    assert generators() == after
    a = arrays("torch")
    with pytest.raises(ValueError, match="B: expected shape"):
        step({**a, "B": a["B"][:1]})
    assert generators() == after
