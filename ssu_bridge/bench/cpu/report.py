"""The benchmark of the cpu backend, with those frameworks that are installed."""

import importlib.metadata
import importlib.util
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from ssu_bridge.bench.cpu import steps
from ssu_bridge.bench.figures import Figures
from ssu_bridge.bench.timing import Timing
from ssu_bridge.native import library
from ssu_bridge.progress import say
from ssu_bridge.testing.cases import Case

Rows = dict[str, Timing]


class Section(NamedTuple):
    """A table: its title, the framework that it needs or None, and what measures its rows."""

    title: str
    framework: str | None
    measure: Callable[[], Rows]


class Results(NamedTuple):
    """What was measured: a step over the batch, and the rows of each table by its title."""

    figures: Figures
    tables: dict[str, Rows]

    def as_json(self) -> str:
        """Return everything as JSON; times are in microseconds, in tables as median, lower and upper quartile."""
        tables = {
            title: {name: [round(seconds * 1e6, 3) for seconds in timing] for name, timing in rows.items()}
            for title, rows in self.tables.items()
        }
        return json.dumps({"figures": self.figures.as_dict(), "tables": tables}, indent=2)


def main() -> Results:
    """Run the whole benchmark and print its tables."""
    native = library()
    say(f"cpu backend: {native.cpu_isa()}, {native.cpu_num_threads()} threads; {_versions()}")
    say("times are medians with quartiles; the rows of a table were measured in turn, round after round\n")
    figures, tables = steps.measure(), {}
    for title, framework, measure in SECTIONS:
        if framework and importlib.util.find_spec(framework) is None:
            say(f"\n{title}: not measured; it needs {framework}: pip install {framework}")
            continue
        say(f"\n{title}")
        tables[title] = measure()
        for name, timing in tables[title].items():
            say(f"  {name:<54}{timing!s}")
    return Results(figures, tables)


def _versions() -> str:
    installed = [name for name in ("jax", "torch", "numpy") if importlib.util.find_spec(name)]
    return "; ".join(f"{name} {importlib.metadata.version(name)}" for name in installed)


def _tiny_arrays() -> dict[str, Any]:
    return Case("tiny", sequences=1, slots=1, nheads=2, headdim=4, dstate=8, ngroups=1, indices=(0,)).arrays(seed=0)


# Each imports the framework that it needs.


def _prompts() -> Rows:
    from ssu_bridge.bench.cpu import prompts

    return prompts.times()


def _jax_host() -> Rows:
    from ssu_bridge.bench.cpu import calls

    return calls.eager(_tiny_arrays())


def _torch_host() -> Rows:
    from ssu_bridge.bench.cpu import torch_calls

    return torch_calls.host(_tiny_arrays())


def _torch_turns() -> Rows:
    from ssu_bridge.bench.cpu import torch_calls

    return torch_calls.turns()


def _drop_ins() -> Rows:
    from ssu_bridge.bench.cpu import torch_calls

    return torch_calls.drop_in_times()


def _numpy() -> Rows:
    from ssu_bridge.bench.cpu import numpy_calls

    return numpy_calls.times(_tiny_arrays())


def _replay() -> Rows:
    from ssu_bridge.bench.cpu import replay

    return replay.times()


def _first_calls() -> Rows:
    from ssu_bridge.bench.cpu import calls

    return calls.first_calls(_tiny_arrays())


def _sharded() -> Rows:
    from ssu_bridge.bench.cpu import sharded

    return sharded.first_calls()


def _preparations() -> Rows:
    from ssu_bridge.bench.cpu import calls

    return calls.preparations(_tiny_arrays())


SECTIONS = (
    Section("a prompt of one sequence under jit, H 24, P 64, N 128, G 1, float32", "jax", _prompts),
    Section("host time of an eager JAX call, ten arrays, a tiny problem, state donated", "jax", _jax_host),
    Section("host time of an eager Torch call, eleven tensors, a tiny problem", "torch", _torch_host),
    Section("host time of 16 eager Torch calls, and the ratio to one problem's", "torch", _torch_turns),
    Section(
        "host time of an eager call of a drop-in, and the ratio to update's on the same tensors", "torch", _drop_ins
    ),
    Section("host time of calls with NumPy arrays, ten arrays, a tiny problem", None, _numpy),
    Section("a token of a ReplayState of NumPy arrays, window 16, batch 16, H 64, P 64, N 128, G 8", None, _replay),
    Section("time of first JAX calls, which trace and compile", "jax", _first_calls),
    Section("time of first JAX calls on a state that is sharded over four virtual devices", "jax", _sharded),
    Section("time to prepare an exported JAX program", "jax", _preparations),
)
