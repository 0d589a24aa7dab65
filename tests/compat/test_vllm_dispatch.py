"""vLLM's dispatch: its own tests of it by meaning, and that the backend in force is the one that runs."""

import argparse

import pytest
import torch
from drop_ins import H, P, model

import ssu_bridge
from ssu_bridge.backends import cpu
from ssu_bridge.backends.flashinfer import module
from ssu_bridge.compat import vllm, vllm_dispatch
from ssu_bridge.compat.vllm_dispatch import (
    CPUSSUBackend,
    FlashInferSSUBackend,
    MambaBackendEnum,
    MambaConfig,
    MambaSSUBackend,
    TritonSSUBackend,
    get_mamba_ssu_backend,
    initialize_mamba_ssu_backend,
    selective_state_update,
)

CPU = MambaConfig(backend="cpu")
ORDER = ("state", "x", "dt", "A", "B", "C", "D", "dt_bias", "z")


@pytest.fixture(autouse=True)
def _none_in_force(monkeypatch):
    monkeypatch.setattr(vllm_dispatch, "_mamba_ssu_backend", None)


@pytest.mark.parametrize(
    ("config", "kind", "name"),
    [
        (MambaConfig(), TritonSSUBackend, "triton"),
        (MambaConfig(backend=MambaBackendEnum.TRITON), TritonSSUBackend, "triton"),
        (MambaConfig(backend="Cpu"), CPUSSUBackend, "cpu"),
        (MambaConfig(backend="FLASHINFER"), FlashInferSSUBackend, "flashinfer"),
    ],
)
def test_the_configured_backend_is_in_force(config, kind, name, monkeypatch):
    monkeypatch.setattr(module, "missing", lambda: None)  # of FlashInfer, which needs a GPU
    initialize_mamba_ssu_backend(config, object())
    backend = get_mamba_ssu_backend()
    assert type(backend) is kind
    assert isinstance(backend, MambaSSUBackend)
    assert backend.name == name
    initialize_mamba_ssu_backend(CPU)  # another one takes its place
    assert get_mamba_ssu_backend().name == "cpu"


def test_without_one_a_call_is_an_error():
    with pytest.raises(RuntimeError, match="has not been initialized"):
        get_mamba_ssu_backend()
    a = model(2)
    with pytest.raises(RuntimeError, match="has not been initialized"):
        selective_state_update(*(a[name] for name in ORDER), out=torch.empty(2, H, P))


def test_what_is_not_installed_is_known_at_initialisation(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(ImportError, match="FlashInfer is required .* pip install 'flashinfer-python"):
        FlashInferSSUBackend(MambaConfig())
    with pytest.raises(ImportError, match="Triton is required .* pip install triton"):
        initialize_mamba_ssu_backend(MambaConfig())
    with pytest.raises(RuntimeError, match="has not been initialized"):
        get_mamba_ssu_backend()


def test_names_in_any_case_and_unknown_ones():
    assert MambaBackendEnum["Triton"] is MambaBackendEnum("TRITON") is MambaBackendEnum.TRITON
    for wrong in ("nope", 3):
        with pytest.raises(
            ValueError, match=f"Unknown Mamba SSU backend {wrong!r}; expected one of triton, flashinfer, cpu"
        ):
            MambaBackendEnum[wrong]
        with pytest.raises(ValueError, match="expected one of triton, flashinfer, cpu"):
            MambaConfig(backend=wrong)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("enable_stochastic_rounding", "yes", TypeError),
        ("stochastic_rounding_philox_rounds", -1, ValueError),
        ("ssu_algorithm", "diagonal", ValueError),
    ],
)
def test_a_wrong_field_is_named(field, value, error):
    with pytest.raises(error, match=f"^{field}: expected"):
        MambaConfig(**{field: value})


@pytest.mark.parametrize("algorithm", [None, "auto", "simple", "vertical", "horizontal"])
def test_the_algorithm_reaches_the_backend(algorithm, monkeypatch):
    monkeypatch.setattr(module, "missing", lambda: None)
    backend, seen = FlashInferSSUBackend(MambaConfig("flashinfer", ssu_algorithm=algorithm)), []
    monkeypatch.setattr(vllm, "selective_state_update", lambda *_: seen.append(ssu_bridge.get_config()))
    backend(*[torch.empty(1)] * 8)
    assert seen == [ssu_bridge.SSUConfig("flashinfer", algorithm or "auto")]


def test_the_flags_of_the_command_line(capsys):
    parser = argparse.ArgumentParser()
    vllm_dispatch.add_cli_args(parser)
    assert MambaConfig.from_args(parser.parse_args([])) == MambaConfig(stochastic_rounding_philox_rounds=10)
    given = "--mamba-backend FlashInfer --mamba-ssu-algorithm simple --mamba-cache-philox-rounds 4"
    flags = [*given.split(), "--enable-mamba-cache-stochastic-rounding"]
    expected = MambaConfig(MambaBackendEnum.FLASHINFER, True, 4, "simple")
    assert MambaConfig.from_args(parser.parse_args(flags)) == expected
    assert expected.ssu_config() == ssu_bridge.SSUConfig("flashinfer", "simple", True, 4)
    with pytest.raises(SystemExit):
        parser.parse_args(["--mamba-backend", "xla"])
    assert "(choose from 'triton', 'flashinfer', 'cpu')" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # MambaConfig has no field for it
        parser.parse_args(["--mamba-round-each-token"])


def call(a, out, function=selective_state_update, **rest):
    order = [a[name] for name in ORDER]
    assert function(*order[:8], z=order[8], dt_softplus=True, out=out, **rest) is None
    return out


def test_it_computes_what_the_drop_in_does(monkeypatch):
    initialize_mamba_ssu_backend(CPU)
    loaded, real = [], cpu.load
    monkeypatch.setattr(cpu, "load", lambda problem: loaded.append(problem) or real(problem))
    tables = {
        "state_batch_indices": torch.tensor([[1, 2], [3, 4]]),
        "dst_state_batch_indices": torch.tensor([[1, 5], [3, 0]]),
        "num_accepted_tokens": torch.tensor([1, 2]),
        "cu_seqlens": torch.tensor([0, 2, 3]),
    }
    for rest in ({}, {"state_batch_indices": torch.tensor([3, 1, 0])}, tables):
        got, expected = model(3, seed=5), model(3, seed=5)
        with ssu_bridge.using(backend="reference"):  # the backend in force counts, not the configuration
            out = call(got, torch.empty(3, H, P), is_blackwell=True, **rest)
        assert torch.equal(out, call(expected, torch.empty(3, H, P), vllm.selective_state_update, **rest))
        assert torch.equal(got["state"], expected["state"])
    assert loaded


def test_mamba1():
    initialize_mamba_ssu_backend(CPU)
    state, x, A, B = torch.randn(2, 64, 16), torch.randn(2, 64), -torch.rand(64, 16), torch.randn(2, 16)
    out = torch.full_like(x, float("nan"))
    selective_state_update(state, x, x, A, B, B, D=torch.ones(64), dt_bias=torch.zeros(64), dt_softplus=True, out=out)
    assert not torch.isnan(out).any()


@pytest.mark.parametrize("counts", [None, torch.tensor([1, 1])])
def test_stochastic_rounding_in_every_call(counts):
    initialize_mamba_ssu_backend(MambaConfig(backend="cpu", enable_stochastic_rounding=True))
    a, results = model(2), []
    table = torch.tensor([3, 1])
    rest = {} if counts is None else {"num_accepted_tokens": counts, "cu_seqlens": torch.tensor([0, 1, 2])}
    for _ in range(2):
        state = a["state"].half()
        call({**a, "state": state}, torch.empty(2, H, P), state_batch_indices=table, **rest)
        results.append(state)
    assert not torch.equal(*results)
    torch.testing.assert_close(*results, rtol=2e-3, atol=1e-6)
    state = a["state"].clone()
    call({**a, "state": state}, torch.empty(2, H, P), state_batch_indices=table, **rest)  # float32 is not rounded
    assert not torch.equal(state, a["state"])


def test_what_the_backend_lacks_is_refused_at_the_call():
    initialize_mamba_ssu_backend(MambaConfig(backend="cpu", ssu_algorithm="matrix"))
    a = model(4)
    before = a["state"].clone()
    with pytest.raises(ssu_bridge.UnsupportedError, match="matrix form"):
        call(a, torch.empty(4, H, P), cu_seqlens=torch.tensor([0, 2, 4]), state_batch_indices=torch.tensor([1, 2]))
    assert torch.equal(a["state"], before)
    initialize_mamba_ssu_backend(MambaConfig())
    if not torch.cuda.is_available():
        with pytest.raises(ssu_bridge.UnsupportedError, match="it runs on CUDA arrays only"):
            call(model(2), torch.empty(2, H, P))


@pytest.mark.filterwarnings("ignore")
def test_inside_of_torch_compile():
    initialize_mamba_ssu_backend(CPU)
    torch._dynamo.reset()
    got, expected = model(2), model(2)
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    assert torch.equal(compiled(got, torch.empty(2, H, P)), call(expected, torch.empty(2, H, P)))
    assert torch.equal(got["state"], expected["state"])
