"""Kernels of Triton compiled on a machine without a GPU, and what their code says."""

import dataclasses
import re
import subprocess
import tempfile
from pathlib import Path

import pytest

from ssu_bridge import using
from ssu_bridge.api import explain
from ssu_bridge.core.arguments import FLOATS, WRITTEN
from ssu_bridge.testing.cases import arguments

triton = pytest.importorskip("triton")
from ssu_bridge.backends.triton import forms, tiles  # noqa: E402
from ssu_bridge.backends.triton.compile import compile_step  # noqa: E402
from ssu_bridge.backends.triton.specialisation import specialise  # noqa: E402

ROOT = Path(__file__).parents[2]
CAPABILITIES = ((8, 0), (9, 0), (10, 0), (12, 0))
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def problem_of(case, capability=(9, 0), **flags):
    """Return the problem of a case, as if its arrays were on a GPU."""
    # Of many heads no more are drawn than there are groups, which takes less time.
    drawn = dataclasses.replace(case, nheads=case.ngroups) if case.nheads >= 64 else case
    given = arguments(drawn.arrays(seed=0), "numpy", lambda array: array, case.window)
    problem = explain(**given, **case.flags, **flags).choices[0].problem.on("cuda", capability)
    return problem if drawn is case else dataclasses.replace(problem, nheads=case.nheads)


def specialisation(case, capability=(9, 0), tile=None):
    with using(triton_tile=tile):
        problem = problem_of(case, capability)
    return specialise(problem, tile_of(problem))


def tile_of(problem):
    """The tile of one token after the other, where there is a choice."""
    return forms.tile(problem) if problem.replays else tiles.tile(problem)


def compiled(case, capability=(9, 0), tile=None):
    return compile_step(specialisation(case, capability, tile))


def values(specialisation):
    """Return the values of its fields, each array's apart: its dtype, and that it is tied, a table or a result."""
    fields = dataclasses.asdict(specialisation).items()
    return {(name, one) for name, value in fields for one in (value if isinstance(value, tuple) else [str(value)])}


SIZES = ("nheads", "headdim", "dstate", "ngroups", "pad_slot_id")
# Whether they are 0, 1 or more makes another computation, not how much.
NUMBERS = ("intermediate_stride", "window", "most_tokens")


def computed_values(specialisation):
    """Return the values that make another computation: not sizes, and not the float dtypes of what is only read."""
    return {
        (field, min(int(value), 2) if field in NUMBERS else value)
        for field, value in values(specialisation)
        if field not in SIZES
        and not (field == "tile" and isinstance(value, int) and value > 1)
        and not (field == "dtypes" and value[1] in FLOATS and value[0] not in WRITTEN)
    }


def resources(cubin, names=("STACK", "LOCAL")):
    """Bytes of stack and of local memory, where what does not fit the registers goes; or other resources."""
    text = told(cubin, "-res-usage")
    return {name: int(re.search(rf"{name}:(\d+)", text)[1]) for name in names}


# The version of Triton in CI, which the kernels were measured with: others leave other numbers in registers.
PINNED = re.search(r"^triton==(.*)$", (ROOT / "requirements-ci.txt").read_text(), re.MULTILINE)[1]


def assert_stack(specialisation, expected):
    """Assert how many bytes go through the stack, with the version of Triton that it is known for; none through memory."""
    used = resources(compile_step(specialisation).cubin)
    assert used["LOCAL"] == 0, specialisation.kernel
    if triton.__version__ == PINNED:
        assert used["STACK"] == expected, specialisation.kernel


def disassembled(cubin):
    return re.findall(r"/\*[0-9a-f]{4,5}\*/ +(?:@\S+ )?(?!NOP)(\S+)", told(cubin, "-sass"))


def told(cubin, *options):
    """Return what CUDA's tool says about a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "cuobjdump", *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
