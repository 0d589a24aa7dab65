"""Triton compiles each kernel once for all these tests."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def _triton_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield
