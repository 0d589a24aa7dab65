"""``info``: versions, devices, and the answer of each backend for a plain step."""

import importlib.metadata
import json
import platform
from typing import Any

from ssu_bridge import explain
from ssu_bridge.commands.arrays import devices, frameworks, on
from ssu_bridge.dispatch import BACKENDS
from ssu_bridge.native import library
from ssu_bridge.testing.cases import CASES

_PACKAGES = (
    "ssu-bridge",
    "numpy",
    "jax",
    "jaxlib",
    "jax-tvm-ffi",
    "torch",
    "triton",
    "flashinfer-python",
    "apache-tvm-ffi",
)


def main(*, as_json: bool) -> int:
    """Print it, for people or as JSON."""
    found = _found()
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    print(f"Python {found['python']} on {found['platform']}")
    for package, version in found["packages"].items():
        print(f"  {package:<18}{version or 'not installed'}")
    cpu = found["cpu"]
    print(f"  cpu kernel        {cpu['isa']} of {', '.join(cpu['isas'])}; {cpu['threads']} threads")
    print("\nBackends that support a plain Mamba-2 step:")
    for place in found["devices"]:
        print(f"  {place['framework']} arrays on {place['device']}")
        for backend, refusal in place["refusals"].items():
            print(f"    {backend:<12}{refusal or 'yes'}")
    return 0


def _found() -> dict[str, Any]:
    native = library()
    cpu = {"isa": native.cpu_isa(), "isas": list(native.cpu_isas()), "threads": native.cpu_num_threads()}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: _version(package) for package in _PACKAGES},
        "cpu": cpu,
        "devices": [
            {"framework": framework, "device": device, "refusals": _refusals(on(framework, like, CASES[0]))}
            for framework in frameworks()
            for device, like in devices(framework)
        ],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _refusals(arrays: dict[str, Any]) -> dict[str, str | None]:
    choices = {str(name): explain(**arrays, **CASES[0].flags, backend=name).choices[0] for name in BACKENDS}
    return {name: choice.answers[0].refusal for name, choice in choices.items()}
