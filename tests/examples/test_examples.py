"""The examples run as a reader would run them, and say what they promise to."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import torch
from small_models import random_weights
from without_torch import WITHOUT_TORCH

import demo
import share_state
import torch_caller
from mamba2_jax import benchmark, checkpoint, drafts, generate, load, plot, scheduler
from mamba2_jax.config import Mamba2Config
from mamba2_jax.generate import KJV, stream
from mamba2_jax.sampling import Sampling
from mamba2_jax.text import tokenizer_of

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = Mamba2Config(256, 32, 1, num_heads=4, head_dim=16, state_size=8, n_groups=2)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def run(*arguments, device="cpu", **variables):
    environment = {**os.environ, **variables, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if device == "cpu":
        environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=EXAMPLES)
    assert result.returncode == 0, result.stderr
    return result.stdout


def run_without_torch(module, *arguments):
    """Run a module that needs no Torch in half the time."""
    begin = (
        WITHOUT_TORCH + "import runpy; del sys.argv[0]; runpy.run_module(sys.argv[0], None, '__main__', alter_sys=True)"
    )
    return run("-c", begin, module, *arguments)


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Run a module's command in this process, which has imported and compiled much of it before."""

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
        code = 0
        try:
            module.main()
        except SystemExit as ended:
            code = ended.code
        assert code == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def tiny(monkeypatch):
    """Make a known model a small one: of the one that it is, drawing the embedding alone takes seconds."""
    monkeypatch.setitem(benchmark.SIZES, "mamba2-130m", TINY)


DEMO = ["--prompt", "And God said, ", "--tokens", "32", "--rounds", "1", "--layers", "1"]


@pytest.mark.nightly  # `make demo` runs it, too
def test_the_demo(tmp_path):
    assert_shown(run("demo.py", *DEMO, "--plot", tmp_path / "latency.png"))
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")


def assert_shown(shown):
    assert shown.startswith("And God said, ")
    assert shown.count("selected, the first that supports the call") == 2
    for model in shown.split("Random weights")[0:2]:
        for backend in ("cpu", "xla"):
            assert re.search(rf"SSM step +{backend} +[\d.]+ us  +[\d.]+ times xla", model)
            assert re.search(rf"whole token +{backend} +[\d.]+ ms +[\d.]+ tokens/s +[\d.]+ times xla", model)
        assert "cpu: the compiled program copies no state" in model
        assert "verdict: pass" in model


def test_the_plot(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "BATCHES", (1, 4))
    plot.plot_latency(tmp_path / "latency.png", TINY, random_weights(TINY, jax.random.key(0)), rounds=1)
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")


OPTIONS = [["--mamba-backend", "xla"], ["--dtype", "bfloat16", "--state-dtype", "bfloat16"], ["--state-dtype", "int8"]]
SMALL = ["--layers", "1", "--tokens", "2", "--rounds", "1"]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_benchmark_of_a_small_model(options, run_here, tiny):
    shown = run_here(benchmark, *SMALL, *options, "--replay", 3)
    assert_compared(shown, options)
    last = "cpu" if "int8" in options else "xla"
    assert re.search(rf"^ +whole token +{last}, replay +[\d.]+ ms .*[\d.]+ times {last}$", shown, re.MULTILINE)


def test_the_benchmark_of_prompts(run_here, tiny):
    shown = run_here(benchmark, "--layers", "1", "--rounds", "1", "--batch", "2", "--prompt", "5")
    for what in ("SSM, prompt +", "prompt +"):
        for backend in ("cpu", "xla"):
            assert re.search(rf"^ +{what}{backend} +[\d.]+ [um]s .*[\d.]+ times xla$", shown, re.MULTILINE)
    assert re.search(r"by steps +cpu +[\d.]+ ms, [\d.]+ times one pass", shown)


@pytest.mark.nightly
def test_the_benchmark_of_verification(run_here, tiny):
    shown = run_here(benchmark, *SMALL, "--layers", "1", "--batch", "2", "--verify", "3", "--replay", "4")
    everywhere = ["one token", "3 tokens, a slot for each"]
    for backend, whats in (("cpu", everywhere), ("xla", [*everywhere, "3 tokens, replay of 4"])):
        for what in whats:
            assert re.search(rf"^ +{backend} +{what} +[\d.]+ ms +[\d.]+ times one token$", shown, re.MULTILINE)


@pytest.fixture
def small_checkpoint(tmp_path):
    checkpoint.save(tmp_path, TINY, random_weights(TINY, jax.random.key(0)), "float32")
    return tmp_path


def test_the_demo_of_small_models(run_here, tiny, small_checkpoint, monkeypatch):
    monkeypatch.setattr(demo, "KJV", small_checkpoint)
    assert_shown(run_here(demo, *DEMO))


def test_the_benchmark_of_drafts(run_here, small_checkpoint, monkeypatch):
    (small_checkpoint / "prompts.txt").write_text("Moses\nIn the beginning\n")
    monkeypatch.setattr(drafts, "KJV", small_checkpoint)
    shown = run_here(benchmark, "--speculate", 3, "--tokens", 40, "--rounds", 1).splitlines()
    counts = r"\d+ of \d+ drafts accepted \(\d+ %\), [\d.]+ tokens a call"
    for line, prompt in zip(shown[:2], ("Moses", "In the beginning"), strict=True):
        assert re.fullmatch(rf"  {prompt} +plain \d+ tokens/s, drafts \d+ tokens/s, [\d.]+ times; {counts}", line)
    assert re.fullmatch(rf"median of 2 prompts: [\d.]+ times the tokens per second; {counts}", shown[2])


@pytest.mark.nightly
def test_the_benchmark_of_a_server(run_here, small_checkpoint, monkeypatch):
    (small_checkpoint / "prompts.txt").write_text("In the beginning\n")
    monkeypatch.setattr(benchmark, "KJV", small_checkpoint)
    monkeypatch.setattr(load, "ANSWERS", (3, 6))
    picture = small_checkpoint / "load.png"
    options = ["--requests", 3, "--loads", 0.5, "--rounds", 1, "--plot", picture]
    shown = run_here(benchmark, "--serve", "--one-row", *options)
    time = r"[\d.]+ ms \(99 %: [\d.]+ ms\)"
    for name in ("chunks", "one row"):
        assert (
            len(re.findall(rf"^  {name} +[\d.]+ tokens/s; first token {time}, each later one {time}$", shown, re.M))
            == 2
        )
    assert (
        len(re.findall(r"^  chunks: [\d.]+ times the tokens/s, the first token [\d.]+ times as soon$", shown, re.M))
        == 2
    )
    assert re.search(r"^50% load, [\d.]+ requests/s$", shown, re.M)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_generating_with_drafts(run_here, small_checkpoint):
    of_a_text = ["--checkpoint", small_checkpoint, "--prompt", "Moses", "--tokens", 40, "--temperature", 0]
    plain = run_here(generate, *of_a_text)
    for options in (["--speculate", 3], ["--speculate", 3, "--branches", 2]):
        *text, counts = run_here(generate, *of_a_text, *options).splitlines(keepends=True)
        assert "".join(text) == plain
        assert re.fullmatch(r"\d+ of \d+ drafts accepted .*\n", counts)


# On a CPU the one of a small model takes the same options.
@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.nightly), *DEVICES[1:]])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_benchmark(device, options):
    assert_compared(run("-m", "mamba2_jax.benchmark", *SMALL, *options, device=device), options)


def assert_compared(shown, options):
    assert ("requested xla" in shown) == ("xla" in options)
    assert "copies no state" in shown
    assert "verdict: pass" in shown


@pytest.mark.parametrize("device", DEVICES)
def test_generating_text(device):
    moses = ["mamba2_jax.generate", "--prompt", "Moses", "--tokens", 40]
    text = run_without_torch(*moses) if device == "cpu" else run("-m", *moses, device=device)
    assert text.startswith("Moses")
    assert len(text) == len("Moses") + 40 + 1


def test_texts_of_other_seeds(run_here, small_checkpoint):
    moses = ["--checkpoint", small_checkpoint, "--prompt", "Moses", "--tokens", 40, "--mamba-backend", "xla"]
    texts = [run_here(generate, *moses, "--seed", seed) for seed in (1, 2, 1)]
    assert all(text.startswith("Moses") for text in texts)
    assert texts[0] == texts[2] != texts[1]


# By default in this process; the first is nightly in one of its own, the second on a GPU.
DEVICES_OF_A_PROCESS = [pytest.param("cpu", marks=pytest.mark.nightly), *DEVICES[1:]]


def assert_all_leave(shown):
    assert sorted(re.findall(r"sequence (\d) leaves", shown)) == list("012345")


def test_continuous_batching_here(run_here):
    assert_all_leave(run_here(scheduler, "--tokens", 10))


@pytest.mark.parametrize("device", DEVICES_OF_A_PROCESS)
def test_continuous_batching(device):
    assert_all_leave(run("-m", "mamba2_jax.scheduler", "--tokens", 10, device=device))


def assert_ways(shown, device):
    ways = ["eager", "torch.compile", "CUDA graph"]
    found = re.findall(rf"^(.*?) +3 tokens on {device}, as eager", shown, re.MULTILINE)
    assert found == ways[: 3 if device == "cuda" else 2]


@pytest.mark.filterwarnings("ignore")  # of torch.compile's
@pytest.mark.skipif(torch.cuda.is_available(), reason="a test on a GPU does it")
def test_the_torch_caller_here(run_here, monkeypatch):
    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, backend="aot_eager")
    )  # without a C++ compiler
    assert_ways(run_here(torch_caller, "--tokens", 3), "cpu")


@pytest.mark.parametrize("device", DEVICES_OF_A_PROCESS)
def test_the_torch_caller(device):
    assert_ways(run("torch_caller.py", "--tokens", 3, device=device), device)


def test_sharing_a_state_here(run_here):
    assert "the bits of 24 steps in JAX alone" in run_here(share_state)


@pytest.mark.parametrize("device", DEVICES_OF_A_PROCESS)
def test_sharing_a_state(device):
    assert "the bits of 24 steps in JAX alone" in run("share_state.py", device=device)


def test_the_configurations_of_known_models():
    assert benchmark.SIZES["mamba2-130m"] == Mamba2Config(50288, 768, 24, num_heads=24, head_dim=64, state_size=128)
    for config in benchmark.SIZES.values():
        assert config.inner_size == 2 * config.hidden_size


def test_the_package_mamba2_jax_with_its_step_replaced():
    small = ["--hidden-size", "64", "--layers", "1", "--batch", "2", "--prompt", "9", "--tokens", "6"]
    shown = run("other_libraries/mamba2_jax_package.py", *small)
    assert re.search(r"largest difference of the logits: \d\.\de-0[6-9] of the largest", shown)
    for what in ("a token", "a prompt"):
        assert re.search(rf"^{what}: [\d.]+ ms as the package has it, [\d.]+ ms with update, [\d.]+ times", shown, re.M)


@pytest.mark.nightly  # each process compiles the whole model
def test_a_model_over_two_devices_and_two_processes():
    prompt, count = "In the beginning", 24
    config, weights = checkpoint.load(KJV)
    tokenizer = tokenizer_of(KJV, config)
    tokens = stream(config, weights, tokenizer.encode(prompt), count, sampling=Sampling(temperature=0))
    read = tokenizer.reader()
    expected = prompt + "".join(map(read, tokens))
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "SSU_BRIDGE_NUM_THREADS": "1"}
    small = ["--layers", "1", "--tokens", "2", "--rounds", "1", "--devices", "2"]
    times = run("-m", "mamba2_jax.benchmark", *small, **flags)
    assert re.search(r"one device +cpu .* tokens/s  1.00 times one\n  2 devices +cpu .* tokens/s  [\d.]+ times", times)
    shown = run("-m", "mamba2_jax.distributed", "--hosts", "2", "--tokens", str(count), **flags)
    assert shown.endswith(f"4 devices of 2 hosts\n{expected}\n")  # after what gloo says
