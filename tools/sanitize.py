"""Build the native part with sanitizers into build/ and run the fuzz on it: ``make sanitize``."""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The C library lets another thread free the memory of one that has ended, in a way that ThreadSanitizer does not see.
SUPPRESSED = "race:_dl_deallocate_tls\n"
FOLDER = ROOT / "build" / "sanitize"
TSAN = f"halt_on_error=1:exitcode=66:suppressions={FOLDER / 'suppressed.txt'}"
# What each build is called, is compiled with, and is loaded with; its variables.
BUILDS = {
    "address": ("address,undefined", "libasan.so", {"ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1"}),
    "thread": ("thread", "libtsan.so", {"TSAN_OPTIONS": f"{TSAN}:report_signal_unsafe=0:die_after_fork=0"}),
}
# Eight threads call at once, and a process that they fork: the fuzz has one thread that calls.
CALLERS = ["tests/native/test_native_threads.py", "-k", "callers"]
# What loads the library in the process that the sanitizer watches, and says which one it is.
LOADED = "from ssu_bridge.native import library; library(); print(open('/proc/self/maps').read())"


def build(site: Path, sanitizers: str) -> None:
    """Build the package into a folder of its own."""
    shutil.rmtree(site, ignore_errors=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        "--target",
        str(site),
    ]
    settings = [f"build-dir={site.parent / 'native'}", f"cmake.define.SSU_BRIDGE_SANITIZE={sanitizers}"]
    subprocess.run([*pip, *(f"--config-settings={setting}" for setting in settings), "."], cwd=ROOT, check=True)


def environment(site: Path, runtime: str, options: dict[str, str]) -> dict[str, str]:
    """Return the variables under which Python loads a build's library, and the sanitizer's runtime before all else."""
    # With the C++ library, whose exceptions a sanitizer that is loaded before it does not find.
    found = [_path_of(library) for library in (runtime, "libstdc++.so.6")]
    path = os.pathsep.join([str(site), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    more = {
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "SSU_BRIDGE_NUM_THREADS": "4",
        "JAX_PLATFORMS": "cpu",
    }
    return os.environ | more | options | {"PYTHONPATH": path, "LD_PRELOAD": " ".join(found)}


def _path_of(library: str) -> str:
    command = [os.environ.get("CXX", "g++"), f"-print-file-name={library}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).is_file():
        raise SystemExit(f"{library}: {command[0]} has none; GCC and its sanitizer libraries are needed")
    return found


def main() -> int:
    """Build, make sure that the built library is the one that is loaded, and run the fuzz; return its status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("build", choices=BUILDS, help="address: AddressSanitizer and UBSan; thread: ThreadSanitizer")
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--built", action="store_true", help="run what was built before")
    parser.add_argument("--traced", type=int, default=0, help="one call in so many is traced by JAX; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sanitizers, runtime, variables = BUILDS[options.build]
    site = FOLDER / options.build / "site"
    if not options.built:
        build(site, sanitizers)
    (FOLDER / "suppressed.txt").write_text(SUPPRESSED)
    watched = environment(site, runtime, variables)
    # ThreadSanitizer needs its addresses where they are without randomisation.
    python = ["setarch", "-R", sys.executable] if options.build == "thread" else [sys.executable]
    loaded = subprocess.run([*python, "-c", LOADED], env=watched, capture_output=True, text=True)
    if str(site) not in loaded.stdout or runtime.removesuffix(".so") not in loaded.stdout:
        print(f"{site}: the library that was built there is not the one that is loaded\n{loaded.stderr}")
        return 1
    numbers = ["--calls", options.calls, "--traced", options.traced, "--seed", options.seed]
    # Sequences that meet race, by definition.
    numbers += ["--apart"] if options.build == "thread" else []
    commands = [["fuzz", *map(str, numbers)]]
    if options.build == "thread":
        commands.append(["pytest", "--quiet", "--noconftest", "-p", "no:cacheprovider", *CALLERS])
    statuses = (subprocess.run([*python, "-m", *command], env=watched, cwd=ROOT).returncode for command in commands)
    return next(filter(None, statuses), 0)


if __name__ == "__main__":
    sys.exit(main())
