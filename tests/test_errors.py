"""Wrong arguments: the right type of error, naming the argument, what was expected and what came; nothing written."""

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (gives NumPy the dtype "bfloat16")
import numpy as np
import pytest
import torch
from modes import bits, convert, poisoned, to_host, to_mode
from torch._subclasses import FakeTensorMode

import ssu_bridge
from ssu_bridge.cases import Case

CASE = Case("errors", sequences=3, slots=6, nheads=4, headdim=8, dstate=16, ngroups=2)
MAMBA1 = Case("errors, mamba1", nheads=0, ngroups=1, headdim=8, dstate=16, group_axis=False)


def replace(**new):
    return lambda arrays: {**arrays, **new}


def change(name, function):
    return lambda arrays: {**arrays, name: function(arrays[name])}


def ones(*shape, dtype="float32"):
    return np.ones(shape, dtype)


# What is wrong, how the arguments are made wrong, the error's type, and what its message must say.
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
    ("C of other groups", replace(C=ones(3, 1, 16)), r"C: expected shape \(3, 2, 16\).*got \(3, 1, 16\)"),
    ("D of other heads", replace(D=ones(3)), r"D: expected shape \(4, 8\) or \(4,\), got \(3,\)"),
    ("D a scalar", replace(D=ones()), r"D: expected shape .*got \(\)"),
    ("z unlike x", replace(z=ones(3, 4)), r"z: expected shape \(3, 4, 8\), got \(3, 4\)"),
    ("dt_bias of other channels", replace(dt_bias=ones(4, 7)), r"dt_bias: expected shape .*got \(4, 7\)"),
    ("too few indices", replace(state_batch_indices=ones(2, dtype="int32")), r"state_batch_indices: expected shape \(3,\)"),
    ("a destination too many", replace(dst_state_batch_indices=ones(4, dtype="int32")), r"dst_state_batch_indices: .*\(4,\)"),
    ("no indices, few slots", lambda a: {**a, "state": a["state"][:2], "state_batch_indices": None}, r"state: expected at least 3 slots"),
    ("empty headdim", lambda a: {**a, "state": a["state"][:, :, :0], "x": a["x"][..., :0], "z": None}, r"state: expected headdim"),
]  # fmt: skip
DTYPES = [
    (f"{name} of {dtype}", change(name, lambda a, d=dtype: a.astype(d)), rf"{name}: expected dtype .*got {dtype}")
    for name, dtype in [
        *((name, "int32") for name in ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")),
        ("x", "bool"),
        ("state_batch_indices", "float32"),
        ("state_batch_indices", "int16"),
        ("state", "uint8"),
    ]
]
CONTRADICTIONS = [
    ("a bare quantised state", change("state", lambda a: a.astype("int8")), r"state: expected a QuantizedState"),
    ("a scale for a float state", lambda a: {**a, "state": ssu_bridge.QuantizedState(a["state"], ones(6, 4, 8))}, r"state: expected .*plain array"),
    ("destinations, no update", lambda a: {**a, "dst_state_batch_indices": a["state_batch_indices"], "disable_state_update": True}, r"dst_state_batch_indices: expected None with disable_state_update"),
    ("destinations and intermediates", lambda a: {**a, "dst_state_batch_indices": a["state_batch_indices"], "intermediate_states": ones(3, 1, 4, 8, 16)}, r"dst_state_batch_indices: expected None with intermediate"),
    ("entries without a buffer", lambda a: {**a, "intermediate_state_indices": a["state_batch_indices"]}, r"intermediate_state_indices: expected None without"),
    ("intermediates of another dtype", lambda a: {**a, "intermediate_states": ones(3, 1, 4, 8, 16, dtype="float16")}, r"intermediate_states: expected the state's dtype float32"),
    ("accepted counts, 1-D slots", lambda a: {**a, "num_accepted_tokens": a["state_batch_indices"]}, r"num_accepted_tokens: expected a 2-D state_batch_indices"),
    ("fewer steps than tokens", lambda a: {**tokens(a, 3), "intermediate_states": ones(6, 2, 4, 8, 16)}, r"intermediate_states: expected at least 3 steps.*got 2"),
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
    ("pad_slot_id a float", replace(pad_slot_id=-1.5), r"pad_slot_id: expected a Python int, got -1.5"),
    ("pad_slot_id a bool", replace(pad_slot_id=True), r"pad_slot_id: expected a Python int, got True"),
    ("donate None", replace(donate=None), r"donate: expected a Python bool, got None"),
    ("dt_softplus 1", replace(dt_softplus=1), r"dt_softplus: expected a Python bool, got 1"),
    ("donate 1", replace(donate=1), r"donate: expected a Python bool, got 1"),
    ("pad_slot_id -1.0", replace(pad_slot_id=-1.0), r"pad_slot_id: expected a Python int, got -1.0"),
    ("half a quantised state", lambda a: {**a, "state": ssu_bridge.QuantizedState(a["state"].astype("int8"), None)}, r"state: expected a QuantizedState of two arrays"),
    ("a backend that is no name", replace(backend=3), r"backend: expected a string or a Backend, got int"),
    ("a list of backends", replace(backend=["cpu"]), r"backend: expected a string or a Backend, got list"),
]  # fmt: skip
VALUES = [
    ("an unknown backend", replace(backend="cuda"), r"backend: expected one of auto, triton, cpu, xla, reference; got 'cuda'"),
    ("an unknown algorithm", replace(algorithm="fast"), r"algorithm: expected one of auto, simple.*got 'fast'"),
    ("a pad id of 65 bits", replace(pad_slot_id=2**63), r"pad_slot_id: expected an int of 64 bits"),
    ("a destination table of three axes", replace(dst_state_batch_indices=ones(3, 1, 1, dtype="int32")), r"dst_state_batch_indices: expected shape"),
    ("intermediates of other heads", replace(intermediate_states=ones(6, 1, 5, 8, 16)), r"intermediate_states: expected shape .*got \(6, 1, 5, 8, 16\)"),
    ("intermediate entries of other sequences", replace(intermediate_states=ones(6, 1, 4, 8, 16), intermediate_state_indices=ones(4, dtype="int32")), r"intermediate_state_indices: expected shape \(3,\)"),
    ("a scale of another shape", lambda a: {**a, "state": ssu_bridge.QuantizedState(a["state"].astype("int8"), ones(6, 4))}, r"state_scale: expected shape \(6, 4, 8\), got \(6, 4\)"),
    ("a scale of another dtype", lambda a: {**a, "state": ssu_bridge.QuantizedState(a["state"].astype("int8"), ones(6, 4, 8, dtype="float16"))}, r"state_scale: expected dtype float32, got float16"),
    ("a seed of three words", lambda a: {**a, "state": a["state"].astype("float16"), "rand_seed": ones(3, dtype="uint32")}, r"rand_seed: expected shape .*got \(3,\)"),
    ("rand_seed for float32", replace(rand_seed=np.array([5, 0], "uint32")), r"rand_seed: expected None for a float32 state"),
]  # fmt: skip
TABLE = [
    *((*row[:2], ValueError, row[2]) for row in (*SHAPES, *DTYPES, *CONTRADICTIONS, *VALUES)),
    *((*row[:2], TypeError, row[2]) for row in TYPES),
]


def tokens(arrays, count):
    """Give each sequence several tokens."""
    each = {name: np.repeat(arrays[name][:, None], count, axis=1) for name in ("x", "dt", "B", "C", "z")}
    return {**arrays, **each}


def call(mode, arguments):
    """Call ``update`` in a mode with arguments of which some are NumPy arrays of the case."""
    if mode != "jax.jit":
        return ssu_bridge.update(**arguments)
    arrays = {name: value for name, value in arguments.items() if isinstance(value, jax.Array)}
    flags = {name: value for name, value in arguments.items() if name not in arrays}
    return jax.jit(functools.partial(ssu_bridge.update, **flags), donate_argnames="state")(**arrays)


def assert_refused(mode, arguments, error, message):
    """Assert that a call raises, with nothing written and nothing donated."""
    arrays = {name: value for name, value in arguments.items() if name != "out" and hasattr(value, "dtype")}
    before = to_host(arrays, mode)
    if mode in ("numpy", "torch") and hasattr(arguments["x"], "dtype") and "out" not in arguments:
        dtype = arguments["x"].dtype
        if dtype in (np.float32, torch.float32):
            arguments = {**arguments, "out": poisoned(arguments["x"])}
    with pytest.raises(error, match=message) as caught:
        call(mode, arguments)
    assert caught.type is error
    for name, after in to_host(arrays, mode).items():
        np.testing.assert_array_equal(bits(after), bits(before[name]), err_msg=name)
    out = arguments.get("out")
    if isinstance(out, np.ndarray | torch.Tensor):
        assert np.isnan(np.asarray(out)).all()


@pytest.mark.parametrize("mode", ("numpy", "torch", "jax", "jax.jit"))
@pytest.mark.parametrize(("spoil", "error", "message"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_wrong_argument(mode, spoil, error, message):
    arguments = {**CASE.arrays(seed=1), **CASE.flags}
    call(mode, convert({**CASE.arrays(seed=1), **CASE.flags}, mode))  # a right call before it changes nothing
    assert_refused(mode, convert(spoil(arguments), mode), error, message)


@pytest.mark.parametrize("mode", ("numpy", "torch", "jax", "jax.jit"))
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (replace(x=ones(3, 9)), r"x: expected shape \(sequences, 8\), got \(3, 9\)"),
        (replace(x=ones(3, 1, 4, 8)), r"x: expected 2 axes.*got shape \(3, 1, 4, 8\)"),
        (replace(dt=ones(3)), r"dt: expected shape \(3, 8\), got \(3,\)"),
        (replace(A=-ones(1)), r"A: expected shape \(8, 16\), got \(1,\)"),
        (replace(D=ones(1)), r"D: expected shape \(8,\), got \(1,\)"),
        (replace(B=ones(3, 2, 16)), r"B: expected shape \(3, 1, 16\) or \(3, 16\), got \(3, 2, 16\)"),
    ],
)
def test_wrong_shape_without_heads(mode, spoil, message):
    arguments = {**MAMBA1.arrays(seed=1), **MAMBA1.flags}
    assert_refused(mode, convert(spoil(arguments), mode), ValueError, message)


FRAMEWORKS = ("numpy", "torch", "jax")


# The framework of one array, that of the others, and which array it is; but NumPy arrays may stand beside a JAX state.
MIXED = [
    (mode, other, name)
    for mode, other in itertools.permutations(FRAMEWORKS, 2)
    for name in ("state", "x", "A", "D", "state_batch_indices")
    if ((other, mode) if name == "state" else (mode, other)) != ("jax", "numpy")
]


@pytest.mark.parametrize(("mode", "other", "name"), MIXED)
def test_mixed_frameworks(mode, other, name):
    arrays = CASE.arrays(seed=2)
    arguments = {**to_mode(arrays, mode), name: to_mode({name: arrays[name]}, other)[name]}
    state = arguments["state"]
    # Beside NumPy arrays, the odd one out is the state or what is not NumPy's.
    with pytest.raises(TypeError, match=r"\w+: expected a (numpy|torch|jax) array, as the other arguments are, got a"):
        ssu_bridge.update(**arguments, **CASE.flags)
    held = to_host({"state": state}, other if name == "state" else mode)["state"]
    np.testing.assert_array_equal(bits(held), bits(arrays["state"]))


def test_a_deleted_jax_array_is_named():
    for name in ("state", "x", "C", "D"):
        arrays = to_mode(CASE.arrays(seed=3), "jax")
        arrays[name].delete()
        with pytest.raises(ValueError, match=rf"{name}: expected a live array, got one that was deleted"):
            ssu_bridge.update(**arrays, **CASE.flags)
        assert name == "state" or not arrays["state"].is_deleted()


def test_a_state_that_was_donated_is_named():
    arrays = to_mode(CASE.arrays(seed=3), "jax")
    ssu_bridge.update(**arrays, **CASE.flags)
    with pytest.raises(ValueError, match="state: expected a live array.*donated to an earlier call"):
        ssu_bridge.update(**arrays, **CASE.flags)


def test_out_is_not_for_jax():
    arrays = to_mode(CASE.arrays(seed=3), "jax")
    with pytest.raises(TypeError, match="out: expected None with JAX arrays"):
        ssu_bridge.update(**arrays, **CASE.flags, out=jnp.zeros((3, 4, 8)))
    assert not arrays["state"].is_deleted()


@pytest.mark.parametrize("mode", ("numpy", "torch"))
@pytest.mark.parametrize(
    ("out", "message"),
    [
        (ones(3, 4, 9), r"out: expected shape \(3, 4, 8\), got \(3, 4, 9\)"),
        (ones(3, 4, 8, dtype="int32"), r"out: expected dtype .*got int32"),
        (ones(3, 4, 8, dtype="float16"), r"out: expected x's dtype float32, got float16"),
    ],
)
def test_wrong_out(mode, out, message):
    arrays = {**CASE.arrays(seed=4), "out": out}
    arguments = {**convert(arrays, mode), **CASE.flags}
    with pytest.raises(ValueError, match=message):
        ssu_bridge.update(**arguments)
    np.testing.assert_array_equal(np.asarray(arguments["out"]), out)
    np.testing.assert_array_equal(bits(np.asarray(arguments["state"])), bits(arrays["state"]))


def test_arrays_that_numpy_must_not_write_or_cannot_align():
    arrays = CASE.arrays(seed=5)
    arrays["state"].setflags(write=False)
    with pytest.raises(ValueError, match="state: expected a writeable array.*read-only"):
        ssu_bridge.update(**arrays, **CASE.flags)
    out = np.zeros_like(arrays["x"])
    out.setflags(write=False)
    with pytest.raises(ValueError, match="out: expected a writeable array.*read-only"):
        ssu_bridge.update(**CASE.arrays(seed=5), **CASE.flags, out=out)
    swapped = {**CASE.arrays(seed=5), "x": CASE.arrays(seed=5)["x"].astype(">f4")}
    with pytest.raises(ValueError, match="x: expected dtype .*got >f4"):
        ssu_bridge.update(**swapped, **CASE.flags)
    odd = np.zeros(3 * 4 * 8 * 4 + 1, np.uint8)[1:].view(np.float32).reshape(3, 4, 8)
    with pytest.raises(ValueError, match="x: expected elements aligned to their size"):
        ssu_bridge.update(**{**CASE.arrays(seed=5), "x": odd}, **CASE.flags)


@pytest.mark.parametrize(
    ("name", "view", "message"),
    [
        ("x", lambda t: t.repeat(1, 1, 2)[..., ::2], "x: expected .* to be dense"),
        ("x", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), "x: expected .* to be dense"),
        ("state", lambda t: t.transpose(2, 3).contiguous().transpose(2, 3), "state: expected .* to be dense"),
        ("state", lambda t: t[:1].expand(6, -1, -1, -1), "state: expected memory that does not overlap"),
        ("B", lambda t: t.repeat(1, 1, 2)[..., ::2], "B: expected .* to be dense"),
        ("A", lambda t: t.repeat(2)[::2], "A: expected .* to be dense"),
        ("D", lambda t: t[:1].expand(4), "D: expected .* to be dense"),
    ],
)
def test_strides_that_no_kernel_takes(name, view, message):
    tensors = to_mode(CASE.arrays(seed=6), "torch")
    tensors[name] = view(tensors[name])
    before = tensors["state"].clone()
    with pytest.raises(ValueError, match=message):
        ssu_bridge.update(**tensors, **CASE.flags)
    assert torch.equal(tensors["state"], before)


def test_a_sparse_tensor():
    tensors = to_mode(CASE.arrays(seed=6), "torch")
    tensors["D"] = tensors["D"].to_sparse()
    with pytest.raises(ValueError, match=r"D: expected a strided tensor, got layout torch\.sparse"):
        ssu_bridge.update(**tensors, **CASE.flags)


def test_a_tensor_without_memory_of_its_own():
    tensors = to_mode(CASE.arrays(seed=6), "torch")
    before = tensors["state"].clone()
    with FakeTensorMode() as mode:
        fake = {**tensors, "B": mode.from_tensor(tensors["B"])}
        with pytest.raises(TypeError, match=r"B: expected a plain torch\.Tensor.*got FakeTensor"):
            ssu_bridge.update(**fake, **CASE.flags)
    lazy = {**tensors, "B": torch._neg_view(tensors["B"])}
    with pytest.raises(ValueError, match=r"B: expected a tensor that holds its values.*resolve_neg"):
        ssu_bridge.update(**lazy, **CASE.flags)
    assert torch.equal(tensors["state"], before)


def test_a_tensor_that_lost_its_memory():
    tensors = {name: tensor.clone() for name, tensor in to_mode(CASE.arrays(seed=6), "torch").items()}
    before = tensors["state"].clone()
    ssu_bridge.update(**{**tensors, "state": before.clone()}, **CASE.flags)
    tensors["x"].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="x has no memory"):
        ssu_bridge.update(**tensors, **CASE.flags)
    assert torch.equal(tensors["state"], before)


def test_out_in_the_states_memory():
    tensors = to_mode(CASE.arrays(seed=6), "torch")
    before = tensors["state"].clone()
    out = tensors["state"].view(-1)[-3 * 4 * 8 :].view(3, 4, 8)
    with pytest.raises(ValueError, match="out: expected memory apart from the state's"):
        ssu_bridge.update(**tensors, **CASE.flags, out=out)
    assert torch.equal(tensors["state"], before)


def test_the_state_is_given_once():
    mamba1 = Case("twice", nheads=0, ngroups=1, headdim=1, dstate=16, slots=3, indices=(0, 1, 2))
    arrays = to_mode(mamba1.arrays(seed=6), "jax")
    with pytest.raises(ValueError, match="B: expected an array of its own, got the state"):
        ssu_bridge.update(**{**arrays, "B": arrays["state"]}, **mamba1.flags)
    assert not arrays["state"].is_deleted()


def test_seeds_and_keys_that_jax_does_not_take():
    arrays = to_mode(CASE.arrays(seed=6), "jax")
    arrays["state"] = arrays["state"].astype("float16")
    with pytest.raises(TypeError, match=r"rand_seed: expected a uint32\[2\] array or a jax.random.key, got int 5"):
        ssu_bridge.explain(**arrays, rand_seed=5)
    with pytest.raises(TypeError, match="rand_seed: expected uint32 numbers, got keys of key<rbg>"):
        ssu_bridge.update(**arrays, rand_seed=jax.random.key(1, impl="rbg"))
    with pytest.raises(TypeError, match="D: expected float16 numbers, got keys of key<fry>"):
        ssu_bridge.update(**{**arrays, "D": jax.random.split(jax.random.key(1), 4)})
    assert not arrays["state"].is_deleted()


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_numpy_arrays_that_are_more_than_arrays():
    arrays = CASE.arrays(seed=6)
    for odd in (np.ma.masked_array(arrays["dt"]), np.asmatrix(arrays["dt"])):
        with pytest.raises(
            TypeError, match=r"dt: expected a JAX, Torch or NumPy array, got numpy.*(MaskedArray|matrix)"
        ):
            ssu_bridge.update(**{**arrays, "dt": odd}, **CASE.flags)


def test_numpy_of_foreign_byte_order_beside_jax():
    arrays = to_mode(CASE.arrays(seed=6), "jax")
    with pytest.raises(ValueError, match="x: expected numbers in this machine's byte order, got dtype >f4"):
        ssu_bridge.update(**{**arrays, "x": np.ones((3, 4, 8), ">f4")}, **CASE.flags)


@pytest.mark.parametrize("mode", ["numpy", "torch"])
def test_donate_is_for_jax(mode):
    arguments = {**to_mode(CASE.arrays(seed=6), mode), **CASE.flags, "donate": False}
    assert_refused(mode, arguments, TypeError, "donate: expected True with Torch and NumPy arrays.*got False")


def test_a_tensor_on_another_device():
    tensors = to_mode(CASE.arrays(seed=6), "torch")
    tensors["C"] = tensors["C"].to("meta")
    with pytest.raises(ValueError, match="C: expected an array on cpu, where the state is, got one on meta"):
        ssu_bridge.update(**tensors, **CASE.flags)


def test_a_tracer_is_no_flag():
    arrays = to_mode(CASE.arrays(seed=7), "jax")

    @jax.jit
    def run(arrays, pad):
        return ssu_bridge.update(**arrays, pad_slot_id=pad)

    with pytest.raises(TypeError, match=r"pad_slot_id: expected a Python int, got \w*Tracer"):
        run(arrays, 1)
