"""What all tests share: where the GPU tests are skipped, and what a test must not leave behind."""

import gc
import os
import zlib

import numpy as np
import pytest

from ssu_bridge import dispatch, get_config, set_config, using


def pytest_configure(config):
    """Set JAX up, but in the process that runs no tests itself: importing the frameworks takes it seconds."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        return
    import jax
    import torch

    if not torch.cuda.is_available():
        # The tests spend most of their time compiling programs that run once, and the kernels are not XLA's: programs
        # that are compiled in half the time, each in one piece, and run slower. The processes that tests start inherit
        # it. XLA ends a process over a flag that it does not know: later ones have but one way of fusing. The older one
        # of versions before 0.10.2 rounds twice on the way to float8.
        has_older_fusion = (0, 10, 2) <= jax.__version_info__ < (0, 11, 1)
        fusing = " --xla_cpu_use_fusion_emitters=false" if has_older_fusion else ""
        flags = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1" + fusing
        os.environ.setdefault("XLA_FLAGS", flags)
    # A second virtual one, for arrays that are not where the others are.
    jax.config.update("jax_num_cpu_devices", 8)
    # No test reads from which lines of Python an operation comes.
    jax.config.update("jax_traceback_in_locations_limit", 0)
    # Torch's own compiler would compile its headers first, and a program for each instruction set of the machine.
    os.environ.setdefault("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
    if hasattr(config, "cache"):  # not with -p no:cacheprovider
        _share_what_jax_compiles(str(config.cache.mkdir("jax")))


def _share_what_jax_compiles(folder):
    """Let all processes of a run, and those that tests start, share what JAX compiles; a later run finds it too."""
    import jax

    options = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in options.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


def pytest_collection_modifyitems(items):
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="gpu: this machine has no NVIDIA GPU"))


def pytest_collection_finish():
    """Take what is imported out of the garbage collector's sight: else it looks through all of it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_config_after():
    before = get_config()
    yield
    set_config(before)


@pytest.fixture(autouse=True)
def _own_choices():
    """Forget which backends were chosen: a test may have replaced what they refuse."""
    dispatch._chosen.cache_clear()
    yield
    dispatch._chosen.cache_clear()


@pytest.fixture(autouse=True)
def _on_one_device(request):
    """Put JAX's arrays on the CPU, where there is a GPU too, unless the test is about that; then on the first GPU."""
    import jax
    import torch

    if "gpu" in request.keywords:
        torch.cuda.set_device(0)  # JAX leaves the device of its last program the thread's current one
        yield
    else:
        with jax.default_device(jax.devices("cpu")[0]):
            yield


@pytest.fixture(params=["auto", "reference", pytest.param("triton", marks=pytest.mark.gpu)])
def each_drop_in_backend(request):
    """Drop-ins have no argument for a backend of ours; tensors that the test makes lie where that one runs."""
    import torch

    device = "cuda" if request.param == "triton" else "cpu"
    with using(backend=request.param), torch.device(device):
        yield


@pytest.fixture
def rng(request):
    """Random numbers of the test's own, the same in each run."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))
