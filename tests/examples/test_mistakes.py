"""What a user does wrong ends each example in one line with status 2: flags, files, variables, an absent backend."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
import torch
from small_models import random_weights

import demo
import share_state
import torch_caller
from mamba2_jax import benchmark, checkpoint, distributed, generate, scheduler, train
from mamba2_jax.config import Mamba2Config
from ssu_bridge import config

EXAMPLES = Path(demo.__file__).parent


@pytest.fixture
def package_example(monkeypatch):
    """The example about another package by the name of ours, without that package: nothing of it runs here."""
    other = SimpleNamespace(modeling=SimpleNamespace(ssd_forward=None))
    monkeypatch.setitem(sys.modules, "mamba2_jax", other)
    spec = importlib.util.spec_from_file_location("example", EXAMPLES / "other_libraries" / "mamba2_jax_package.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def mistake(monkeypatch, capsys):
    """Run a module's command with a mistake; return what the line says, which may follow the usage."""

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", ["example", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            module.main()
        assert ended.value.code == 2
        usage, _, said = capsys.readouterr().err.partition("example: error: ")
        assert usage.startswith("usage:") or not usage
        assert said.endswith("\n")
        assert said.count("\n") == 1
        return said

    return run


WITH_FILES = {
    "the text is missing": (train, ["nowhere/text", "nowhere/model"], "No such file or directory: 'nowhere/text'"),
    "the folder is a file": (train, [__file__, __file__], f"File exists: '{__file__}'"),
    "the text is short": (train, [__file__, "{tmp}/model", "--batch", 999], "the text is too short for 999 streams"),
    "no checkpoint": (generate, ["--checkpoint", "nowhere"], "nowhere/config.json: no such file"),
    "an empty folder": (generate, ["--checkpoint", "{tmp}"], "{tmp}/config.json: no such file"),
    "no checkpoint for hosts": (distributed, ["--checkpoint", "nowhere"], "nowhere/config.json: no such file"),
    "a host without weights": (
        distributed,
        ["--checkpoint", "{tmp}/config", "--host", "0", "--coordinator", "localhost:1"],
        "{tmp}/config/model.safetensors: expected weights in the safetensors format",
    ),
    "a picture in no folder": (demo, ["--plot", "nowhere/a.png"], "argument --plot: expected a file in a folder that"),
}


@pytest.mark.parametrize("name", WITH_FILES)
def test_a_wrong_file(mistake, tmp_path, name):
    module, arguments, message = WITH_FILES[name]
    (tmp_path / "config").mkdir()
    Mamba2Config(256, 32, 2, num_heads=4, head_dim=16, state_size=8).save(tmp_path / "config")
    said = mistake(module, *(str(argument).replace("{tmp}", str(tmp_path)) for argument in arguments))
    assert message.replace("{tmp}", str(tmp_path)) in said


@pytest.mark.parametrize("module", [demo, generate, scheduler])
def test_a_checkpoint_that_is_not_there(mistake, monkeypatch, tmp_path, module):
    monkeypatch.setattr(module, "KJV", tmp_path / "kjv")
    assert f"{tmp_path}/kjv/config.json: no such file" in mistake(module)


FLAGS = [
    (generate, "--temperature", "-1", "temperature: expected a number of 0 or more, got -1.0"),
    (generate, "--top-p", "2", "top_p: expected a number from 0 to 1, got 2.0"),
    (generate, "--tokens", "-1", "count: expected an int of 0 or more, got -1"),
    (generate, "--seed", "-1", "seed: expected an int from 0 to 2**32 - 1, got -1"),
    (generate, "--prompt", "", "prompt: expected at least one token"),
    (scheduler, "--width", "0", "width: expected an int of 1 or more, got 0"),
    (scheduler, "--rows", "1", "rows: expected an int of 3 or more, got 1"),
    (scheduler, "--tokens", "0", "count: expected an int of 1 or more, got 0"),
    *(
        (module, flag, "0", f"argument {flag}: expected a number of at least 1, got '0'")
        for module, flags in (
            (demo, ("--tokens", "--rounds", "--layers")),
            (benchmark, ("--layers", "--batch", "--tokens", "--rounds", "--prompt", "--devices")),
            (share_state, ("--rounds",)),
            (torch_caller, ("--tokens",)),
            (distributed, ("--hosts", "--tokens")),
            (train, ("--steps", "--batch", "--length", "--hidden-size", "--layers", "--head-dim", "--state-size")),
        )
        for flag in flags
    ),
    (train, "--minutes", "0", "argument --minutes: expected a number above 0, got '0'"),
    (train, "--learning-rate", "nan", "argument --learning-rate: expected a number above 0, got 'nan'"),
    (distributed, "--host", "0", "--host: expected a number from 0 to less than --hosts, with --coordinator"),
]


@pytest.mark.parametrize(("module", "flag", "value", "message"), FLAGS)
def test_a_wrong_flag(mistake, module, flag, value, message):
    assert message in mistake(module, *(["text", "folder"] if module is train else []), f"{flag}={value}")


@pytest.mark.parametrize("flag", ["--hidden-size", "--layers", "--batch", "--tokens"])
def test_a_wrong_flag_of_the_example_about_a_package(mistake, package_example, flag):
    assert "expected sizes of at least 1, and at least 2 tokens" in mistake(package_example, flag, "0")


def wrong_variable(monkeypatch):
    monkeypatch.setattr(config, "_process_config", None)
    monkeypatch.setenv("SSU_BRIDGE_BACKEND", "nope")


@pytest.mark.parametrize(
    "module", [demo, generate, benchmark, scheduler, share_state, torch_caller, distributed, train]
)
def test_a_wrong_variable(mistake, monkeypatch, module):
    wrong_variable(monkeypatch)
    said = mistake(module, *(["text", "folder"] if module is train else []))
    assert said.startswith("environment variable SSU_BRIDGE_BACKEND: backend: expected one of auto, ")


def test_a_wrong_variable_of_the_example_about_a_package(mistake, package_example, monkeypatch):
    wrong_variable(monkeypatch)
    assert "environment variable SSU_BRIDGE_BACKEND: " in mistake(package_example)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the backend runs here")
@pytest.mark.parametrize("module", [demo, generate, benchmark, scheduler, share_state, torch_caller])
def test_a_backend_that_cannot_run_here(mistake, monkeypatch, tmp_path, module):
    # Of a size that no other test's is: what was compiled for another backend would run.
    small = Mamba2Config(256, 48, 1, num_heads=6, head_dim=16, state_size=8)
    monkeypatch.setitem(benchmark.SIZES, "mamba2-130m", small)
    checkpoint.save(tmp_path, small, random_weights(small, jax.random.key(0)), "float32")
    monkeypatch.setattr(module, "KJV", tmp_path, raising=False)
    assert mistake(module, "--mamba-backend", "triton").startswith("backend triton: ")
