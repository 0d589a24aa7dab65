"""Tables of measurements: TOML files with a table for each GPU."""

import functools
import tomllib
from importlib import resources
from typing import Any


def measured(name: str, capability: tuple[int, int] | None) -> Any:
    """Return the table of a file for a compute capability: its own, else that of the next lower one, or the lowest."""
    tables = _tables(name)
    known = sorted(tables)
    return tables[max((c for c in known if capability and c <= capability), default=known[0])]


# Unbounded: there are a few files.
@functools.cache
def _tables(name: str) -> dict[tuple[int, int], Any]:
    text = resources.files("ssu_bridge.backends").joinpath(f"{name}.toml").read_text()
    by_name = tomllib.loads(text).items()
    return {(int(name[2:-1]), int(name[-1])): table for name, table in by_name}
