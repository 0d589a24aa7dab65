"""What it takes for FlashInfer to be there, and what is said while it compiles."""

import logging
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from flashinfer_calls import (
    CASE,
    TOKENS,
    draw,
    problem_of,
    quantized,
    sized,
    table,
    tokens,
)
from modes import to_mode

import ssu_bridge
from ssu_bridge import progress
from ssu_bridge.backends.flashinfer import backend as flashinfer
from ssu_bridge.backends.flashinfer import module

SOURCE = """
def _get_module({parameters}):
    return None

def _selective_state_update():
    get_selective_state_update_module().selective_state_update({arguments})
"""


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Install a FlashInfer of some version and signature, with or without nvcc, as far as is looked at."""

    def install(version="0.6.18.post1", arguments=module.ARGUMENTS, nvcc=True):
        package = tmp_path / "flashinfer" / "mamba"
        package.mkdir(parents=True)
        (tmp_path / "flashinfer" / "__init__.py").touch()
        parameters = ", ".join(module.Module._fields)
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


def test_a_folder_of_its_name_is_not_flashinfer(monkeypatch, tmp_path):
    (tmp_path / "flashinfer" / "mamba").mkdir(parents=True)
    monkeypatch.setattr("sys.path", [str(tmp_path)])  # alone: FlashInfer may be installed
    assert module.lacks_replay() is None
    assert flashinfer.missing("torch").startswith("FlashInfer is not installed: ")


def test_it_is_there(installed):
    installed()
    assert flashinfer.missing("torch") is None


def test_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert flashinfer.missing("torch") == "FlashInfer is not installed: pip install 'flashinfer-python>=0.6.11'"
    with pytest.raises(ssu_bridge.BackendNotAvailableError, match="pip install 'flashinfer-python"):
        ssu_bridge.update(**to_mode(CASE.arrays(seed=1), "torch"), backend="flashinfer")


def test_too_old(installed):
    installed("0.6.9")
    assert re.search(
        r"FlashInfer 0\.6\.9 is too old, known are 0\.6\.11 to .*: pip install 'flash", flashinfer.missing("torch")
    )


@pytest.mark.parametrize("arguments", [module.ARGUMENTS + ", more", "", "*everything"])
def test_another_signature(installed, arguments):
    installed("9.0.0", arguments)
    assert re.search(
        r"FlashInfer 9\.0\.0 calls its kernels in another way.*0\.6\.11 to 0\.7\.4", flashinfer.missing("torch")
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
        module.load(flashinfer._module(problem_of(CASE)))


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


def test_first_calls_of_threads_import_it_together(monkeypatch, tmp_path):
    """One imports a package, one a module of it, which need each other: Python calls that a deadlock."""
    package = tmp_path / "flashinfer_parts"
    package.mkdir()
    sources = {
        "__init__": "import flashinfer_parts.shared",
        "shared": "import time; time.sleep(0.5); import flashinfer_parts.step",
        "step": "import flashinfer_parts.shared",
    }
    for name, source in sources.items():
        (package / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, f"flashinfer_parts.{name}".removesuffix(".__init__"), raising=False)
    monkeypatch.syspath_prepend(tmp_path)

    def later(name):
        time.sleep(0.1)
        return module._imported(name)

    with ThreadPoolExecutor() as pool:
        first, second = pool.submit(module._imported, "flashinfer_parts"), pool.submit(later, "flashinfer_parts.step")
        assert first.result().step is second.result()


def test_it_is_asked_for_a_module(monkeypatch):
    entry = Entry(0)
    monkeypatch.setitem(sys.modules, ENTRY, entry)
    mixed = {"state": "float16", "x": "bfloat16", "B": "bfloat16", "C": "bfloat16", "z": "bfloat16"}
    call = draw(tokens(sized(dtypes=mixed, indices=table(), accepted=(1, 2, 3), seed=1)))
    assert module.load(flashinfer._module(problem_of(call))) == "the function"
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    assert entry.asked == [
        (half, brain, single, single, torch.int32, 64, 64, TOKENS, torch.int32, torch.int32, 9, None, 10)
    ]
    module.load(flashinfer._module(problem_of(quantized())))
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
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    monkeypatch.setattr(progress, "INTERVAL", 0.1)
    with caplog.at_level(logging.INFO, logger="ssu_bridge"):
        module.load(flashinfer._module(problem_of(CASE)))
    said = [record.getMessage() for record in caplog.records]
    assert [what.split(" FlashInfer")[0] for what in said] == (
        ["compiling", "compiling", "compiled"] if seconds else []
    )


def test_without_logging_it_is_said_on_stderr():
    code = "from ssu_bridge.progress import report; report('compiles')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "ssu_bridge: compiles\n"
    configured = f"import logging; logging.basicConfig(level='WARNING'); {code}"
    done = subprocess.run([sys.executable, "-c", configured], capture_output=True, text=True, check=True)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.6.18.post1", "rounds with its own random numbers, and to zero below 2**-14"),
        ("0.7.2.post1", "rounds with its own random numbers, and to zero below 2**-14"),
        ("0.7.4", "rounds with its own random numbers"),
        ("0.10.0", "rounds with its own random numbers"),
    ],
)
def test_explain_knows_how_a_version_rounds(installed, version, expected):
    installed(version)
    assert flashinfer.missing("torch") is None
    described = problem_of(sized(headdim=64, dstate=128, dtypes={"state": "float16"}, seed=5))
    assert flashinfer.settings(described).split("; ")[-1] == expected


@pytest.mark.parametrize("version", ["0.6.18.post1", "0.7.2", "0.7.4", "0.10.0"])
@pytest.mark.parametrize(
    ("headdim", "algorithm", "lacking"),
    [
        (64, "auto", None),
        (256, "horizontal", None),
        (80, "vertical", None),
        (32, "simple", None),
        (16, "auto", "it supports headdim from 32 to 256 in multiples of 16, and this is 16"),
        (272, "auto", "it supports headdim from 32 to 256 in multiples of 16, and this is 272"),
        (80, "horizontal", "its horizontal kernel supports headdim in multiples of 64, and this is 80"),
        (32, "vertical", "its vertical kernel supports headdim from 48 on, and this is 32"),
    ],
)
def test_headdims_depend_on_the_version(installed, version, headdim, algorithm, lacking):
    installed(version)
    if version in ("0.6.18.post1", "0.7.2") and headdim != 64:
        lacking = f"it supports headdim 64 or 128, and this is {headdim}"
    with ssu_bridge.using(algorithm=algorithm):
        assert flashinfer.refusal(problem_of(sized(headdim=headdim, dstate=128))) == lacking
