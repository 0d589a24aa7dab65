"""The command line of the GPU benchmark. It imports no framework, so that ``--help`` needs none."""

import argparse
import importlib.util
from pathlib import Path

from ssu_bridge.bench.figures import Figures

BATCHES = (1, 4, 16, 64, 256, 1024)
DTYPES = ("bfloat16", "float16", "float32")


def main(argv: list[str] | None = None) -> Figures | None:
    """Run the benchmark, or a part of it; with ``--tune`` measure the tiles and write their table.

    Returns:
        The times of a step over the batch or of a call over its tokens, if these were measured.
    """
    parser = argparse.ArgumentParser(prog="python -m ssu_bridge bench --device cuda")
    parser.add_argument("--tune", action="store_true", help="measure the tiles, print and write their table")
    parser.add_argument(
        "--tokens", action="store_true", help="measure calls of several tokens, quantised states, and prompts"
    )
    parser.add_argument("--prompts", action="store_true", help="measure the prompts of --tokens alone")
    parser.add_argument(
        "--replay", action="store_true", help="measure steps of a replay state, which write the state once in a while"
    )
    parser.add_argument(
        "--ssd",
        type=Path,
        metavar="FOLDER",
        help="with --tokens or --prompts: measure mamba_ssm's SSD, too, from a folder with its ssd_combined.py",
    )
    parser.add_argument("--devices", type=_positive, help="measure calls that are sharded over so many GPUs")
    parser.add_argument("--batches", type=_positive, nargs="+", default=BATCHES)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    arguments = parser.parse_args(argv)
    if arguments.ssd and not (arguments.tokens or arguments.prompts):
        parser.error("--ssd: expected with --tokens or --prompts")
    for package in ("torch", "jax", "triton"):
        if importlib.util.find_spec(package) is None:
            parser.error(f"the GPU benchmark needs {package}, which is not installed: pip install {package}")
    import torch

    if not torch.cuda.is_available():
        parser.error("expected an NVIDIA GPU and a build of Torch for it, found none")
    from ssu_bridge.bench.cuda import measure

    return measure.main(arguments)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)
