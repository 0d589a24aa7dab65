"""The shape of the house: who imports whom, and what importing it costs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ssu_bridge

PACKAGE = Path(ssu_bridge.__file__).parent

# Each room may import from the rooms of the lines below its own, and from its own line.
FLOORS = [
    {"__main__"},
    {"bench"},
    {"__init__"},
    {"check", "compare", "compat", "support"},
    {"exporting", "sharing", "update"},
    {"frontends"},
    {"choose"},
    {"backends"},
    {"kernels"},
    {"tables"},
    {"problem"},
    {"arrays", "config", "library", "cases"},
    {"errors", "rounding"},
]


def rooms():
    for path in PACKAGE.rglob("*.py"):
        yield path, path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path):
    """Yield the room of every ssu_bridge module that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module != "ssu_bridge" else [f"ssu_bridge.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "ssu_bridge":
                yield parts[1] if len(parts) > 1 and (PACKAGE / parts[1]).exists() else module_or_front_door(parts)


def module_or_front_door(parts):
    return parts[1] if len(parts) > 1 and (PACKAGE / f"{parts[1]}.py").exists() else "__init__"


def floor(room):
    found = [i for i, rooms_there in enumerate(FLOORS) if room in rooms_there]
    assert found, f"{room} has no place in FLOORS"
    return found[0]


def test_imports_run_downwards():
    upwards = [
        f"{path.relative_to(PACKAGE)} imports {room}"
        for path, own in rooms()
        for room in imported_rooms(path)
        if room != own and floor(room) <= floor(own) and room not in FLOORS[floor(own)]
    ]
    assert upwards == []


def test_backends_do_not_know_each_other():
    for path in (PACKAGE / "backends").glob("*.py"):
        names = {
            node.module
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ssu_bridge.backends.")
        }
        # Some have files of their own beside them.
        own = {name for name in names if name.split(".")[-1].startswith(f"{path.stem.split('_')[0]}_")}
        assert names - own <= {"ssu_bridge.backends.base", "ssu_bridge.backends.measurements"}, path


def test_no_private_jax_modules():
    for path, _ in rooms():
        assert not re.search(r"\b_src\b", path.read_text()), path


def run(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_importing_the_package_imports_no_framework():
    loaded = run("import sys, ssu_bridge; print(*sys.modules)")
    assert not {"jax", "torch", "tvm_ffi", "jax_tvm_ffi", "triton"} & set(loaded)
    assert not [name for name in loaded if name.startswith("ssu_bridge.compat")]
    assert "compat" not in ssu_bridge.__all__


HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hide())
from ssu_bridge.cases import CASES
import ssu_bridge, numpy as np
arrays = CASES[0].arrays(seed=0)
"""


@pytest.mark.parametrize(
    ("hidden", "call"),
    [
        (["torch"], "import jax.numpy as jnp; arrays = {n: jnp.array(a) for n, a in arrays.items()}"),
        (
            ["jax", "jaxlib", "jax_tvm_ffi"],
            "import torch; arrays = {n: torch.from_numpy(a) for n, a in arrays.items()}",
        ),
        (["jax", "jaxlib", "jax_tvm_ffi", "torch"], "pass"),
    ],
)
def test_one_framework_works_without_the_others(hidden, call):
    code = HIDE.format(hidden=hidden) + f"{call}\nprint(ssu_bridge.check(**arrays, backend='cpu').passed)"
    assert run(code) == ["True"]
