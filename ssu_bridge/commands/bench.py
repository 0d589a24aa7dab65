"""``bench``: measures, keeps, reads and draws figures."""

import argparse
import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ssu_bridge.bench.figures import Figures


def wrong_files(arguments: argparse.Namespace) -> str | None:
    """Return what is wrong with the files of a command line, before anything is measured; or None."""
    if arguments.read and not arguments.plot:
        return "--read: expected --plot with it, which says where the picture goes"
    for flag in ("save", "plot"):
        path: Path | None = getattr(arguments, flag)
        if path and (path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK)):
            return f"--{flag}: expected a file in a folder that can be written, got {path}"
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        return "--plot: plotting needs matplotlib: pip install matplotlib"
    return None


def main(arguments: argparse.Namespace, flags: Sequence[str]) -> int:
    """Run the benchmark of the device, with flags of its own, or read figures.

    Raises:
        OSError, ValueError: the file to read is missing, or is none of this kind.
    """
    if arguments.read:
        Figures.read(arguments.read).draw(arguments.plot)
        return 0
    # People read the tables as they come; a program gets nothing else on stdout.
    with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
        figures, as_json = _measured(arguments.device == "cuda" or bool(flags), flags)
    if figures is None and (arguments.save or arguments.plot):
        print("this part of the benchmark has no times over the batch: nothing to save or plot", file=sys.stderr)
        return 1
    if arguments.json:
        print(as_json)
    if figures and arguments.save:
        figures.save(arguments.save)
    if figures and arguments.plot:
        figures.draw(arguments.plot)
    return 0


def _measured(on_gpu: bool, flags: Sequence[str]) -> tuple[Figures | None, str]:
    if on_gpu:
        from ssu_bridge.bench.cuda import command

        figures = command.main([*flags])
        return figures, json.dumps({"figures": figures and figures.as_dict()}, indent=2)
    from ssu_bridge.bench.cpu import report

    results = report.main()
    return results.figures, results.as_json()
