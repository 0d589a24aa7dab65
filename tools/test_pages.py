"""Run the code and the example commands of README.md and docs/ in fresh environments with no more than a page names.

python tools/test_pages.py dist            # dist holds a wheel
python tools/test_pages.py dist README.md  # the code of one page
"""

import argparse
import ast
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from test_wheel import fresh

ROOT = Path(__file__).parents[1]


def imports(block: str) -> set[str]:
    """Return the packages that a block imports."""
    nodes = list(ast.walk(ast.parse(block)))
    names = [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {name.partition(".")[0] for name in names}


def requirements(page: str, block: str, wheel: Path) -> tuple[str, ...]:
    """Return what is installed for a block: extras for its frameworks, and the packages of the page's first command."""
    extras = imports(block) & {"jax", "torch"}
    command = re.search(r"pip install ([^`#\n]*)", page)
    packages = shlex.split(command[1]) if command else []
    return f"{wheel}[{','.join(sorted(extras))}]" if extras else str(wheel), *(p for p in packages if p[0] != ".")


def commands(page: str) -> list[list[str]]:
    """Return what a page runs in the folder of the examples; not what needs a checkpoint of the reader's."""
    blocks = re.findall(r"^    cd examples\n((?:    .*\n)+)", page, re.MULTILINE)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [words[1:] for words in lines if words[:1] == ["python"] and "FOLDER" not in words]


def example_requirements(page: str, wheel: Path) -> tuple[str, ...]:
    """Return what docs/reference/commands.md says that the examples need, and the page's other packages."""
    named = re.findall(r"pip install ([^`#\n]*)", page)
    packages = dict.fromkeys(p for command in named for p in shlex.split(command) if p[0] != ".")
    return f"{wheel}[jax,torch,examples]", *packages


def main() -> None:
    """Run all of it, what has the same requirements in one environment, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("pages", type=Path, nargs="*")
    parser.add_argument("--python", default=sys.executable)
    arguments = parser.parse_args()
    (wheel,) = (path.resolve() for path in arguments.folder.glob("*.whl"))
    blocks: dict[tuple[str, ...], list[tuple[str, list[str], bool]]] = defaultdict(list)
    for page in arguments.pages or [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = page.read_text()
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL)):
            needed = requirements(text, block, wheel)
            blocks[needed].append((f"{page.name}-{number}", ["-W", "error", "-c", block], False))
        if page.name != "benchmarks.md":  # hours, and models of billions of weights
            for command in commands(text):
                blocks[example_requirements(text, wheel)].append((f"{page.name}: {shlex.join(command)}", command, True))
    failed = []
    for needed, own in blocks.items():
        print(*(word.rpartition("/")[2] for word in needed), flush=True)
        with fresh(arguments.python, *needed) as run, tempfile.TemporaryDirectory() as folder:
            examples = shutil.copytree(ROOT / "examples", Path(folder) / "examples")  # some commands write files there
            for name, command, is_example in own:
                print(f"  {name}", flush=True)
                try:
                    run(*command, folder=examples if is_example else None)
                except subprocess.CalledProcessError:
                    failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
