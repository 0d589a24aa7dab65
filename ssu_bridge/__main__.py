"""``python -m ssu_bridge info | check | bench``."""

import argparse
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Iterator
from typing import Any

from ssu_bridge import BackendNotAvailableError, UnsupportedError, check, explain
from ssu_bridge.dispatch import BACKENDS
from ssu_bridge.frontends.base import frontend
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
    parser = argparse.ArgumentParser(prog="python -m ssu_bridge", description="selective_state_update, bridged")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, and what each backend says")
    checking = commands.add_parser("check", help="run all cases on all backends against the float64 reference")
    checking.add_argument("--case", help="only cases with this in their name")
    checking.add_argument("--backend", choices=[*BACKENDS], help="only this backend")
    checking.add_argument("-v", "--verbose", action="store_true", help="print every report")
    more = "The GPU benchmark has flags of its own: python -m ssu_bridge.bench.cuda --help"
    bench = commands.add_parser("bench", help="measure", epilog=more)
    bench.add_argument("--device", choices=["cpu", "cuda"], help="cpu, unless flags of the GPU benchmark are given")
    arguments, rest = parser.parse_known_args(argv)
    if rest and (arguments.command != "bench" or arguments.device == "cpu"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.command == "info":
        return _info()
    if arguments.command == "check":
        return _check(arguments.case, arguments.backend, arguments.verbose)
    return _bench(arguments.device or ("cuda" if rest else "cpu"), rest)


def _bench(device: str, flags: list[str]) -> int:
    if device == "cpu":
        from ssu_bridge.bench.cpu import steps

        steps.main()
    else:
        from ssu_bridge.bench.cuda import command

        command.main(flags)
    return 0


def _frameworks() -> list[str]:
    return [name for name in ("numpy", "torch", "jax") if importlib.util.find_spec(name)]


def _devices(framework: str) -> Iterator[tuple[str, Any]]:
    """Yield the devices of a framework, with an array on each for others to be put beside."""
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
    print("\nWho runs a plain Mamba-2 step:")
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
    passed = failed = 0
    refused: dict[str, int] = {}
    for framework in _frameworks():
        for device, like in _devices(framework):
            for name in backends:
                for number, case in enumerate(cases, 1):
                    _show_progress(f"{framework} on {device}, {name}: {number}/{len(cases)} {case.name}")
                    try:
                        report = _check_case(framework, like, case, name)
                    except (UnsupportedError, BackendNotAvailableError) as refusal:
                        refused[str(refusal)] = refused.get(str(refusal), 0) + 1
                        continue
                    passed, failed = passed + report.passed, failed + (not report.passed)
                    if verbose or not report.passed:
                        print(f"{framework} on {device}, {case.name}: {report}")
    _show_progress("")
    print(f"{passed} passed, {failed} failed")
    for reason, count in refused.items():
        print(f"  not to be run there, {count} times: {reason}")
    return 1 if failed or not passed else 0


def _show_progress(line: str) -> None:
    """Overwrite the terminal's last line; say nothing to a file or a pipe."""
    if sys.stderr.isatty():
        print(f"\r{line:<100}\r", end="", file=sys.stderr, flush=True)


def _check_case(framework: str, like: Any, case: Case, backend: str) -> Any:
    if framework != "jax":
        return check(**_on(framework, like, case), **case.flags, backend=backend)
    import jax

    with jax.enable_x64(True):  # some cases have int64 indices, which JAX would narrow
        return check(**_on(framework, like, case), **case.flags, backend=backend)


if __name__ == "__main__":
    sys.exit(main())
