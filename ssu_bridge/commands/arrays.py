"""The frameworks and devices of this machine, and arrays of cases on them."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np

from ssu_bridge.frontends.base import frontend
from ssu_bridge.testing.cases import Case, arguments


def frameworks() -> list[str]:
    """Return those that are installed."""
    return [name for name in ("numpy", "torch", "jax") if importlib.util.find_spec(name)]


def devices(framework: str) -> Iterator[tuple[str, Any]]:
    """Yield the devices of a framework, each with an array on it that says where other arrays go."""
    side = frontend(framework)
    if framework == "jax":
        import jax

        for device in dict.fromkeys((jax.devices()[0], jax.devices("cpu")[0])):
            yield str(device), jax.device_put(np.zeros(1, np.float32), device)
        return
    yield "cpu", side.from_host(np.zeros(1, np.float32))
    if framework == "torch":
        import torch

        if torch.cuda.is_available():
            yield torch.cuda.get_device_name(), torch.zeros(1, device="cuda")


def on(framework: str, like: Any, case: Case) -> dict[str, Any]:
    """Return a case's arguments as arrays of a framework, on the device of an array of it."""
    side = frontend(framework)
    return arguments(case.arrays(seed=0), framework, lambda array: side.from_host(array, like), case.window)
