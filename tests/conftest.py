"""What all tests share: where the GPU tests are skipped, and what a test must not leave behind."""

import pytest
import torch

from ssu_bridge import get_config, set_config


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="gpu: this machine has no NVIDIA GPU"))


@pytest.fixture(autouse=True)
def _same_config_after():
    before = get_config()
    yield
    set_config(before)
