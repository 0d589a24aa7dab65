"""Build two revisions side by side, run the benchmark of the CPU in turn and print how long they take, as ratios."""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from ssu_bridge.bench.figures import Figures

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "compare"


def run(*command: object, **options: object) -> str:
    """Run a command and return what it prints; its errors go where ours do."""
    text = [str(word) for word in command]
    return subprocess.run(text, check=True, stdout=subprocess.PIPE, text=True, **options).stdout  # type: ignore[call-overload]


def built(revision: str) -> Path:
    """Return the Python of an environment that has a revision installed, and all else from this one."""
    commit = run("git", "rev-parse", "--short", f"{revision}^{{commit}}", cwd=ROOT).strip()
    environment = FOLDER / commit
    python = environment / "bin" / "python"
    if (environment / "built").exists():
        return python
    run(sys.executable, "-m", "venv", "--without-pip", "--clear", environment)
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # A path that a .pth file adds is searched for packages, but its own .pth files, such as an editable install's, are
    # not read.
    others = [path for path in sys.path if path.endswith("site-packages")]
    Path(packages, "outer.pth").write_text("\n".join(others) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        run("git", "archive", "--output", f"{folder}/tree.tar", commit, cwd=ROOT)
        shutil.unpack_archive(f"{folder}/tree.tar", tree)
        pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--ignore-installed")
        run(*pip, "--no-build-isolation", "--no-deps", f"--config-settings=build-dir={folder}/native", tree)
    (environment / "built").touch()
    return python


def measured(python: Path) -> dict[tuple[str, str, int], float]:
    """Return the microseconds of each point of the benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder, "figures.csv")
        run(python, "-m", "ssu_bridge", "bench", "--device", "cpu", "--save", figures, cwd=folder, env=environment())
        return {(point.panel, point.curve, point.at): point.microseconds for point in Figures.read(figures).points}


def environment() -> dict[str, str]:
    """Return the variables of this process but those that would make Python find another package."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", help="the revision to compare with")
    parser.add_argument(
        "head", nargs="?", default="HEAD", help="the revision that is compared; what is not committed is not in it"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of one run each")
    options = parser.parse_args()
    pythons = [built(options.base), built(options.head)]
    for python, revision in zip(pythons, (options.base, options.head), strict=True):
        where = run(
            python, "-c", "import ssu_bridge; print(ssu_bridge.__file__)", cwd=FOLDER, env=environment()
        ).strip()
        assert where.startswith(str(python.parents[1])), (revision, where)
    rounds = []
    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
        order = pythons if number % 2 == 0 else pythons[::-1]  # what warms up or slows down is not always the same one
        times = {python: measured(python) for python in order}
        rounds.append([times[python] for python in pythons])
    print(f"{options.head} over {options.base}: the median of {options.rounds} rounds, and their spread")
    for point in rounds[0][0]:
        if not all(point in times for pair in rounds for times in pair):
            continue
        ratios = [head[point] / base[point] for base, head in rounds]
        base = statistics.median(base[point] for base, _ in rounds)
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{statistics.median(ratios):6.2f}  ({spread})  {base:10.1f} us  {', '.join(map(str, point))}")


if __name__ == "__main__":
    main()
