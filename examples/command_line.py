"""What the commands of the examples share: a user's mistake ends in one line and status 2."""

import argparse
import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import ssu_bridge


@contextlib.contextmanager
def mistakes_in_one_line(parser: argparse.ArgumentParser) -> Iterator[None]:
    """End the command in one line if a flag, a file or a variable is wrong, or what was selected is not available."""
    try:
        ssu_bridge.get_config()  # which reads variables of the environment
        yield
    except (ValueError, OSError, ImportError, ssu_bridge.UnsupportedError) as error:
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(error).split())}\n")


def positive(text: str) -> int:
    """Return the number of a flag that counts something: a type of argparse's."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def positive_number(text: str) -> float:
    """Return the number of a flag that measures something: a type of argparse's."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def new_file(text: str) -> Path:
    """Return the path of a file that will be written, which is known to be possible: a type of argparse's."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"expected a file in a folder that can be written, got {text!r}")
    return path
