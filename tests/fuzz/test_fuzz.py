"""The fuzz itself: a short run of it, and that it finds what is wrong."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from thinned import thinned

import ssu_bridge
from fuzz import draw, judge, memory
from fuzz.__main__ import main
from fuzz.run import arguments, run
from fuzz.script import script
from ssu_bridge.backends.triton import forms
from ssu_bridge.backends.triton.specialisation import launches, specialise

FOLDER = Path(__file__).parent
NUMPY = {"numpy": ("cpu", "reference")}
# Another seed than that of ``make fuzz``, whose calls would be the same.
SEED = 10**12


def calls(count, modes, first=0):
    """Draw calls that are right, of these modes."""
    drawn = (draw.draw(number, number, modes) for number in range(first, first + 10 * count))
    right = (call for call in drawn if call.spoils is None)
    return [next(right) for _ in range(count)]


# By default half of them: CI has more, by the command.
@pytest.mark.parametrize("block", thinned(range(4), one_in=2))
@pytest.mark.parametrize(("modes", "count"), [(draw.EAGER, 230), (draw.TRACED, 20)], ids=["eager", "traced"])
def test_drawn_calls(block, modes, count):
    outcomes = {}
    for number in range(SEED + block * count, SEED + block * count + count):
        call = draw.draw(number if modes is draw.EAGER else f"traced {block}", number, modes)
        outcome = run(call)
        assert outcome.wrong is None, script(call, outcome.wrong)
        outcomes[outcome.what] = outcomes.get(outcome.what, 0) + 1
    assert outcomes["computed"] > count / 2, outcomes


@pytest.mark.gpu
@pytest.mark.parametrize("form", range(1, 5))
@pytest.mark.parametrize(("modes", "count"), [(draw.ON_GPU, 60), (draw.TRACED_ON_GPU, 15)], ids=["eager", "traced"])
def test_drawn_calls_on_a_gpu(form, modes, count):
    for number in range(SEED + form * count, SEED + form * count + count):
        call = draw.draw(f"on a gpu {form}", number, modes)
        wrong = run(call).wrong
        assert wrong is None, script(call, wrong)


def kernels_of(call):
    """Return what Triton would compile for a call on a GPU."""
    given = arguments(placed_in_numpy(call), call._replace(flags=call.flags | {"backend": "auto"}))
    problem = ssu_bridge.explain(**given).choices[0].problem.on("cuda", (9, 0))
    if forms.refusal(problem):
        return set()
    return {(one.kernel, one.target) for one in launches(specialise(problem, forms.tile(problem)))}


def placed_in_numpy(call):
    buffers = memory.Buffers(count=30, capacity=1 << 25)
    return memory.placed(buffers, call.arrays, call.layouts, call.at_end, memory.VECTOR)[0]


@pytest.mark.parametrize("form", range(3))
def test_calls_on_a_gpu_share_kernels(form):
    """Triton compiles few for all numbers of sequences, tokens and slots, and for all strides."""
    pytest.importorskip("triton")
    drawn = [draw.draw(f"shared {form}", number, draw.ON_GPU) for number in range(40)]
    right = [call for call in drawn if call.spoils is None]
    assert len(set().union(*map(kernels_of, right))) <= 6
    assert len({call.arrays["x"].shape for call in right}) > 3
    assert len({call.arrays["state"].shape for call in right}) > 5
    assert len({call.layouts["x"].strides for call in right if call.arrays["x"].size}) > 3


def test_arrays_in_buffers_of_a_gpu(monkeypatch):
    """They lie there as in guarded memory, also in a call's script."""
    monkeypatch.setattr(draw, "ON_GPU", {"torch.cuda": ("cpu",)})
    monkeypatch.setattr(torch.Tensor, "cuda", torch.Tensor.clone)
    drawn = [call for call in (draw.draw(f"{n // 20}", n, draw.ON_GPU) for n in range(100)) if not call.spoils]
    outcomes = [run(call) for call in drawn]
    assert not [outcome.wrong for outcome in outcomes if outcome.wrong]
    computed = [call for call, outcome in zip(drawn, outcomes, strict=True) if outcome.what == "computed"]
    assert len(computed) > 50
    for call in [call for call in computed if call.arrays["x"].size and call.layouts["x"].first][:5]:
        names = {}
        exec(script(call, judge.Wrong("state", (), "one thing", "another")), names)
        assert names["a"]["x"].stride() == call.layouts["x"].strides


def test_the_oracle_knows_nothing_of_the_package():
    for name in ("oracle", "judge"):
        for node in ast.walk(ast.parse((FOLDER / f"{name}.py").read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.startswith("ssu_bridge")], name


# --- What it finds ---

UPDATE = ssu_bridge.update


def nudged(**given):
    """One step of float32 in an output is less than what is allowed; a hundredth is not."""
    results = UPDATE(**given)
    results[0][...] = (results[0] * 1.01).astype(results[0].dtype)
    return results


def elsewhere(**given):
    """A bit of an argument that is only read."""
    results = UPDATE(**given)
    given["A"][(0,) * given["A"].ndim] -= 1
    return results


def behind(**given):
    """A byte between the end of an array and the guard, or before it."""
    results = UPDATE(**given)
    first, end = np.lib.array_utils.byte_bounds(given["x"])
    memory.ctypes.memset(end if first % memory.PAGE == 0 else first - 1, 0, 1)
    return results


def late(**given):
    """An error after something was written."""
    UPDATE(**given)
    raise ValueError("late")


def refusing(**given):
    """An error for a right call."""
    raise ValueError("no")


def copying(**given):
    """Another object than the one that was passed."""
    out, state, *rest = UPDATE(**given)
    return out, np.array(state), *rest


@pytest.mark.parametrize(
    "fault", [nudged, elsewhere, behind, late, refusing, copying], ids=lambda fault: fault.__name__
)
def test_it_finds_what_is_wrong(fault, monkeypatch):
    found = 0
    for call in calls(40, NUMPY):
        arrays = call.arrays
        if "state_scale" in arrays or call.options.window or not arrays["x"].size:
            continue
        with monkeypatch.context() as patch:
            patch.setattr(ssu_bridge, "update", fault)
            found += run(call).wrong is not None
    assert found >= 10


# It reads a page before, or after, one of the call's arrays.
CRASH = """
import ctypes, ssu_bridge
def update(**given):
    x = given["x"]
    ctypes.string_at(x.ctypes.data {where}, 1)
    return UPDATE(**given)
UPDATE, ssu_bridge.update = ssu_bridge.update, update
from fuzz.draw import draw
from fuzz.run import run
for number in range(100):
    run(draw(number, number, {{"numpy": ("cpu",)}}))
"""


@pytest.mark.parametrize("where", ["- 4096", "+ (x.nbytes + 4096 if x.flags.c_contiguous else 1 << 23)"])
def test_what_reads_past_the_guards_ends_the_process(where):
    result = subprocess.run([sys.executable, "-c", CRASH.format(where=where)], cwd=FOLDER.parent, capture_output=True)
    assert result.returncode < 0, result.stderr


@pytest.mark.parametrize("modes", [draw.EAGER, draw.TRACED], ids=["eager", "traced"])
def test_a_script_repeats_its_call(modes, tmp_path):
    """It ends without an error where the number is as expected, and with one where it is not."""
    from fuzz.judge import Wrong

    call = next(c for c in calls(20, modes) if run(c).what == "computed" and c.arrays["x"].size)
    right, wrong = (
        script(call, Wrong("out", (0, 0, 0), f"float('{low}') to float('inf')", "0.0")) for low in ("-inf", "inf")
    )
    exec(right, {})
    with pytest.raises(AssertionError):
        exec(wrong, {})
    # By itself, too, where a script needs more; a process takes seconds.
    if modes is draw.TRACED:
        result = subprocess.run([sys.executable, "-c", wrong], capture_output=True, text=True, timeout=120)
        assert result.returncode == 1
        assert "AssertionError" in result.stderr


def test_the_command(capfd):
    assert main(["--calls", "30", "--traced", "0", "--jobs", "1"]) == 0
    assert "30 calls of seed 0" in capfd.readouterr().out
