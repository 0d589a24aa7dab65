"""Native code for CUDA without a GPU: what the launcher packs, and what it asks of a driver that only pretends."""

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from without_torch import WITHOUT_TORCH

from ssu_bridge.backends.triton.launch import Grid
from ssu_bridge.native import library

ADDRESS, STRIDE, SIZE = range(3)
COMPILER = shutil.which("c++") or shutil.which("g++")

HELPERS = str(Path(__file__).parents[1] / "helpers")


def view(array, strides=None):
    strides = strides or tuple(s // array.itemsize for s in array.strides)
    return library().view(array.ctypes.data, array.shape, strides, str(array.dtype))


def packed(programs, arguments, *arrays, tensor=1, less=0):
    return list(library().cubin_arguments((programs, tensor, less), arguments, [view(array) for array in arrays]))


@pytest.fixture
def state():
    return np.zeros((6, 4, 8, 16), "float32")


def test_addresses_strides_and_sizes(state):
    x = np.zeros((3, 4, 16), "float32")[:, :, :8]
    table = np.zeros(6, "int32")[::2]
    wanted = [(ADDRESS, 0, 0, 16), (ADDRESS, 1, 0, 1), (SIZE, 0, 0, 1), (SIZE, 1, 1, 1)]
    wanted += [(STRIDE, 0, 0, 4), (STRIDE, 0, 1, 1), (STRIDE, 1, 0, 4), (STRIDE, 1, 1, 4), (STRIDE, 2, 0, 1)]
    got = packed(8, wanted, state, x, table)
    assert got == [3 * 8, state.ctypes.data, x.ctypes.data, 6, 4, 4 * 8 * 16, 8 * 16, 4 * 16, 16, 2]


def test_a_slot_stride_beyond_32_bits(state):
    far = library().view(state.ctypes.data, (2, 4, 8, 16), (2**33, 128, 16, 1), "float32")
    got = library().cubin_arguments((1, 1, 0), [(STRIDE, 0, 0, 4)], [far, view(state[:2])])
    assert list(got) == [2, 2**33]


def test_the_stride_of_one_entry_is_nothing(state):
    odd = library().view(state.ctypes.data, (1, 4, 8, 16), (3, 128, 16, 1), "float32")
    assert list(library().cubin_arguments((5, 1, 0), [(STRIDE, 0, 0, 4)], [odd, odd])) == [5, 0]


def test_the_strides_of_an_empty_tensor_are_nothing(state):
    odd = library().view(state.ctypes.data, (2, 0, 8, 16), (3, 7, 16, 1), "float32")
    assert list(library().cubin_arguments((5, 1, 0), [(STRIDE, 0, 0, 4), (STRIDE, 0, 1, 4)], [odd, odd])) == [10, 0, 0]


def test_the_tensor_that_counts_the_sequences(state):
    fences = np.zeros(4, "int64")
    assert packed(8, [], state, state, fences, tensor=2, less=1) == [3 * 8]
    assert packed(8, [], state, state, fences[:1], tensor=2, less=1) == [0]
    assert packed(8, [], state, state, fences[:0], tensor=2, less=1) == [0]


@pytest.mark.parametrize(
    ("shape", "row", "blocks"),
    [
        ((3, 10, 8), (1, 3, 4, 1, 1), 3 * (3 + 3 * 2)),
        ((3, 10, 8), (0, 3, 4, 1, 1), 3 * (3 * 2)),
        ((3, 100, 8), (1, 3, 4, 1, 1), 3 * (3 + 3 * 3)),
        ((3, 3, 8), (0, 3, 4, 1, 1), 0),
        ((10, 8), (1, 3, 4, 1, 0), 3 * (10 + 2)),
        ((10, 8), (0, 3, 1, 1, 0), 3 * 10),
    ],
)
def test_segments_have_blocks_of_their_own(state, shape, row, blocks):
    x = np.zeros(shape, "float32")
    assert library().cubin_arguments((3, 1, 0, *row), [], [view(state), view(x)])[0] == blocks
    assert Grid(3, 1, 0, *row).blocks(shape[0], shape[row[-1]]) == blocks


@pytest.mark.parametrize("grid", [(0, 1, 0), (1, 2, 0), (1, -1, 0), (1, 1, -1), (1, 1), (1, 1, 0, 2, 1, 1, 1, 1),
                                  (1, 1, 0, 1, -1, 1, 1, 1), (1, 1, 0, 1, 1, 0, 1, 1), (1, 1, 0, 1, 1, 1, 2, 1),
                                  (1, 1, 0, 1, 1, 1, 1, -1), (1, 1, 0, 1)])  # fmt: skip
def test_grids_that_make_no_sense(state, grid):
    with pytest.raises(ValueError, match="grid: expected"):
        library().cubin_arguments(grid, [], [view(state), view(state)])


def test_an_axis_that_is_not_there(state):
    with pytest.raises(ValueError, match="argument 0: expected more than 4 axes, got 4"):
        packed(1, [(SIZE, 0, 4, 1)], state, state)


def test_misaligned_memory_is_refused(state):
    x = np.zeros((3, 9), "float32")
    with pytest.raises(ValueError, match="argument 1: expected an address that is a multiple of 16, got"):
        packed(1, [(ADDRESS, 1, 0, 16)], state, x.ravel()[1:].reshape(2, 13))
    with pytest.raises(ValueError, match="argument 1: expected a stride that is a multiple of 4, got 9"):
        packed(1, [(STRIDE, 1, 0, 4)], state, x)
    assert packed(1, [(STRIDE, 1, 0, 1)], state, x) == [3, 9]


def test_more_blocks_than_a_launch_has(state):
    with pytest.raises(ValueError, match="6 sequences of 500000000 blocks are too many"):
        packed(500_000_000, [], state, state)


@pytest.mark.parametrize(
    "rows",
    [
        [(3, 0, 0, 1)],
        [(0, 2, 0, 1)],
        [(0, -1, 0, 1)],
        [(0, 0, -1, 1)],
        [(0, 0, 0, 0)],
        [(0, 0, 1)],
        [(0, 0, 0, 1)] * 65,
    ],
)
def test_arguments_that_make_no_sense(state, rows):
    with pytest.raises(ValueError, match="arguments: "):
        packed(1, rows, state, state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warps": 0}, "1 to 32 warps"),
        ({"programs": 0}, "at least one program"),
        ({"tensors": 1}, "tensors: expected 2 to 24"),
        ({"scratch": 64}, "with the scratch pointers"),
        ({"in_place": [1]}, "in_place: expected inputs, below 1, got 1"),
        ({"in_place": [-1]}, "in_place: expected inputs, below 1, got -1"),
    ],
)
def test_kernels_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        kernel(**changes)


def kernel(warps=4, programs=2, tensors=3, in_place=(0,), shared=100, scratch=2, overlapping=False):
    """A kernel of a state and an output that is also what counts the sequences, unless there are more tensors."""
    arguments, grid = [(ADDRESS, 0, 0, 16), (SIZE, 0, 0, 1), (STRIDE, 1, 0, 4)], (programs, 1, 0)
    launch = (b"cubin", "step", shared, warps, grid, arguments, scratch, 0)
    return library().cubin_kernel([launch], tensors, in_place, overlapping)


def split_kernel(scratch=64, most=2, last=0):
    """Two kernels that hand on memory: one for the segments of sequences of at least two tokens, one for all."""
    grid = (3, 1, 0, 0, most, 2, 1, 1)
    arguments = [(ADDRESS, 3, 0, 16), (SIZE, 1, 0, 1)]
    launches = [
        (b"first", "one", 0, 4, grid, arguments, 0, scratch),
        (b"second", "two", 0, 4, (3, 1, 0), arguments, 0, last),
    ]
    return library().cubin_kernel(launches, 3, (0,), False)


def test_host_memory_and_wrong_counts_are_refused(state):
    with pytest.raises(ValueError, match="expected 3 tensors, got 2"):
        kernel()(view(state), view(state))
    with pytest.raises(ValueError, match="argument 0: expected memory of the CUDA device"):
        kernel()(view(state), view(state), view(state))


def test_without_a_driver(tmp_path):
    with server("/nonexistent", tmp_path) as run:
        shown = run()
    if "cannot be opened" not in shown:
        pytest.skip("this machine has the NVIDIA driver")
    assert "RuntimeError: the NVIDIA driver's library cannot be opened" in shown


# --- With a driver that pretends ---


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    if not COMPILER:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("driver")
    source = Path(__file__).parents[1] / "helpers" / "fake_cuda.cc"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", folder / "libcuda.so.1", source], check=True)
    with server(folder, tmp_path_factory.mktemp("shown")) as run:
        yield run


# Runs each line, of code with variables of the environment and a file to print to, in a process that it forks, so that
# what they all need is imported once.
SERVER = """
import ctypes, json, os, sys
sys.path[:0] = {tests!r}
from test_cubin_launcher import *
import tvm_ffi
library()
for line in sys.stdin:
    code, environment, file = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitpid(child, 0)[1], flush=True)
        continue
    os.environ.update(environment)
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), 1)
    state, x = np.zeros((6, 4), "float32"), np.zeros((3, 8), "float32")
    s, t, none = OnDevice(state), OnDevice(x), OnDevice(x[:0])
    step = kernel()
    try:
        exec(code)
    except Exception as error:
        print(type(error).__name__ + ":", error)
    sys.stdout.flush()
    ctypes.CDLL(None).fflush(None)
    print("address", state.ctypes.data, flush=True)
    os._exit(0)
"""


@contextlib.contextmanager
def server(libraries, files):
    """Run code where the driver's library is looked for in a folder: a function that returns what the code prints."""
    script = WITHOUT_TORCH + SERVER.format(tests=[HELPERS, os.path.dirname(__file__)])
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script], env=environment, **pipes) as process:

        def run(code="step(s(), t(), s())", **env):
            file = files / str(len(list(files.iterdir())))
            env = {"FAKE_CUDA_ARGUMENTS": "5", "FAKE_CUDA_VERSION": "12030", **env}
            print(json.dumps((textwrap.dedent(code), env, str(file))), file=process.stdin, flush=True)
            assert process.stdout.readline() == "0\n"
            return file.read_text()

        yield run


class OnDevice:
    """Hands a host array over as if it lay on a CUDA device."""

    class Tensor(ctypes.Structure):
        _fields_ = (
            ("data", ctypes.c_void_p),
            ("device", ctypes.c_int32 * 2),
            ("ndim", ctypes.c_int32),
            ("dtype", ctypes.c_uint8 * 4),
            ("shape", ctypes.POINTER(ctypes.c_int64)),
            ("strides", ctypes.POINTER(ctypes.c_int64)),
            ("byte_offset", ctypes.c_uint64),
            ("context", ctypes.c_void_p),
            ("deleter", ctypes.c_void_p),
        )

    def __init__(self, array):
        self.array, self.kept = array, []

    def __call__(self, device=0):
        import tvm_ffi

        self.device = device
        return tvm_ffi.from_dlpack(self)

    def __dlpack_device__(self):
        return (2, self.device)

    def __dlpack__(self, **_):
        shape = (ctypes.c_int64 * self.array.ndim)(*self.array.shape)
        dtype = (ctypes.c_uint8 * 4)(2, 32, 1, 0)
        device = (ctypes.c_int32 * 2)(2, self.device)
        tensor = self.Tensor(self.array.ctypes.data, device, self.array.ndim, dtype, shape, None, 0, None, None)
        self.kept += [tensor, shape]
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(ctypes.addressof(tensor), b"dltensor", None)


def test_it_loads_once_a_device_and_launches_in_its_context(driver):
    code = "[step(s(d), t(d), s(d)) for d in (0, 0, 1)]"
    lines = driver(code).splitlines()
    address = lines[-1].split()[1]
    launch = f"6 1 1, 128 threads, 100 bytes: {address} 6 8 0 0"
    assert lines[:-1] == [
        "load 'cubin' in 100",
        "function step",
        f"launch 1100 in 100: {launch}",
        f"launch 1100 in 100: {launch}",
        "load 'cubin' in 101",
        "function step",
        f"launch 1101 in 101: {launch}",
    ]


@pytest.mark.parametrize(("version", "prefix"), [("12030", "1 attribute 6 = 1, "), ("12020", "")])
def test_a_launch_overlaps_where_the_driver_can(driver, version, prefix):
    lines = driver("kernel(overlapping=True)(s(), t(), s())", FAKE_CUDA_VERSION=version)
    assert f"\n{prefix}launch 1100 in 100: 6 1 1, 128 threads, 100 bytes:" in lines


def test_no_sequences_load_and_launch_nothing(driver):
    lines = driver("step(s(), none(), s())").splitlines()
    assert lines[:-1] == ["load 'cubin' in 100", "function step"]


def test_kernels_of_a_call_run_in_order_with_memory_of_the_caller(driver):
    code = "memory = OnDevice(np.zeros((9, 64), 'float32')); split_kernel()(s(), t(), s(), memory())"
    code += "; print('memory', memory.array.ctypes.data)"
    lines = driver(code, FAKE_CUDA_ARGUMENTS="2").splitlines()
    address = lines[-2].split()[1]
    assert [line for line in lines if line.startswith("launch")] == [
        f"launch 1100 in 100: 18 1 1, 128 threads, 0 bytes: {address} 3",
        f"launch 1100 in 100: 9 1 1, 128 threads, 0 bytes: {address} 3",
    ]


def test_memory_that_nobody_gives_is_allocated_and_freed(driver):
    lines = driver("split_kernel()(s(), t(), s())", FAKE_CUDA_ARGUMENTS="2").splitlines()
    launches = [line.split()[-2] for line in lines if line.startswith("launch")]
    assert lines[0] == f"allocate {18 * 64} bytes in 100 on 0: {launches[0]}"
    assert len(launches) == 2
    assert launches[0] == launches[1]
    assert lines[-2] == f"free {launches[0]} in 100 on 0"


def test_memory_of_several_kernels_is_one(driver):
    lines = driver("split_kernel(last=16)(s(), t(), s())", FAKE_CUDA_ARGUMENTS="2").splitlines()
    assert lines[0].startswith(f"allocate {18 * 64 + 9 * 16} bytes in 100 on 0")


@pytest.mark.parametrize(("short", "launches"), [("x[:, :1]", 1), ("x[:0]", 0)])
def test_no_segments_need_no_memory(driver, short, launches):
    code = f"short = OnDevice({short}); split_kernel()(s(), short(), s())"
    out = driver(code, FAKE_CUDA_ARGUMENTS="2")
    assert "allocate" not in out
    assert out.count("launch") == launches


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("split_kernel()(s(), t(), s(), none())", "scratch memory: expected at least 1152 bytes, got 0"),
        ("split_kernel()(s(), t(), s(), s(1))", "argument 3: expected memory of the CUDA device that the state is on"),
        ("step(s(), t(), s(), s())", "expected 3 tensors, got 4"),
        ("split_kernel(-1)", "scratch: expected no negative number of bytes, got -1"),
    ],
)
def test_other_memory_is_refused(driver, code, message):
    out = driver(code, FAKE_CUDA_ARGUMENTS="2")
    assert f"ValueError: {message}" in out
    assert "launch" not in out


def test_much_shared_memory_is_asked_for(driver):
    lines = driver("kernel(shared=50_000)(s(), t(), s())").splitlines()
    assert "attribute 8 = 50000" in lines


@pytest.mark.parametrize("call", ["cuInit", "cuModuleLoadData", "cuLaunchKernel"])
def test_an_error_of_the_driver_has_its_name(driver, call):
    result = driver(FAKE_CUDA_FAILS=call)
    assert f"RuntimeError: {call} failed: CUDA_ERROR_ILLEGAL_ADDRESS (700), an illegal memory access" in result


def test_a_result_with_other_memory_gets_the_elements_and_is_updated_there(driver):
    code = """
    state[:] = np.arange(24).reshape(6, 4)
    other, before = np.empty_like(state), state.copy()
    result = OnDevice(other)
    kernel(tensors=5, in_place=(1, 0))(s(), t(), none(), t(), result())
    assert (other == before).all() and (state == before).all()
    state = other  # whose address the last line says"""
    lines = driver(code).splitlines()
    address = lines[-1].split()[1]
    launch = f"launch 1100 in 100: 6 1 1, 128 threads, 100 bytes: {address} 6 8 0 0"
    assert lines[:-1] == ["copy 96 bytes in 100 on 0", "load 'cubin' in 100", "function step", launch]


def test_an_error_of_that_copy_has_its_name(driver):
    code = "other = OnDevice(state.copy()); step(s(), t(), other())"
    result = driver(code, FAKE_CUDA_FAILS="cuMemcpyDtoDAsync")
    assert "RuntimeError: cuMemcpyDtoDAsync failed: CUDA_ERROR_ILLEGAL_ADDRESS (700)" in result
    assert "launch" not in result


def test_nothing_is_launched_for_results_unlike_their_inputs_or_on_two_devices(driver):
    for other in ("none", "OnDevice(state[1:])"):
        result = driver(f"other = {other}; step(s(), t(), other())")
        assert "ValueError: a result is neither the memory of the input that is updated in place" in result
        assert "launch" not in result
        assert "copy" not in result
    result = driver("step(s(0), t(1), s(0))")
    assert "ValueError: argument 1: expected memory of the CUDA device that the state is on" in result
    assert "launch" not in result


def test_many_threads_load_once(driver):
    code = """
    from concurrent.futures import ThreadPoolExecutor
    tensors = s(), t()
    list(ThreadPoolExecutor(8).map(lambda _: step(*tensors, tensors[0]), range(200)))"""
    lines = driver(code).splitlines()
    assert sum(line.startswith("load") for line in lines) == 1
    assert sum(line.startswith("launch") for line in lines) == 200


def test_a_stream_waits_for_all_that_was_recorded_on_its_device(driver):
    code = """
    wait, record = library().waiting_kernel(), library().record_work
    wait(s(), s())
    [record(*work) for work in ((0, 11), (0, 12), (1, 11), (0, 11))]
    wait(s(), t(), s(), t())"""
    lines = driver(code).splitlines()
    assert lines[:-1] == [
        "event with flags 2 in 100",
        "record 1100 on 11 in 100",
        "event with flags 2 in 100",
        "record 2100 on 12 in 100",
        "event with flags 2 in 101",
        "record 3101 on 11 in 101",
        "record 1100 on 11 in 100",
        "0 waits for 1100 in 100",
        "0 waits for 2100 in 100",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("s(), t()", "argument 1: expected the memory of argument 0"),
        ("s(), t(), s()", "expected as many results as tensors, got 3 in all"),
        ("", "expected as many results as tensors, got 0 in all"),
        ("s(0), t(1), s(0), t(1)", "argument 1: expected memory of the CUDA device that the state is on"),
    ],
)
def test_what_no_stream_waits_for(driver, arguments, message):
    code = f"library().record_work(0, 11); library().waiting_kernel()({arguments})"
    lines = driver(code)
    assert f"ValueError: {message}" in lines
    assert "0 waits for" not in lines


@pytest.mark.parametrize("call", ["cuEventCreate", "cuEventRecord", "cuStreamWaitEvent"])
def test_an_error_of_recording_and_waiting_has_its_name(driver, call):
    code = "library().record_work(0, 11); library().waiting_kernel()(s(), s())"
    result = driver(code, FAKE_CUDA_FAILS=call)
    assert f"RuntimeError: {call} failed: CUDA_ERROR_ILLEGAL_ADDRESS (700)" in result


def test_a_device_beyond_all_is_refused(driver):
    result = driver("library().record_work(64, 11)")
    assert "ValueError: expected a CUDA device below 64, got 64" in result
