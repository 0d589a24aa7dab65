"""What a wheel of the package holds."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_a_wheel_has_every_module_and_no_native_source(tmp_path):
    pytest.importorskip("scikit_build_core", reason="the environment has no build tools")
    # Without the native build, which would take a minute.
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--config-settings=wheel.cmake=false"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", tmp_path, ROOT], check=True)
    [wheel] = tmp_path.iterdir()
    files = {file for file in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in file}
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "ssu_bridge").rglob("*") if path.is_file()}
    unshipped = {file for file in package if file.endswith((".cc", ".h", ".pyc", ".so"))}
    assert files == package - unshipped


def test_the_oldest_versions_are_those_that_are_allowed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *(project["optional-dependencies"][name] for name in ("jax", "cuda"))]
    allowed = dict(requirement.split(">=") for group in groups for requirement in group)
    pinned = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "requirements-oldest.txt").read_text(), re.MULTILINE))
    assert pinned.pop("torch")  # whichever there is a CPU build of
    assert pinned.pop("jaxlib") == allowed["jax"]
    assert {name: re.sub(r"(\.0)+$", "", version) for name, version in pinned.items()} == {
        name: re.sub(r"(\.0)+$", "", version) for name, version in allowed.items()
    }


@pytest.mark.parametrize("system", ["Darwin", "Windows"])
def test_other_systems_are_told_what_is_supported(tmp_path, system):
    command = ["cmake", f"-DCMAKE_SYSTEM_NAME={system}", "-S", ROOT, "-B", tmp_path]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode != 0
    assert "supported is Linux on x86_64 and aarch64" in shown.stderr
    assert f"this is {system}" in " ".join(shown.stderr.split())
