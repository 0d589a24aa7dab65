"""What the JAX frontend takes the devices of a process for."""

from types import SimpleNamespace

import jax
import pytest
from modes import to_mode

import ssu_bridge
from ssu_bridge.api import explain
from ssu_bridge.frontends.jax import metadata
from ssu_bridge.testing.cases import Case

CASE = Case("devices")


def gpu(capability):
    return SimpleNamespace(platform="gpu", compute_capability=capability)


CPU = SimpleNamespace(platform="cpu")
HOSTS = {
    "one": ([gpu("9.0"), CPU], {"cuda": (9, 0), "cpu": None}),
    "alike": ([gpu("8.0"), gpu("8.0"), CPU, CPU], {"cuda": (8, 0), "cpu": None}),
    "two kinds": ([gpu("9.0"), gpu("8.0"), CPU], {"cuda": None, "cpu": None}),
    "two kinds, the first again": ([gpu("9.0"), gpu("8.0"), gpu("9.0")], {"cuda": None}),
    "another vendor's": ([gpu("gfx942"), CPU], {"rocm": None, "cpu": None}),
    "the CPU first": ([CPU, gpu("12.0")], {"cpu": None, "cuda": (12, 0)}),
}


@pytest.mark.parametrize("host", HOSTS)
def test_the_capability_of_a_platform_is_that_of_all_its_devices(host, monkeypatch):
    devices, expected = HOSTS[host]
    monkeypatch.setattr(metadata, "_devices", lambda: devices)
    found = metadata.platforms()
    assert found == expected
    assert [*found] == [*expected]  # the default first


def test_the_devices_of_this_process():
    assert {*metadata._devices()} >= {*jax.local_devices(), *jax.devices("cpu")}
    assert metadata._devices()[0] == jax.local_devices()[0]


def test_kernels_for_one_architecture_are_refused_where_there_are_two(monkeypatch):
    """A program may be lowered once for both, and the kernel in it would be loaded on the wrong one."""
    arrays, choices = to_mode(CASE.arrays(0), "jax"), []
    monkeypatch.setattr(metadata, "_devices", lambda: [gpu("9.0"), gpu("8.0"), CPU])

    def told(state, arrays):
        choices.extend(explain(state, **arrays, **CASE.flags).choices)
        return state

    jax.make_jaxpr(told)(arrays.pop("state"), arrays)
    on_gpus, on_cpu = choices
    reasons = {answer.backend: answer.refusal for answer in on_gpus.answers}
    assert "GPUs of this process have none or several; make those of one kind visible" in reasons["triton"]
    assert on_gpus.backend == "xla"
    assert on_cpu.backend == "cpu"


def test_the_error_for_such_a_process(monkeypatch):
    arrays = to_mode(CASE.arrays(0), "jax")
    monkeypatch.setattr(metadata, "_devices", lambda: [gpu("9.0"), gpu("8.0")])
    message = "it compiles for one compute capability, .*CUDA_VISIBLE_DEVICES"
    with ssu_bridge.using(backend="triton"), pytest.raises(ssu_bridge.UnsupportedError, match=message):
        jax.make_jaxpr(lambda arrays: ssu_bridge.update(**arrays, **CASE.flags))(arrays)
