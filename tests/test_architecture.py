"""The architecture: which modules import which, and what importing the package costs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ssu_bridge

PACKAGE = Path(ssu_bridge.__file__).parent

# Top-level modules and packages, the highest first: each may import those of the lines below its own, and of its own line.
LAYERS = [
    {"__main__"},
    {"commands"},
    {"bench"},
    {"__init__"},
    {"cases", "compat", "testing"},
    {"api", "dlpack", "export", "replay"},
    {"frontends"},
    {"dispatch"},
    {"backends"},
    {"core", "native"},
    {"config"},
    {"errors", "progress"},
]
# The same inside core: the table of arguments knows nothing of the description, and that nothing of the checks.
CORE = [
    {"validate"},
    {"replay_rules"},
    {"shapes"},
    {"aliasing", "slots"},
    {"problem"},
    {"quantized"},
    {"replay"},
    {"arguments", "arrays"},
    {"rounding"},
    {"bounded"},
]


def modules():
    """Yield every file with the layer that it belongs to."""
    for path in PACKAGE.rglob("*.py"):
        yield path, path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path):
    """Yield the dotted name of every ssu_bridge module that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if (PACKAGE.parent / name.replace(".", "/")).with_suffix(".py").exists() else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def layer(layers, name):
    found = [i for i, names in enumerate(layers) if name in names]
    assert found, f"{name} has no place in {layers}"
    return found[0]


def upwards(layers, prefix, files):
    """Return the imports of files, which are (path, own layer), that run upwards among the modules below a prefix."""
    found = []
    for path, own in files:
        for name in imported_modules(path):
            if name == prefix or name.startswith(f"{prefix}."):
                imported = name.removeprefix(prefix).lstrip(".").partition(".")[0] or "__init__"
                if (PACKAGE.parent / prefix.replace(".", "/") / f"{imported}.py").exists() or (
                    PACKAGE.parent / prefix.replace(".", "/") / imported
                ).is_dir():
                    if layer(layers, imported) < layer(layers, own):
                        found.append(f"{path.relative_to(PACKAGE)} imports {name}")
                elif layer(layers, "__init__") < layer(layers, own):  # a name of the package's own
                    found.append(f"{path.relative_to(PACKAGE)} imports {name}")
    return found


def test_imports_run_downwards():
    assert upwards(LAYERS, "ssu_bridge", modules()) == []


def test_imports_run_downwards_in_core():
    files = [(path, path.stem) for path in (PACKAGE / "core").glob("*.py") if path.stem != "__init__"]
    assert upwards(CORE, "ssu_bridge.core", files) == []


def test_backends_do_not_know_each_other():
    shared = {"base", "measured", "rows"}
    for path in (PACKAGE / "backends").rglob("*.py"):
        own = path.relative_to(PACKAGE / "backends").parts[0].removesuffix(".py")
        names = {name.split(".")[2] for name in imported_modules(path) if name.startswith("ssu_bridge.backends.")}
        assert names <= {own, *shared}, path


def test_no_private_jax_modules():
    for path, _ in modules():
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


def is_unbounded(node):
    """Say whether a statement makes a cache without a bound: functools.cache, or a table of the module's."""
    if isinstance(node, ast.FunctionDef):
        caches = {"functools.cache", "cache", "functools.lru_cache(maxsize=None)", "lru_cache(maxsize=None)"}
        return any(ast.unparse(decorator) in caches for decorator in node.decorator_list)
    empty = isinstance(node, ast.AnnAssign) and node.value is not None and ast.unparse(node.value)
    return empty in ("{}", "[]", "set()", "dict()", "list()")


def test_every_cache_has_a_bound_or_a_reason():
    unexplained = []
    for path, _ in modules():
        text = path.read_text()
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if is_unbounded(node):
                first = node.decorator_list[0].lineno if isinstance(node, ast.FunctionDef) else node.lineno
                if not lines[first - 2].startswith("#"):
                    unexplained.append(f"{path.name}:{first}")
    assert unexplained == []
