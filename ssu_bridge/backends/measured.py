"""Tables of measurements: TOML files with a table for each GPU."""

import functools
import tomllib
from importlib import resources
from typing import Any


def measured(name: str, capability: tuple[int, int] | None, *keys: str) -> Any:
    """Return the table of a file for a compute capability: its own, else that of the next lower one, or the lowest.

    With ``keys``, return what that table has under them, one in the other; of a table that lacks it, the next one's.
    """
    tables = _tables(name)
    lower = sorted((c for c in tables if capability and c <= capability), reverse=True)
    for found in (tables[c] for c in (*lower, *sorted(tables))):
        for key in keys:
            found = found.get(key, {})
        if found or not keys:
            return found
    raise KeyError(f"{name}: {keys}")


# Unbounded: there are a few files.
@functools.cache
def _tables(name: str) -> dict[tuple[int, int], Any]:
    text = resources.files("ssu_bridge.backends").joinpath(f"{name}.toml").read_text()
    by_name = tomllib.loads(text).items()
    return {(int(name[2:-1]), int(name[-1])): table for name, table in by_name}
