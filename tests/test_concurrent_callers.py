"""Callers at once: threads of all frameworks whose first calls race, processes that fork or are spawned, asyncio, Ctrl-C."""

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from one_call import CASE, bits
from without_torch import WITHOUT_TORCH

import ssu_bridge
from ssu_bridge.testing.cases import Case

# Nothing of ours is loaded or compiled before the threads start; JAX cannot be imported by several at once.
RACE = """
import threading
import jax, jax.numpy as jnp, numpy as np, torch
import ssu_bridge
from ssu_bridge.testing.cases import Case, arguments

case = {case!r}
barrier, results, errors = threading.Barrier(8), {{}}, []


def in_numpy():
    return lambda array: array, lambda array: array, ssu_bridge.update


def in_torch():
    return torch.from_numpy, lambda tensor: tensor.numpy(), ssu_bridge.update


def in_jax():
    return jnp.array, np.array, ssu_bridge.update


def in_jit():
    flags = case.flags | {{"backend": "cpu"}}
    step = jax.jit(lambda given: ssu_bridge.update(**given, **flags))
    return jnp.array, np.array, lambda backend, dt_softplus, pad_slot_id, **given: step(given)


def work(number, framework, made):
    try:
        barrier.wait()
        convert, to_host, update = made()
        for _ in range(10):
            given = arguments(case.arrays(seed=0), framework, convert)
            out, state = update(**given, **case.flags, backend="cpu")
            bits = tuple(to_host(array).tobytes() for array in (out, *state))
            results.setdefault(bits, set()).add(number)
    except BaseException as error:
        errors.append((framework, repr(error)))


ways = [("numpy", in_numpy), ("torch", in_torch), ("jax", in_jax), ("jax", in_jit)] * 2
threads = [threading.Thread(target=work, args=(number, *way)) for number, way in enumerate(ways)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not errors, errors
assert list(results.values()) == [set(range(8))], results.values()
print("the same")
"""


def test_first_calls_of_eight_threads_race():
    result = subprocess.run([sys.executable, "-c", RACE.format(case=CASE)], capture_output=True, text=True, timeout=300)
    assert (result.stdout, result.returncode) == ("the same\n", 0), result.stderr[-3000:]


# A process that has called already, with threads of the kernel and of the frameworks, and one that it makes.
CHILD = """
import multiprocessing, sys
sys.path.insert(0, {folder!r})
from one_call import bits
if __name__ == "__main__":
    before = bits({framework!r})
    context = multiprocessing.get_context({method!r})
    with context.Pool(2) as pool:
        assert pool.map(bits, [{framework!r}] * 4) == [before] * 4
    assert bits({framework!r}) == before
    print("the same")
"""


# JAX has threads that do not survive a fork, as it says. Nightly: another framework in the same processes.
@pytest.mark.parametrize(
    ("method", "framework"),
    [("fork", "numpy"), ("fork", "torch"), ("spawn", "numpy"), pytest.param("spawn", "jax", marks=pytest.mark.nightly)],
)
def test_processes_that_a_caller_makes(method, framework, tmp_path):
    program = tmp_path / "program.py"  # spawned processes read it again
    text = CHILD.format(folder=str(Path(__file__).parent / "helpers"), method=method, framework=framework)
    program.write_text(text if framework == "torch" else WITHOUT_TORCH + text)
    result = subprocess.run([sys.executable, "-W", "ignore", program], capture_output=True, text=True, timeout=300)
    assert (result.stdout, result.returncode) == ("the same\n", 0), result.stderr[-3000:]


# At every so many lines of a call of NumPy's or Torch's, and of JAX's.
@pytest.mark.parametrize("steps", [("97", "431"), pytest.param(("23", "101"), marks=pytest.mark.nightly)])
def test_ctrl_c_anywhere_in_a_first_call(steps):
    """It comes through, and the same call is right after it."""
    command = [sys.executable, "-W", "ignore", Path(__file__).parent / "helpers/interrupts.py", *steps]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (result.stdout, result.returncode) == ("all the same\n", 0), result.stderr[-3000:]


def test_tasks_of_asyncio():
    """Each has its own configuration, in the thread that it calls from too."""

    async def task(framework):
        with ssu_bridge.using(backend="cpu"):
            return await asyncio.to_thread(bits, framework)

    async def all_tasks():
        return await asyncio.gather(*map(task, ["numpy", "torch", "jax"] * 4))

    assert {*asyncio.run(all_tasks())} == {bits()}


def test_a_state_that_threads_share_by_slots():
    """Threads that step slots of their own in one cache disturb no other slot."""
    case = Case("shared", sequences=1, slots=8, indices=(0,), nheads=4, headdim=32, dstate=64)
    arrays = case.arrays(seed=0)
    together, alone = (arrays["state"].copy() for _ in range(2))
    rest = {name: array for name, array in arrays.items() if name not in ("state", "state_batch_indices")}

    def steps(state, slot):
        for _ in range(200):
            indices = np.array([slot], "int32")
            ssu_bridge.update(state, **rest, **case.flags, state_batch_indices=indices, backend="cpu")

    threads = [threading.Thread(target=steps, args=(together, slot)) for slot in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for slot in range(8):
        steps(alone, slot)
    assert together.tobytes() == alone.tobytes()
