"""Triton compiles each kernel once for all these tests, whichever process runs them, and for those of a later run."""

import hashlib
import shutil
from pathlib import Path

import pytest

import ssu_bridge.backends.triton.kernels as kernels


@pytest.fixture(autouse=True, scope="session")
def _triton_cache(pytestconfig, tmp_path_factory):
    """Keep what is compiled of the kernels as they are; Triton looks at their text and at its own version, too."""
    kept = hasattr(pytestconfig, "cache")  # not with -p no:cacheprovider
    folder = pytestconfig.cache.mkdir("triton") if kept else tmp_path_factory.mktemp("triton")
    texts = (file.read_bytes() for file in sorted(Path(kernels.__file__).parent.glob("*.py")))
    current = folder / hashlib.sha256(b"".join(texts)).hexdigest()[:16]
    for other in folder.iterdir():
        if other != current:
            shutil.rmtree(other, ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(current))
        yield


class LaidOut(Exception):
    """Raised with a kernel's text when its arrays lie in registers: what follows takes as long again, and moves none."""


@pytest.fixture
def ttgir(monkeypatch):
    """Return a function that compiles a specialisation so far and returns the text."""
    from triton.backends.nvidia.compiler import CUDABackend

    from ssu_bridge.backends.triton.compile import compile_step

    def stop(self, module, *_):
        raise LaidOut(str(module))

    def text(specialisation):
        with pytest.raises(LaidOut) as stopped:
            compile_step(specialisation)
        return str(stopped.value)

    monkeypatch.setattr(CUDABackend, "make_llir", stop)
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    return text
