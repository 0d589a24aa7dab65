"""The native CPU kernel on several threads and from several callers: the same bits as alone."""

import threading
from pathlib import Path

import numpy as np
import pytest
from native import F32, problem, run, run_script, same_bits

HELPERS = str(Path(__file__).parents[1] / "helpers")

THREADS_SCRIPT = """
import hashlib, sys
import numpy as np
sys.path.insert(0, {tests!r})
from native import BF16, library, problem, run
assert library().cpu_num_threads() == {threads}
for state in (np.float32, BF16):
    arguments = problem(np.random.default_rng(5), b=32, heads=8, rows=64, columns=128, slots=33, state=np.dtype(state))
    print(hashlib.sha256(b"".join(a.tobytes() for a in run(arguments))).hexdigest())
"""


def test_threads_do_not_change_the_bits():
    printed = set()
    for threads in (1, 4):
        script = THREADS_SCRIPT.format(tests=HELPERS, threads=threads)
        result = run_script(script, SSU_BRIDGE_NUM_THREADS=str(threads))
        assert result.returncode == 0, result.stderr
        printed.add(result.stdout)
    assert len(printed) == 1
    assert printed.pop().count("\n") == 2


@pytest.mark.parametrize("setting", ["0", "3x"])
def test_wrong_number_of_threads(setting):
    result = run_script(
        "from ssu_bridge.native import library; library().cpu_num_threads()", SSU_BRIDGE_NUM_THREADS=setting
    )
    assert "ValueError" in result.stderr
    assert "SSU_BRIDGE_NUM_THREADS" in result.stderr


CONCURRENT_SCRIPT = """
import os, sys, threading
import numpy as np
sys.path.insert(0, {tests!r})
from native import library, problem, run, same_bits
problems = [problem(np.random.default_rng(i), b=16, heads=8, rows=64, columns=128, slots=17) for i in range(8)]
wanted = [run(p) for p in problems]
wrong = []
def work(i):
    for _ in range(20):
        if not all(map(same_bits, run(problems[i]), wanted[i])):
            wrong.append(i)
threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not wrong, wrong
child = os.fork()
if child == 0:
    os._exit(0 if all(map(same_bits, run(problems[0]), wanted[0])) else 1)
assert os.waitpid(child, 0)[1] == 0
assert all(map(same_bits, run(problems[0]), wanted[0]))
"""


def test_many_callers_and_fork():
    script = CONCURRENT_SCRIPT.format(tests=HELPERS)
    result = run_script(script, SSU_BRIDGE_NUM_THREADS="4")
    assert result.returncode == 0, result.stderr


MEMORY_SCRIPT = """
import sys
import numpy as np
sys.path.insert(0, {tests!r})
from native import F16, WITHOUT_MEMORY, cpu_kernel, problem, results_of, view
def prepared(columns):
    arguments = problem(np.random.default_rng(1), b=2, heads=4, columns=columns, groups=1, slots=2, state=F16, other=F16)
    arrays = {{**arguments, "out": np.zeros_like(arguments["x"])}}
    kernel = cpu_kernel(list(arguments), results_of(arguments))
    views = {{name: view(array) for name, array in arrays.items()}}
    return arrays, lambda: kernel(*(views[name] for name in (*arguments, *results_of(arguments))))
small, large = 16, 1 << 19
exec(WITHOUT_MEMORY)
"""


@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.nightly), 4])
def test_scratch_without_memory_is_an_error_before_anything_is_written(threads):
    result = run_script(MEMORY_SCRIPT.format(tests=HELPERS), SSU_BRIDGE_NUM_THREADS=str(threads))
    assert result.returncode == 0, result.stderr
    assert f"no memory for the scratch of a state with 524288 columns (dstate) on {threads} threads" in result.stdout


def test_flushing_threads_change_nothing(rng):
    """XLA calls the kernel from threads that flush subnormal numbers to zero."""
    torch = pytest.importorskip("torch")
    arguments = problem(rng, state=F32)
    arguments["state"] *= np.float32(1e-42)
    arguments["x"] *= np.float32(1e-42)
    out, state = run(arguments)
    subnormal = (state != 0) & (np.abs(state) < np.finfo(np.float32).tiny)
    assert subnormal.any()
    results = []

    def flushing():
        assert torch.set_flush_denormal(True)
        results.extend(run(arguments))

    thread = threading.Thread(target=flushing)
    thread.start()
    thread.join()
    assert all(map(same_bits, results, (out, state)))
