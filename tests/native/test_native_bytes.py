"""Tensors as bytes: whatever a DLPack struct says, the native readers refuse it with a ValueError or accept it.

No reader looks at the elements of a tensor, so that any address will do.
"""

import ctypes
import random

import numpy as np
import pytest
import tvm_ffi
from native import BF16, F16, INT8, problem, results_of

from ssu_bridge.backends.rows import row
from ssu_bridge.native import library

HUGE = [2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, -1, -(2**31), -(2**63)]
CODES = {"f": 2, "i": 0, "u": 1, "b": 6, "V": 4}


class DLTensor(ctypes.Structure):
    """What an array is to DLPack, and after it what its owner has: nothing."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


# Room for more axes than any array has.
AXES = 64
# Of a library object of our own: others change what the shared one takes.
new_capsule = ctypes.PyDLL(None).PyCapsule_New
new_capsule.restype, new_capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


class Struct:
    """A tensor that is made of numbers; it lives as long as what reads it."""

    def __init__(self, array):
        strides = [step // array.itemsize for step in array.strides]
        self.shape, self.strides = ((ctypes.c_int64 * AXES)(*numbers) for numbers in (array.shape, strides))
        code = 4 if array.dtype.name == "bfloat16" else CODES[array.dtype.kind]
        self.tensor = DLTensor(
            array.ctypes.data, 1, 0, array.ndim, code, 8 * array.itemsize, 1, self.shape, self.strides, 0, None, None
        )

    def __dlpack_device__(self):
        return self.tensor.device_type, self.tensor.device_id

    def __dlpack__(self, **_):
        return new_capsule(ctypes.addressof(self.tensor), b"dltensor", None)


def spoil(draw, struct):
    """Put other bytes into one field, or into one number of the shape or the strides."""
    tensor = struct.tensor
    what = draw.choice(
        ["data", "device_type", "device_id", "ndim", "code", "bits", "lanes", "shape", "strides", "none", "byte_offset"]
    )
    if what in ("shape", "strides"):
        numbers, axis = getattr(struct, what), draw.randrange(max(tensor.ndim, 1))
        numbers[axis] = draw.choice([*HUGE, 0, 1, numbers[axis] + 1, numbers[axis] - 1, draw.getrandbits(63)])
    elif what == "none":
        tensor.strides = ctypes.POINTER(ctypes.c_int64)()
    elif what == "ndim":
        tensor.ndim = draw.choice([0, 1, 2, 3, 4, 5, 6, AXES])
    elif what == "data":
        tensor.data = draw.choice([0, 1, tensor.data + 1, draw.getrandbits(64)])
    elif what == "byte_offset":
        tensor.byte_offset = draw.choice([1, 4, 2**63, draw.getrandbits(64)])
    else:
        bits = {"code": 8, "bits": 8, "lanes": 16}.get(what, 31)
        setattr(tensor, what, draw.choice([0, 1, draw.getrandbits(bits)]))


CALLS = {
    "one token": {},
    "bfloat16": {"state": BF16, "other": F16, "tied": ""},
    "packed": {"packed": True},
    "quantised": {"quantised": True},
}


def call(name):
    """Return the arrays of a right call."""
    rng, options = np.random.default_rng(0), dict(CALLS[name])
    packed, quantised = (options.pop(kind, False) for kind in ("packed", "quantised"))
    arrays = problem(rng, **options)
    if packed:
        arrays |= {
            "cu_seqlens": np.array([0, 1, 2, 3], "int32"),
            "intermediate_states": np.zeros((6, 2, 4, 8, 16), "float32"),
        }
    if quantised:
        arrays |= {"state": np.zeros((6, 4, 8, 16), INT8), "state_scale": np.ones((6, 4, 8), "float32")}
    return arrays


def what_becomes_of(structs, names, check):
    """Say who refuses tensors that are these structs. None is left after it: it looks at its struct when it is let go."""
    try:
        tensors = {name: tvm_ffi.from_dlpack(struct) for name, struct in structs.items()}
    except Exception:  # before any code of ours
        return "refused by TVM-FFI"
    try:
        check(*(tensors[name] for name in names))
    except ValueError:
        return "refused"
    return "accepted"


@pytest.mark.parametrize("name", CALLS)
def test_any_bytes_are_refused_or_accepted(name):
    arrays = call(name)
    check = library().cpu_check([row(argument) for argument in (*arrays, "out")], True, 1, 0, 0)
    counts = {"accepted": 0, "refused": 0, "refused by TVM-FFI": 0}
    for number in range(3000):
        draw = random.Random(number)
        structs = {n: Struct(array) for n, array in {**arrays, "out": arrays["x"].copy()}.items()}
        for n in draw.choices(list(structs), k=draw.choice([0, 1, 1, 1, 2, 3])):
            spoil(draw, structs[n])
        counts[what_becomes_of(structs, (*arrays, *results_of(arrays)), check)] += 1
    assert counts["accepted"] > 300, counts
    assert counts["refused"] > 300, counts
