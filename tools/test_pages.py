"""Run the code of README.md and docs/ in fresh environments, each with no more than its page names.

python tools/test_pages.py dist            # dist holds a wheel
python tools/test_pages.py dist README.md  # the code of one page
"""

import argparse
import ast
import re
import shlex
import subprocess
import sys
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


def main() -> None:
    """Run all blocks, those with the same requirements in one environment, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("pages", type=Path, nargs="*")
    parser.add_argument("--python", default=sys.executable)
    arguments = parser.parse_args()
    (wheel,) = (path.resolve() for path in arguments.folder.glob("*.whl"))
    blocks = defaultdict(list)
    for page in arguments.pages or [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = page.read_text()
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL)):
            blocks[requirements(text, block, wheel)].append((f"{page.name}-{number}", block))
    failed = []
    for needed, own in blocks.items():
        print(*(word.rpartition("/")[2] for word in needed), flush=True)
        with fresh(arguments.python, *needed) as run:
            for name, block in own:
                print(f"  {name}", flush=True)
                try:
                    run("-W", "error", "-c", block)
                except subprocess.CalledProcessError:
                    failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
