"""Progress of long runs on stderr: a bar on a terminal, a line every few seconds in a file or a pipe."""

import contextlib
import importlib.util
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")

# Seconds between two lines about a run, before a wait for a compilation is reported, and between two lines about it.
EVERY, PATIENCE, INTERVAL = 5.0, 3.0, 60.0

_log = logging.getLogger("ssu_bridge")


def progress(items: Sequence[Item], label: Callable[[Item], str] = str) -> Iterator[Item]:
    """Yield the items of a long run, and show how many are done.

    A terminal gets a bar if ``tqdm`` is installed; without it, and where stderr is no terminal, a line every
    few seconds.

    Args:
        items: the work, in order.
        label: names an item.
    """
    bar = sys.stderr.isatty() and importlib.util.find_spec("tqdm")
    yield from (_bar if bar else _lines)(items, label)


def _lines(items: Sequence[Any], label: Callable[[Any], str]) -> Iterator[Any]:
    started, at = time.monotonic(), (0, "")

    def tell() -> None:
        number, name = at
        seconds = time.monotonic() - started
        print(f"{number} of {len(items)} done after {seconds:.0f} s; now: {name}", file=sys.stderr, flush=True)

    with _ticking(tell, EVERY):
        for number, item in enumerate(items):
            at = (number, label(item))
            yield item


@contextlib.contextmanager
def _ticking(tell: Callable[[], None], first: float, later: float | None = None) -> Iterator[None]:
    """Call a function after so many seconds in the block, and again and again, from a thread of its own."""
    finished = threading.Event()

    def watch() -> None:
        wait = first
        while not finished.wait(wait):
            tell()
            wait = later or first

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()


def _bar(items: Sequence[Any], label: Callable[[Any], str]) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(total=len(items), leave=False, dynamic_ncols=True) as bar:
        for item in items:
            bar.set_postfix_str(label(item))
            yield item
            bar.update()


def say(line: str = "") -> None:
    """Print a line to stdout, above the bar where there is one."""
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
    else:
        print(line, flush=True)


@contextlib.contextmanager
def compiling(what: str, expectation: str) -> Iterator[None]:
    """Report a compilation that takes longer than a few seconds: when it is noticed, every minute, and at its end.

    Args:
        what: what is compiled and by what, as in "FlashInfer's kernels with nvcc".
        expectation: how long it takes as a rule, and what is kept.
    """
    started, told = time.monotonic(), False

    def tell() -> None:
        nonlocal told
        seconds = f"{time.monotonic() - started:.0f} s so far"
        report(f"compiling {what} ({seconds if told else expectation})")
        told = True

    with _ticking(tell, PATIENCE, INTERVAL):
        yield
    if told:
        report(f"compiled {what} in {time.monotonic() - started:.0f} s")


def report(message: str) -> None:
    """Log a message at level INFO; where logging is not configured, print it to stderr."""
    if _log.hasHandlers():
        _log.info(message)
    else:
        print(f"ssu_bridge: {message}", file=sys.stderr, flush=True)
