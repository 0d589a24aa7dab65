"""What a wheel of the package holds."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_wheel_has_every_module_and_no_native_source(tmp_path):
    # Without the native build, which would take a minute.
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--config-settings=wheel.cmake=false"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", tmp_path, ROOT], check=True)
    [wheel] = tmp_path.iterdir()
    files = {file for file in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in file}
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "ssu_bridge").rglob("*") if path.is_file()}
    unshipped = {file for file in package if file.endswith((".cc", ".h", ".pyc", ".so"))}
    assert files == package - unshipped
