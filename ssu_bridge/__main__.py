"""``python -m ssu_bridge info | check | bench``."""

import argparse
import collections
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssu_bridge import BackendNotAvailableError, UnsupportedError, check, explain
from ssu_bridge.dispatch import BACKENDS
from ssu_bridge.frontends.base import frontend
from ssu_bridge.progress import progress, say
from ssu_bridge.testing.cases import CASES, Case, arguments

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


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the process's exit status."""
    parser = argparse.ArgumentParser(prog="python -m ssu_bridge", description="inspect, check and measure ssu_bridge")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, and what each backend says")
    checking = commands.add_parser("check", help="run all cases on all backends against the float64 reference")
    checking.add_argument("--case", help="only cases with this in their name")
    checking.add_argument("--backend", choices=[*BACKENDS], help="only this backend")
    checking.add_argument("-v", "--verbose", action="store_true", help="print every report")
    more = "The GPU benchmark has flags of its own: python -m ssu_bridge.bench.cuda --help"
    bench = commands.add_parser("bench", help="measure", epilog=more)
    bench.add_argument("--device", choices=["cpu", "cuda"], help="cpu, unless flags of the GPU benchmark are given")
    bench.add_argument("--save", type=Path, metavar="CSV", help="keep the times of a step over the batch")
    bench.add_argument("--plot", type=Path, metavar="PNG", help="draw them")
    bench.add_argument("--read", type=Path, metavar="CSV", help="draw recorded times instead of measuring")
    arguments, rest = parser.parse_known_args(argv)
    if rest and (arguments.command != "bench" or arguments.device == "cpu"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.command == "info":
        return _info()
    if arguments.command == "check":
        return _check(arguments.case, arguments.backend, arguments.verbose)
    if arguments.read and not arguments.plot:
        parser.error("--read: expected --plot with it, which says where the picture goes")
    return _bench(arguments, rest)


def _bench(arguments: argparse.Namespace, flags: list[str]) -> int:
    figures: Any
    if arguments.read:
        from ssu_bridge.bench.figures import Figures

        figures = Figures.read(arguments.read)
    elif arguments.device == "cuda" or flags:
        from ssu_bridge.bench.cuda import command

        figures = command.main(flags)
    else:
        from ssu_bridge.bench.cpu import steps

        figures = steps.main()
    if figures is None and (arguments.save or arguments.plot):
        print("this part of the benchmark has no times over the batch: nothing to save or plot", file=sys.stderr)
        return 1
    if arguments.save:
        figures.save(arguments.save)
    if arguments.plot:
        figures.draw(arguments.plot)
    return 0


def _frameworks() -> list[str]:
    return [name for name in ("numpy", "torch", "jax") if importlib.util.find_spec(name)]


def _devices(framework: str) -> Iterator[tuple[str, Any]]:
    """Yield the devices of a framework, each with an array on it that says where other arrays go."""
    import numpy as np

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


def _on(framework: str, like: Any, case: Case) -> dict[str, Any]:
    side = frontend(framework)
    return arguments(case.arrays(seed=0), framework, lambda array: side.from_host(array, like))


def _info() -> int:
    print(f"Python {platform.python_version()} on {platform.platform()}")
    for package in _PACKAGES:
        try:
            print(f"  {package:<18}{importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"  {package:<18}not installed")
    from ssu_bridge.native import library

    native = library()
    print(
        f"  cpu kernel        {native.cpu_isa()} of {', '.join(native.cpu_isas())}; {native.cpu_num_threads()} threads"
    )
    print("\nBackends that support a plain Mamba-2 step:")
    for framework in _frameworks():
        for device, like in _devices(framework):
            arrays = _on(framework, like, CASES[0])
            print(f"  {framework} arrays on {device}")
            for backend in BACKENDS:
                choice = explain(**arrays, **CASES[0].flags, backend=backend).choices[0]
                print(f"    {backend:<12}{choice.answers[0].refusal or 'yes'}")
    return 0


def _check(only: str | None, backend: str | None, verbose: bool) -> int:
    cases = [case for case in CASES if not only or only in case.name]
    backends = [name for name in BACKENDS if backend in (None, name)]
    runs = [
        (f"{framework} on {device}", framework, like, name, case)
        for framework in _frameworks()
        for device, like in _devices(framework)
        for name in backends
        for case in cases
    ]
    passed = failed = 0
    refused: collections.Counter[str] = collections.Counter()
    for where, framework, like, name, case in progress(runs, label=lambda run: f"{run[0]}, {run[3]}: {run[4].name}"):
        try:
            report = _check_case(framework, like, case, name)
        except (UnsupportedError, BackendNotAvailableError) as refusal:
            refused[str(refusal)] += 1
            continue
        passed, failed = passed + report.passed, failed + (not report.passed)
        if verbose or not report.passed:
            say(f"{where}, {case.name}: {report}")
    print(f"{passed} passed, {failed} failed")
    for reason, count in refused.items():
        print(f"  unsupported there, {count} times: {reason}")
    return 1 if failed or not passed else 0


def _check_case(framework: str, like: Any, case: Case, backend: str) -> Any:
    if framework != "jax":
        return check(**_on(framework, like, case), **case.flags, backend=backend)
    import jax

    with jax.enable_x64(True):  # some cases have int64 indices, which JAX would narrow
        return check(**_on(framework, like, case), **case.flags, backend=backend)


if __name__ == "__main__":
    sys.exit(main())
