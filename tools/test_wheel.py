"""Install a wheel in fresh environments of several Pythons, without a compiler, and run a step with each framework.

python tools/test_wheel.py dist --python python3.11 --python python3.12 --framework numpy --framework jax
"""

import argparse
import contextlib
import os
import re
import subprocess
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

REQUIREMENTS = {"numpy": (), "jax": ("jax", "jax-tvm-ffi"), "torch": ("torch",)}
# Nothing else than the package and the framework is there.
SMOKE = """
import sys
import numpy as np
import ssu_bridge
from ssu_bridge.cases import CASES
from ssu_bridge.frontends.base import frontend
from ssu_bridge.testing.cases import arguments

framework, others = sys.argv[1], {"jax", "torch"} - {sys.argv[1]}
side = frontend(framework)
for case in CASES[:4]:
    given = arguments(case.arrays(seed=0), framework, side.from_host)
    report = ssu_bridge.check(**given, **case.flags)
    assert report.passed, report
    assert report.backend == "cpu", report
assert not others & set(sys.modules)
isa = ssu_bridge.native.library().cpu_isa()
assert (isa != "portable") == (" avx2 " in open("/proc/cpuinfo").read()), isa
print(f"  {framework}: {isa}")
"""


def require_plain(wheel: Path) -> None:
    """Check that one wheel fits all Pythons, and that it links neither CUDA nor Python."""
    assert "-py3-none-manylinux_" in wheel.name, wheel.name
    with zipfile.ZipFile(wheel) as files, tempfile.TemporaryDirectory() as folder:
        (library,) = (name for name in files.namelist() if ".so" in name)
        shown = subprocess.run(
            ["readelf", "--dynamic", files.extract(library, folder)], capture_output=True, text=True, check=True
        ).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", shown))
    plain = {
        "libc.so.6",
        "libm.so.6",
        "libgcc_s.so.1",
        "libstdc++.so.6",
        "libpthread.so.0",
        "libdl.so.2",
        "libtvm_ffi.so",
    }
    loaders = {name for name in needed if name.startswith("ld-linux")}
    assert needed <= plain | loaders, needed


@contextlib.contextmanager
def fresh(python: str, *requirements: str | Path) -> Iterator[Callable[..., None]]:
    """Make an environment that has these requirements only; give a function that runs its Python with arguments.

    Nothing but that environment is on its path, and so no compiler.
    """
    with tempfile.TemporaryDirectory() as home:
        subprocess.run([python, "-m", "venv", home], check=True)
        own = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": ""}
        alone = {name: value for name, value in own.items() if name not in ("CC", "CXX")} | {"PATH": f"{home}/bin"}

        def run(*arguments: str | Path, folder: str | Path | None = None) -> None:
            # What runs in a folder of its own is an example, and may compile, as torch.compile does.
            environment = own if folder else alone
            subprocess.run([f"{home}/bin/python", *arguments], env=environment, cwd=folder or home, check=True)

        run("-m", "pip", "install", "--quiet", "--only-binary=:all:", *requirements)
        yield run


def check(wheel: Path, python: str, framework: str, requirements: tuple[str, ...]) -> None:
    """Install the wheel and a framework in a fresh environment, and run steps there."""
    with fresh(python, wheel, *requirements) as run:
        run("-c", SMOKE, framework)
        run("-m", "ssu_bridge", "--version")


def main() -> None:
    """Check the one wheel of a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", action="append", required=True)
    parser.add_argument("--framework", action="append", choices=REQUIREMENTS, required=True)
    parser.add_argument("--require", action="append", default=[], help="a version of a framework, as in torch==2.13.0")
    arguments = parser.parse_args()
    (wheel,) = (path.resolve() for path in arguments.folder.glob("*.whl"))
    print(wheel.name)
    require_plain(wheel)
    for python in arguments.python:
        print(python, flush=True)
        for framework in arguments.framework:
            pinned = {requirement.partition("==")[0]: requirement for requirement in arguments.require}
            check(wheel, python, framework, tuple(pinned.get(name, name) for name in REQUIREMENTS[framework]))


if __name__ == "__main__":
    main()
