"""Kernels of Triton in its interpreter, which runs them on host memory; in a process that has TRITON_INTERPRET=1."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from ssu_bridge.backends import reference
from ssu_bridge.backends.triton import forms
from ssu_bridge.backends.triton.compile import constant_arguments, kernel_of
from ssu_bridge.backends.triton.launch import Kind, grid_of, launch_of, runtime_arguments
from ssu_bridge.backends.triton.specialisation import launches, specialise
from ssu_bridge.frontends.torch.host import from_host, to_host
from ssu_bridge.testing.check import compare


def run_in_interpreter(file, *calls):
    """Run calls of a file's own in a new process, because Triton decides at its import whether it interprets."""
    folders = [str(Path(__file__).parent), str(Path(file).parent)]
    script = f"import sys; sys.path[:0] = {folders}; import {Path(file).stem} as tests"
    script = "; ".join([script, *(f"tests.{call}" for call in calls)])
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@functools.cache  # once: what is mended twice is wrong again
def mend_interpreter():
    """Have the interpreter do what a GPU does where NumPy does something else, and in less time."""
    multiply_bfloat16()
    count_in_numbers()
    repeat_by_type()
    reduce_in_halves()
    patch_once()


def multiply_bfloat16():
    """Have the interpreter multiply bfloat16 as numbers, whose bits it takes for integers, and sum up in float32."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def numbers(handle):
        data = handle.data
        is_bfloat16 = handle.dtype.scalar == tl.bfloat16
        return (data.astype("uint32") << 16).view("float32") if is_bfloat16 else data.astype("float32")

    def create_dot(self, a, b, acc, *options):
        return TensorHandle(np.matmul(numbers(a), numbers(b)) + acc.data, acc.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


def count_in_numbers():
    """Have the interpreter make ints of arrays of one element, which NumPy does not do any more."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patched


def repeat_by_type():
    """Have the interpreter repeat a number as its type says: it takes what a comparison gives for what was compared."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    splat = InterpreterBuilder.create_splat

    def create_splat(self, ret_ty, arg):
        return splat(self, ret_ty, TensorHandle(arg.data, ret_ty.scalar))

    InterpreterBuilder.create_splat = create_splat


def reduce_in_halves():
    """Have the interpreter combine whole arrays where it takes one element after the other."""
    from triton.runtime.interpreter import ReduceOps

    def generic_reduce(self, input):
        (tensor,) = input
        data = np.moveaxis(tensor.handle.data, self.axis, 0)
        while len(data) > 1:
            halves = (self.to_tensor(half, tensor.dtype) for half in np.split(data, 2))
            data = self.combine_fn.fn(*halves).handle.data
        data = np.moveaxis(data, 0, self.axis)
        return [self.to_tensor(data if self.keep_dims else data.squeeze(self.axis), tensor.dtype)]

    ReduceOps.generic_reduce = generic_reduce


def patch_once():
    """Have the interpreter take the place of Triton's language once for each function: it does so at each call of one."""
    from triton.runtime import interpreter

    patch = functools.cache(interpreter._patch_lang)

    def call(self, *args, **kwargs):
        patch(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def interpret(case, arrays, problem):
    before = {**arrays, "out": np.full_like(arrays["x"], np.nan)}
    tensors = {name: from_host(array) for name, array in before.items()}
    run_interpreted(problem, tensors)
    after = {name: to_host(tensors[name]) for name in problem.results}
    rows = compare(reference.compute(problem, arrays), before, after)
    assert all(row.passed for row in rows), (case.name, rows)


def run_interpreted(problem, tensors):
    """Run the kernels of a problem on tensors in host memory, by their names, in place."""
    whole = specialise(problem, forms.tile(problem))
    # Float8 states are bytes to the kernel.
    bytes_of = {torch.float8_e4m3fn: torch.int8, torch.bool: torch.uint8}
    given = [tensors[name] for name in (*problem.names, "out")]
    given = [tensor.view(bytes_of.get(tensor.dtype, tensor.dtype)) for tensor in given]
    launch = launch_of(whole)
    parts = zip(launch.grids, launch.scratch, strict=True)
    scratch = sum(grid.blocks(problem.sequences, problem.tokens) * each // 4 for grid, each in parts)
    places = {**dict(enumerate(given)), launch.tensors: torch.full((scratch,), torch.nan)}
    for specialisation in launches(whole):
        kernel = kernel_of(specialisation)
        values = dict.fromkeys(kernel.arg_names)
        for name, (kind, tensor, axis, _) in runtime_arguments(specialisation).items():
            array = places[tensor]
            read = {Kind.ADDRESS: array, Kind.STRIDE: array.stride, Kind.SIZE: array.size}[kind]
            values[name] = read if kind is Kind.ADDRESS else read(axis)
        values = {**values, **constant_arguments(specialisation)}
        grid = grid_of(specialisation)
        programs = grid.blocks(len(given[grid.tensor]) - grid.less, problem.tokens)
        if programs:
            kernel[(programs,)](**{name: values[name] for name in kernel.arg_names})
