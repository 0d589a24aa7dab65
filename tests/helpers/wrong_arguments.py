"""The table of wrong arguments: how each is made wrong, in which modes, the error's type and what its message must say."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (gives NumPy the dtype "bfloat16")
import numpy as np
import torch
from modes import to_mode
from torch._subclasses import FakeTensorMode

import ssu_bridge
from ssu_bridge.testing.cases import Case

CASE = Case("errors", sequences=3, slots=6, nheads=4, headdim=8, dstate=16, ngroups=2)
MAMBA1 = Case("errors, mamba1", nheads=0, ngroups=1, headdim=8, dstate=16, group_axis=False)
# Its state has the shape that B may have.
LIKE_B = Case("errors, a state like B", nheads=0, ngroups=1, headdim=1, dstate=16, slots=3, indices=(0, 1, 2))
ARRAYS_IN_PLACE = ("numpy", "torch")
ALL = (*ARRAYS_IN_PLACE, "jax", "jax.jit")


class Wrong(NamedTuple):
    """A wrong call.

    Attributes:
        name: what is wrong.
        spoil: makes a right call's arguments wrong, by name; NumPy arrays, or the mode's own if ``converted``.
        error, message: what it must raise, of exactly this type, and what the message must match.
        modes: in which ways of calling it can be made.
        converted: the wrong thing is one of the framework's own.
        case: what the right call is.
    """

    name: str
    spoil: Callable[[dict[str, Any]], dict[str, Any]]
    error: type[Exception]
    message: str
    modes: tuple[str, ...] = ALL
    converted: bool = False
    case: Case = CASE


def replace(**new):
    return lambda arrays: {**arrays, **new}


def change(name, function):
    return lambda arrays: {**arrays, name: function(arrays[name])}


def ones(*shape, dtype="float32"):
    return np.ones(shape, dtype)


def tokens(arrays, count):
    """Give each sequence several tokens."""
    each = {name: np.repeat(arrays[name][:, None], count, axis=1) for name in ("x", "dt", "B", "C", "z")}
    return {**arrays, **each, "out": None}


# What is wrong, how, and what the message must say.
SHAPES = [
    ("state of two axes", change("state", lambda a: a[0, 0]), r"state: expected shape \(slots.*got \(8, 16\)"),
    ("x without channels", change("x", lambda a: a[:, 0, 0]), r"x: expected 3 axes.*got shape \(3,\)"),
    ("x with too many axes", replace(x=ones(3, 1, 1, 4, 8)), r"x: expected 3 axes.*got shape \(3, 1, 1, 4, 8\)"),
    ("x of other heads", replace(x=ones(3, 5, 8)), r"x: expected shape \(sequences, 4, 8\), got \(3, 5, 8\)"),
    ("x of other channels", replace(x=ones(3, 4, 9)), r"x: expected shape \(sequences, 4, 8\), got \(3, 4, 9\)"),
    ("dt of other sequences", replace(dt=ones(2, 4)), r"dt: expected shape \(3, 4, 8\) or \(3, 4\), got \(2, 4\)"),
    ("dt for the batch", replace(dt=ones(3)), r"dt: expected shape \(3, 4, 8\) or \(3, 4\), got \(3,\)"),
    ("A of other heads", replace(A=-ones(5)), r"A: expected shape \(4, 8, 16\) or \(4,\), got \(5,\)"),
    ("A without dstate", replace(A=-ones(4, 8)), r"A: expected shape \(4, 8, 16\) or \(4,\), got \(4, 8\)"),
    ("B of other dstate", replace(B=ones(3, 2, 17)), r"B: expected shape \(3, ngroups, 16\) or .*got \(3, 2, 17\)"),
    ("B of other sequences", replace(B=ones(4, 2, 16)), r"B: expected shape \(3, ngroups, 16\).*got \(4, 2, 16\)"),
    ("groups that do not divide", replace(B=ones(3, 3, 16), C=ones(3, 3, 16)), r"B: expected ngroups to divide.*4.*3"),
    ("no groups", replace(B=ones(3, 0, 16), C=ones(3, 0, 16)), r"B: expected ngroups of at least 1, got 0"),
    ("C without groups", replace(C=ones(3, 16)), r"C: expected shape \(3, 2, 16\), got \(3, 16\)"),
    ("B without groups", replace(B=ones(3, 16)), r"C: expected shape \(3, 1, 16\) or \(3, 16\), got \(3, 2, 16\)"),
    ("no groups beside C without", replace(B=ones(3, 0, 16), C=ones(3, 16)), r"B: expected ngroups of at least 1, got 0"),
    ("groups that do not divide beside C without", replace(B=ones(3, 3, 16), C=ones(3, 16)), r"B: expected ngroups to divide.*4.*3"),
    ("C of other groups", replace(C=ones(3, 1, 16)), r"C: expected shape \(3, 2, 16\).*got \(3, 1, 16\)"),
    ("D of other heads", replace(D=ones(3)), r"D: expected shape \(4, 8\) or \(4,\), got \(3,\)"),
    ("D a scalar", replace(D=ones()), r"D: expected shape .*got \(\)"),
    ("z unlike x", replace(z=ones(3, 4)), r"z: expected shape \(3, 4, 8\), got \(3, 4\)"),
    ("dt_bias of other channels", replace(dt_bias=ones(4, 7)), r"dt_bias: expected shape .*got \(4, 7\)"),
    ("too few indices", replace(state_batch_indices=ones(2, dtype="int32")), r"state_batch_indices: expected shape \(3,\)"),
    ("a destination too many", replace(dst_state_batch_indices=ones(4, dtype="int32")), r"dst_state_batch_indices: .*\(4,\)"),
    ("no indices, few slots", lambda a: {**a, "state": a["state"][:2], "state_batch_indices": None}, r"state: expected at least 3 slots"),
    ("empty headdim", lambda a: {**a, "state": a["state"][:, :, :0], "x": a["x"][..., :0], "z": None, "out": None}, r"state: expected headdim"),
]  # fmt: skip
DTYPES = [
    (f"{name} of {dtype}", change(name, lambda a, d=dtype: a.astype(d)), rf"{name}: expected dtype .*got {dtype}")
    for name, dtype in [
        *((name, "int32") for name in ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")),
        ("x", "bool"),
        ("state_batch_indices", "float32"),
        ("state_batch_indices", "int16"),
        ("state", "uint8"),
        ("state_batch_indices", "bool"),
    ]
]
DTYPES += [
    ("has_initial_state of uint8", replace(has_initial_state=ones(3, dtype="uint8")), r"has_initial_state: expected dtype bool, got uint8"),
    ("parent_tokens of bool", replace(parent_tokens=ones(3, dtype="bool")), r"parent_tokens: expected dtype int32 or int64, got bool"),
]  # fmt: skip
CONTRADICTIONS = [
    ("a bare quantised state", change("state", lambda a: a.astype("int8")), r"state: expected a QuantizedState"),
    ("a scale for a float state", lambda a: {**a, "state": ssu_bridge.QuantizedState(a["state"], ones(6, 4, 8))}, r"state: expected .*plain array"),
    ("destinations, no update", lambda a: {**a, "dst_state_batch_indices": a["state_batch_indices"], "disable_state_update": True}, r"dst_state_batch_indices: expected None with disable_state_update"),
    ("destinations and intermediates", lambda a: {**a, "dst_state_batch_indices": a["state_batch_indices"], "intermediate_states": ones(3, 1, 4, 8, 16)}, r"dst_state_batch_indices: expected None with intermediate"),
    ("entries without a buffer", lambda a: {**a, "intermediate_state_indices": a["state_batch_indices"]}, r"intermediate_state_indices: expected None without"),
    ("intermediates of another dtype", lambda a: {**a, "intermediate_states": ones(3, 1, 4, 8, 16, dtype="float16")}, r"intermediate_states: expected the state's dtype float32"),
    ("accepted counts, 1-D slots", lambda a: {**a, "num_accepted_tokens": a["state_batch_indices"]}, r"num_accepted_tokens: expected a 2-D state_batch_indices with it, got \(\d+,\)"),
    ("fewer steps than tokens", lambda a: {**tokens(a, 3), "intermediate_states": ones(6, 2, 4, 8, 16)}, r"intermediate_states: expected at least 3 steps.*got 2"),
    ("fewer steps than strides", lambda a: {**tokens(a, 6), "intermediate_states": ones(6, 2, 4, 8, 16), "intermediate_stride": 2}, r"intermediate_states: expected at least 3 steps, one for every 2 tokens, got 2"),
    ("a stride without intermediates", replace(intermediate_stride=2), r"intermediate_stride: expected 1 without intermediate_states, got 2"),
    ("a tree with a stride", lambda a: {**tokens(a, 2), "intermediate_states": ones(6, 2, 4, 8, 16), "intermediate_stride": 2, "parent_tokens": ones(3, 2, dtype="int32")}, r"intermediate_stride: expected 1 with parent_tokens, got 2"),
    ("a tree with one destination each", lambda a: {**tokens(a, 2), "parent_tokens": ones(3, 2, dtype="int32"), "dst_state_batch_indices": a["state_batch_indices"]}, r"dst_state_batch_indices: expected a column for each token with parent_tokens.*got shape \(3,\)"),
    ("fewer columns than tokens", lambda a: {**tokens(a, 3), "state_batch_indices": ones(3, 2, dtype="int32")}, r"state_batch_indices: expected at least 3 columns.*got 2"),
    ("packed and with an axis of tokens", lambda a: {**tokens(a, 3), "cu_seqlens": ones(4, dtype="int32")}, r"cu_seqlens: expected None with x of shape"),
    ("cu_seqlens empty", replace(cu_seqlens=ones(0, dtype="int32")), r"cu_seqlens: expected shape \(sequences \+ 1,\), got \(0,\)"),
]  # fmt: skip
TYPES = [
    *((f"no {name}", replace(**{name: None}), rf"{name}: expected .*got None") for name in ("state", "x", "dt", "A", "B", "C")),
    *((f"{name} a number", replace(**{name: 1.5}), rf"{name}: expected .*array, got float") for name in ("x", "dt", "A", "D")),
    ("a list", replace(B=[[1.0]]), r"B: expected .*array, got list"),
    ("a list for indices", replace(state_batch_indices=[0, 1, 2]), r"state_batch_indices: expected .*array, got list"),
    ("dt_softplus a number", replace(dt_softplus=2), r"dt_softplus: expected a Python bool, got 2"),
    ("dt_softplus an array", replace(dt_softplus=ones()), r"dt_softplus: expected a Python bool, got (ndarray|Tensor|ArrayImpl|DynamicJaxprTracer)"),
    ("pad_slot_id an array", replace(pad_slot_id=ones(dtype="int32")), r"pad_slot_id: expected a Python int, got (ndarray|Tensor|ArrayImpl|DynamicJaxprTracer)"),
    ("a stride of half", replace(intermediate_stride=1.5), r"intermediate_stride: expected a Python int, got 1.5"),
    ("a stride of True", replace(intermediate_stride=True), r"intermediate_stride: expected a Python int, got True"),
    ("no update 1 with a tree", lambda a: {**tokens(a, 2), "parent_tokens": ones(3, 2, dtype="int32"), "disable_state_update": 0}, r"disable_state_update: expected a Python bool, got 0"),
    ("pad_slot_id a float", replace(pad_slot_id=-1.5), r"pad_slot_id: expected a Python int, got -1.5"),
    ("pad_slot_id a bool", replace(pad_slot_id=True), r"pad_slot_id: expected a Python int, got True"),
    ("donate None", replace(donate=None), r"donate: expected a Python bool, got None"),
    ("dt_softplus of NumPy", replace(dt_softplus=np.bool_(True)), r"dt_softplus: expected a Python bool, got (np.)?True"),
    ("dt_softplus 1", replace(dt_softplus=1), r"dt_softplus: expected a Python bool, got 1"),
    ("donate 1", replace(donate=1), r"donate: expected a Python bool, got 1"),
    ("pad_slot_id -1.0", replace(pad_slot_id=-1.0), r"pad_slot_id: expected a Python int, got -1.0"),
    ("has_initial_state True", replace(has_initial_state=True), r"has_initial_state: expected .*array, got bool"),
    ("half a quantised state", lambda a: {**a, "state": ssu_bridge.QuantizedState(a["state"].astype("int8"), None)}, r"state: expected a QuantizedState of two arrays"),
    ("a backend that is no name", replace(backend=3), r"backend: expected a string or a Backend, got int"),
    ("a list of backends", replace(backend=["cpu"]), r"backend: expected a string or a Backend, got list"),
]  # fmt: skip
VALUES = [
    ("an unknown backend", replace(backend="cuda"), r"backend: expected one of auto, triton, flashinfer, cpu, xla, reference; got 'cuda'"),
    ("an unknown algorithm", replace(algorithm="fast"), r"algorithm: expected one of auto, loop, matrix, simple.*got 'fast'"),
    ("a stride of 0", replace(intermediate_stride=0), r"intermediate_stride: expected an int from 1 to 2\*\*31 - 1, got 0"),
    ("parents of other sequences", replace(parent_tokens=ones(2, dtype="int32")), r"parent_tokens: expected shape \(3,\), got \(2,\)"),
    ("parents without tokens", lambda a: {**tokens(a, 3), "parent_tokens": ones(3, dtype="int32")}, r"parent_tokens: expected shape \(3, 3\), got \(3,\)"),
    ("a tree of 65", lambda a: {**tokens(a, 65), "parent_tokens": ones(3, 65, dtype="int32")}, r"parent_tokens: expected at most 64 tokens of a sequence, got 65"),
    ("a flag for two", replace(has_initial_state=ones(2, dtype="bool")), r"has_initial_state: expected shape \(3,\), got \(2,\)"),
    ("a pad id of 65 bits", replace(pad_slot_id=2**63), r"pad_slot_id: expected an int of 64 bits"),
    ("a destination table of three axes", replace(dst_state_batch_indices=ones(3, 1, 1, dtype="int32")), r"dst_state_batch_indices: expected shape"),
    ("intermediates of other heads", replace(intermediate_states=ones(6, 1, 5, 8, 16)), r"intermediate_states: expected shape .*got \(6, 1, 5, 8, 16\)"),
    ("intermediate entries of other sequences", replace(intermediate_states=ones(6, 1, 4, 8, 16), intermediate_state_indices=ones(4, dtype="int32")), r"intermediate_state_indices: expected shape \(3,\)"),
    ("a scale of another shape", lambda a: {**a, "state": ssu_bridge.QuantizedState(a["state"].astype("int8"), ones(6, 4))}, r"state_scale: expected shape \(6, 4, 8\), got \(6, 4\)"),
    ("a scale of another dtype", lambda a: {**a, "state": ssu_bridge.QuantizedState(a["state"].astype("int8"), ones(6, 4, 8, dtype="float16"))}, r"state_scale: expected dtype float32, got float16"),
    ("a seed of three words", lambda a: {**a, "state": a["state"].astype("float16"), "rand_seed": ones(3, dtype="uint32")}, r"rand_seed: expected .*got uint32 of shape \(3,\)"),
    ("a seed of int32", lambda a: {**a, "state": a["state"].astype("float16"), "rand_seed": ones(2, dtype="int32")}, r"rand_seed: expected (a uint32.2. array|an int, or one int64).*got int32 of shape \(2,\)"),
    ("rand_seed for float32", replace(rand_seed=np.array([5, 0], "uint32")), r"rand_seed: expected None for a float32 state"),
]  # fmt: skip
WITHOUT_HEADS = [
    ("x of other channels, no heads", replace(x=ones(3, 9)), r"x: expected shape \(sequences, 8\), got \(3, 9\)"),
    ("x with heads, state without", replace(x=ones(3, 1, 4, 8)), r"x: expected 2 axes.*got shape \(3, 1, 4, 8\)"),
    ("tied dt, no heads", replace(dt=ones(3)), r"dt: expected shape \(3, 8\), got \(3,\)"),
    ("tied A, no heads", replace(A=-ones(1)), r"A: expected shape \(8, 16\), got \(1,\)"),
    ("tied D, no heads", replace(D=ones(1)), r"D: expected shape \(8,\), got \(1,\)"),
    ("groups, no heads", replace(B=ones(3, 2, 16)), r"B: expected shape \(3, 1, 16\) or \(3, 16\), got \(3, 2, 16\)"),
]
OUT = [
    ("out of another shape", replace(out=ones(3, 4, 9)), r"out: expected shape \(3, 4, 8\), got \(3, 4, 9\)"),
    ("out of int32", replace(out=ones(3, 4, 8, dtype="int32")), r"out: expected dtype .*got int32"),
    (
        "out of another dtype",
        replace(out=ones(3, 4, 8, dtype="float16")),
        r"out: expected x's dtype float32, got float16",
    ),
]


def read_only(array):
    array = array.copy()
    array.setflags(write=False)
    return array


def misaligned(array):
    """Copy an array to an odd address."""
    return np.frombuffer(b"x" + array.tobytes(), array.dtype, offset=1).reshape(array.shape)


def fake(tensor):
    return FakeTensorMode().from_tensor(tensor)


def without_memory(tensor):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def deleted(array):
    array.delete()
    return array


def donated(arguments):
    ssu_bridge.update(**arguments)
    return arguments


def out_in_the_state(arguments):
    return {**arguments, "out": arguments["state"].view(-1)[-3 * 4 * 8 :].view(3, 4, 8)}


def on_device(number):
    return lambda array: jax.device_put(array, jax.devices("cpu")[number])


def every_other(array):
    """Return the values with a gap behind each entry of the last axis."""
    return array.repeat(2, -1)[..., ::2] if isinstance(array, np.ndarray) else torch.stack([array, array], -1)[..., 0]


def turned(array):
    """Return the values with the last two axes in each other's place in memory."""
    swap = (*range(array.ndim - 2), array.ndim - 1, array.ndim - 2)
    if isinstance(array, np.ndarray):
        return np.ascontiguousarray(array.transpose(swap)).transpose(swap)
    return array.permute(swap).contiguous().permute(swap)


# Of the arrays' own kind, in the modes that have them.
STRIDED = [
    *((f"{name} with gaps", change(name, every_other), rf"{name}: expected .* to be dense") for name in ("x", "B", "A", "state")),
    *((f"{name} turned", change(name, turned), rf"{name}: expected .* to be dense") for name in ("x", "state")),
]  # fmt: skip
NUMPY = [
    ("a read-only state", change("state", read_only), ValueError, r"state: expected a writeable array.*read-only"),
    ("a read-only out", lambda a: {**a, "out": read_only(a["x"])}, ValueError, r"out: expected a writeable array.*read-only"),
    ("foreign byte order", change("x", lambda a: a.astype(">f4")), ValueError, r"x: expected dtype .*got >f4"),
    ("elements at odd addresses", change("x", misaligned), ValueError, r"x: expected elements aligned to their size"),
    ("a masked array", change("dt", np.ma.masked_array), TypeError, r"dt: expected a JAX, Torch or NumPy array, got numpy.*MaskedArray"),
    ("a matrix", change("dt", np.asmatrix), TypeError, r"dt: expected a JAX, Torch or NumPy array, got numpy.*matrix"),
]  # fmt: skip
TORCH = [
    ("a state that repeats a slot", change("state", lambda t: t[:1].expand(6, -1, -1, -1)), ValueError, r"state: expected memory that does not overlap"),
    ("D that repeats a head", change("D", lambda t: t[:1].expand(4)), ValueError, r"D: expected .* to be dense"),
    ("a sparse tensor", change("D", torch.Tensor.to_sparse), ValueError, r"D: expected a strided tensor, got layout torch\.sparse"),
    ("a tensor without memory of its own", change("B", fake), TypeError, r"B: expected a plain torch\.Tensor.*got FakeTensor"),
    ("a lazy negation", change("B", torch._neg_view), ValueError, r"B: expected a tensor that holds its values.*resolve_neg"),
    ("a tensor that lost its memory", change("x", without_memory), ValueError, r"x: expected a tensor that has memory"),
    ("out in the state's memory", out_in_the_state, ValueError, r"out: expected memory apart from that of state, which is updated in place"),
    ("a tensor on another device", change("C", lambda t: t.to("meta")), ValueError, r"C: expected an array on cpu, where the state is, got one on meta"),
    *((f"{name} requires grad", change(name, lambda t: t.clone().requires_grad_()), ssu_bridge.UnsupportedError, rf"{name}: it requires grad.*no_grad") for name in ("state", "x", "dt", "B", "C", "z")),
]  # fmt: skip
JAX_EAGER = [
    *((f"{name} deleted", change(name, deleted), ValueError, rf"{name}: expected a live array, got one that was deleted") for name in ("state", "x", "C", "D")),
    ("a state that was donated", donated, ValueError, r"state: expected a live array.*donated to an earlier call"),
    ("numpy of foreign byte order", replace(x=ones(3, 4, 8, dtype=">f4")), ValueError, r"x: expected numbers in this machine's byte order, got dtype >f4"),
    ("C on another device", lambda a: change("C", on_device(1))({n: on_device(0)(v) if hasattr(v, "devices") else v for n, v in a.items()}), ValueError, r"C: expected an array on .*0, where state is, got one on .*1"),
    ("D on another device than x", lambda a: change("D", on_device(1))(change("x", on_device(0))(a)), ValueError, r"D: expected an array on .*0, where x is, got one on .*1"),
]  # fmt: skip
JAX = [
    ("out for JAX", lambda a: {**a, "out": jnp.zeros((3, 4, 8))}, TypeError, r"out: expected None with JAX arrays"),
    ("a key of another kind", lambda a: {**a, "state": a["state"].astype("float16"), "rand_seed": jax.random.key(1, impl="rbg")}, TypeError, r"rand_seed: expected one key of two uint32 words, got keys of dtype key<rbg>"),
    ("keys for numbers", lambda a: {**a, "D": jax.random.split(jax.random.key(1), 4)}, TypeError, r"D: expected dtype float32 or bfloat16 or float16, got a JAX key of dtype key<fry>"),
]  # fmt: skip


def mixed(name, framework):
    """Put one array into another framework."""
    return lambda a: {**a, name: to_mode({name: CASE.arrays(seed=1)[name]}, framework)[name]}


# One array of another framework than the others; but NumPy arrays may stand beside a JAX state.
MIXED = [
    Wrong(
        f"{name} of {other} among {mode}",
        mixed(name, other),
        TypeError,
        r"\w+: expected a (numpy|torch|jax) array, as the other arguments are, got a",
        (mode,),
        converted=True,
    )
    for mode, other in itertools.permutations(("numpy", "torch", "jax"), 2)
    for name in ("state", "x", "A", "D", "state_batch_indices")
    if ((other, mode) if name == "state" else (mode, other)) != ("jax", "numpy")
]

TABLE = [
    *(Wrong(name, spoil, ValueError, message) for name, spoil, message in (*SHAPES, *DTYPES, *CONTRADICTIONS, *VALUES)),
    *(Wrong(name, spoil, TypeError, message) for name, spoil, message in TYPES),
    *(Wrong(name, spoil, ValueError, message, case=MAMBA1) for name, spoil, message in WITHOUT_HEADS),
    *(Wrong(name, spoil, ValueError, message, ARRAYS_IN_PLACE) for name, spoil, message in OUT),
    Wrong("donate=False", replace(donate=False), TypeError, r"donate: expected True with Torch and NumPy", ARRAYS_IN_PLACE),
    *(Wrong(name, spoil, ValueError, message, ARRAYS_IN_PLACE, converted=True) for name, spoil, message in STRIDED),
    *(Wrong(*row, ("numpy",), converted=True) for row in NUMPY),
    *(Wrong(*row, ("torch",), converted=True) for row in TORCH),
    *(Wrong(*row, ("jax",), converted=True) for row in JAX_EAGER),
    *(Wrong(*row, ("jax", "jax.jit"), converted=True) for row in JAX),
    Wrong(
        "the state given twice",
        lambda a: {**a, "B": a["state"]},
        ValueError,
        r"B: expected an array of its own, got the state",
        ("jax",),
        converted=True,
        case=LIKE_B,
    ),
    Wrong(
        "the state's memory given twice",
        lambda a: {**a, "B": jax.device_put(a["state"], a["state"].device, may_alias=True)},
        ValueError,
        r"B: expected an array of its own, got one with the memory of the state, which is given up",
        ("jax",),
        converted=True,
        case=LIKE_B,
    ),
    Wrong(
        "a reference given twice",
        lambda a: (lambda state: {**a, "state": state, "B": state})(jax.new_ref(a["state"])),
        ValueError,
        r"state: expected a jax\.Ref of its own, got the one that is passed as B",
        ("jax",),
        converted=True,
        case=LIKE_B,
    ),
    *MIXED,
]  # fmt: skip
