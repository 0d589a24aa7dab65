"""Handing arrays across frameworks: the same memory, for as long as either side holds it."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from modes import address
from torch._subclasses import FakeTensorMode

import ssu_bridge

DTYPES = ["float32", "bfloat16", "float16", "int32", "int8"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_to_torch_is_the_same_memory(dtype):
    array = jnp.arange(24).reshape(2, 3, 4).astype(dtype)
    tensor = ssu_bridge.to_torch(array)
    assert tensor.data_ptr() == address(array)
    assert tuple(tensor.shape) == array.shape
    assert str(tensor.dtype) == f"torch.{dtype}"
    np.testing.assert_array_equal(tensor.float().numpy(), np.arange(24.0).reshape(2, 3, 4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_to_jax_is_the_same_memory(dtype):
    tensor = torch.arange(24).reshape(2, 3, 4).to(getattr(torch, dtype))
    array = ssu_bridge.to_jax(tensor)
    assert address(array) == tensor.data_ptr()
    assert array.shape == tuple(tensor.shape)
    assert array.dtype == dtype
    np.testing.assert_array_equal(array.astype(jnp.float32), np.arange(24.0).reshape(2, 3, 4))


def test_there_and_back():
    array = jnp.arange(8.0)
    assert address(ssu_bridge.to_jax(ssu_bridge.to_torch(array))) == address(array)


def test_a_view_outlives_its_array():
    array = jnp.arange(4096.0)
    tensor = ssu_bridge.to_torch(array)
    del array
    gc.collect()
    others = [jnp.full(4096, 7.0) for _ in range(20)]  # which would take its memory, were it free
    np.testing.assert_array_equal(tensor.numpy(), np.arange(4096.0))
    del others


def test_an_array_outlives_its_tensor():
    tensor = torch.arange(4096.0)
    gone = weakref.ref(tensor)
    array = ssu_bridge.to_jax(tensor)
    del tensor
    gc.collect()
    assert gone() is None or address(array) == gone().data_ptr()
    others = [torch.full((4096,), 7.0) for _ in range(20)]  # which would take its memory, were it free
    np.testing.assert_array_equal(array, np.arange(4096.0))
    del others


def test_a_state_is_donated_again_once_the_view_is_dropped():
    state = jnp.zeros((1, 2, 4, 8))
    rest = (jnp.ones((1, 2, 4)), jnp.ones((1, 2)), -jnp.ones(2), jnp.ones((1, 1, 8)), jnp.ones((1, 1, 8)))
    before = address(state)
    view = ssu_bridge.to_torch(state)
    view[0, 0, 0, 0] = 5.0
    del view
    with ssu_bridge.using(strict_in_place=True):
        out, state = ssu_bridge.update(state, *rest, backend="cpu")
    assert address(state) == before
    assert out[0, 0, 0] == pytest.approx(5 * np.exp(-1) + 8)


def test_what_to_jax_refuses():
    with pytest.raises(TypeError, match=r"tensor: expected a torch\.Tensor, got ndarray"):
        ssu_bridge.to_jax(np.zeros(3))
    with pytest.raises(ValueError, match=r"tensor: expected one that does not require grad.*detach"):
        ssu_bridge.to_jax(torch.zeros(3, requires_grad=True))
    with pytest.raises(ValueError, match=r"tensor: expected a dense row-major tensor, got strides \(1, 3\)"):
        ssu_bridge.to_jax(torch.zeros(2, 3).t())
    with pytest.raises(ValueError, match=r"tensor: expected a tensor that holds its values.*resolve_neg"):
        ssu_bridge.to_jax(torch._neg_view(torch.ones(16)))
    with pytest.raises(ValueError, match="tensor: expected memory aligned to 64 bytes, got address 0x"):
        ssu_bridge.to_jax(torch.zeros(64)[1:])


def without_memory():
    """Return tensors that have no memory of their own that JAX could read, and the errors for them."""
    with FakeTensorMode():
        fake = torch.zeros(64)
    lost = torch.zeros(64)
    lost.untyped_storage().resize_(0)
    return [
        (fake, TypeError, "tensor: expected a plain torch.Tensor.*got FakeTensor"),
        (torch.zeros(64, device="meta"), ValueError, "tensor: expected a tensor that has memory.*meta"),
        (torch._to_functional_tensor(torch.zeros(64)), ValueError, "tensor: expected a tensor that has"),
        (torch._efficientzerotensor((64,)), ValueError, "tensor: expected a tensor that has memory"),
        (lost, ValueError, "tensor: expected a tensor that has memory"),
        (torch.ones(8, 8).to_sparse(), ValueError, "tensor: expected a strided tensor, .*sparse_coo"),
        (
            torch.ones(8, 8).to_sparse_csr(),
            ValueError,
            "tensor: expected a strided tensor, .*sparse_csr",
        ),
        (torch.nested.nested_tensor([torch.ones(3)]), ValueError, "tensor: expected a strided .*nested"),
        (
            torch.quantize_per_tensor(torch.ones(64), 0.1, 0, torch.qint8),
            ValueError,
            "tensor: expected a dtype that JAX has, got qint8",
        ),
        (torch.zeros(64, dtype=torch.complex32), ValueError, "tensor: expected a dtype that JAX has"),
        (torch.ones(64, dtype=torch.complex64).conj(), ValueError, "tensor: .*lazy.*resolve_conj"),
    ]


@pytest.mark.filterwarnings("ignore")
def test_to_jax_refuses_tensors_that_are_not_their_memory():
    for tensor, error, message in without_memory():
        with pytest.raises(error, match=message):
            ssu_bridge.to_jax(tensor)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.complex128, torch.uint64])
@pytest.mark.parametrize("size", [0, 64])
def test_to_jax_of_64_bits_says_what_to_set(dtype, size):
    tensor = torch.zeros(size, dtype=dtype)
    with pytest.raises(ValueError, match="tensor: expected a dtype of at most 32 bits.*jax_enable_x64"):
        ssu_bridge.to_jax(tensor)
    with jax.enable_x64(True):
        array = ssu_bridge.to_jax(tensor)
        assert str(array.dtype) == str(dtype).removeprefix("torch.")
        assert not size or address(array) == tensor.data_ptr()


def test_to_jax_of_no_elements():
    array = ssu_bridge.to_jax(torch.zeros(0, 4, dtype=torch.bfloat16))
    assert (array.shape, array.dtype) == ((0, 4), jnp.bfloat16)


def test_to_jax_inside_a_transform_is_refused():
    with pytest.raises(ssu_bridge.UnsupportedError, match=r"torch\.func\.vmap"):
        torch.func.vmap(lambda x: ssu_bridge.to_jax(x))(torch.zeros(2, 64))


def test_what_to_torch_refuses():
    with pytest.raises(TypeError, match=r"array: expected a jax\.Array, got Tensor"):
        ssu_bridge.to_torch(torch.zeros(3))
    array = jnp.zeros(3)
    array.delete()
    with pytest.raises(ValueError, match="array: expected a live array, got one that was deleted"):
        ssu_bridge.to_torch(array)
    with pytest.raises(ValueError, match="array: expected a concrete array, got a tracer"):
        jax.jit(ssu_bridge.to_torch)(jnp.zeros(3))


def test_a_state_comes_back_from_torch_as_it_is_on_a_cpu():
    state = jnp.zeros((2, 3))
    view = ssu_bridge.to_torch(state)
    view += 1
    assert ssu_bridge.after_torch(state) is state
    pair = ssu_bridge.QuantizedState(jnp.zeros((1, 2), "int8"), jnp.zeros(1))
    assert ssu_bridge.after_torch(pair) is pair


def test_what_does_not_come_back_from_torch():
    with pytest.raises(TypeError, match=r"state: expected a jax\.Array, got Tensor"):
        ssu_bridge.after_torch(torch.zeros(3))
    with pytest.raises(TypeError, match=r"state\.scale: expected a jax\.Array, got ndarray"):
        ssu_bridge.after_torch(ssu_bridge.QuantizedState(jnp.zeros(3), np.zeros(3)))
    with pytest.raises(ValueError, match="state: expected a concrete array, got a tracer"):
        jax.jit(ssu_bridge.after_torch)(jnp.zeros(3))
    first, second = jax.devices("cpu")[:2]
    apart = ssu_bridge.QuantizedState(jax.device_put(np.zeros(3), first), jax.device_put(np.zeros(3), second))
    with pytest.raises(ValueError, match="state: expected values and scale on one device, got .* and "):
        ssu_bridge.after_torch(apart)
    array = jnp.zeros(3)
    array.delete()
    with pytest.raises(ValueError, match="state: expected a live array, got one that was deleted"):
        ssu_bridge.after_torch(array)


@pytest.mark.gpu
def test_jax_waits_for_torch_on_a_gpu_and_the_host_does_not():
    busy = torch.ones(8192, 8192, device="cuda")
    for products in (1, 1, 20):  # the first times code is compiled and loaded and memory had, which waits for the GPU
        state, scale = jnp.zeros((64, 1024)), jnp.zeros(64)
        place = address(state)
        view, view_of_scale = ssu_bridge.to_torch(state), ssu_bridge.to_torch(scale)
        for _ in range(products):  # of about 20 ms
            busy @ busy
        view += 1
        view_of_scale += 2
        done = torch.cuda.Event()
        done.record()
        del view, view_of_scale
        values, scale = ssu_bridge.after_torch(ssu_bridge.QuantizedState(state, scale))
        after = (values + 1, scale + 1)
        waiting = not done.query()
        assert state.is_deleted()
        assert address(values) == place
        np.testing.assert_array_equal(after[0], np.full((64, 1024), 2.0))
        np.testing.assert_array_equal(after[1], np.full(64, 3.0))
        assert done.query()
    assert waiting


@pytest.mark.gpu
def test_a_state_that_torch_still_views_does_not_come_back():
    state = jnp.zeros((64, 1024))
    view = ssu_bridge.to_torch(state)
    with pytest.raises(ValueError, match="state: expected one without views, got one with a live Torch view"):
        ssu_bridge.after_torch(state)
    assert not state.is_deleted()
    del view
    assert ssu_bridge.after_torch(state).shape == (64, 1024)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "context",
    [
        lambda gpu: jax.default_device(jax.devices("cpu")[0]),
        lambda gpu: jax.set_mesh(jax.make_mesh((1,), ("x",), devices=[gpu])),
        lambda gpu: jax.disable_jit(),
    ],
    ids=("another default device", "a mesh", "no jit"),
)
@pytest.mark.parametrize("committed", (True, False))
def test_a_state_comes_back_where_it_is_whatever_the_context(context, committed):
    gpu = jax.devices("gpu")[0]
    state = jax.device_put(jnp.zeros((64, 1024)), gpu if committed else None)
    view = ssu_bridge.to_torch(state)
    view += 1
    place = address(state)
    del view
    with context(gpu):
        after = ssu_bridge.after_torch(state)
    assert after.devices() == {gpu}
    assert after.committed == committed
    assert address(after) == place
    assert state.is_deleted()
    np.testing.assert_array_equal(after, np.ones((64, 1024)))


@pytest.mark.gpu
def test_a_quantised_state_of_which_a_part_is_viewed_is_kept():
    state = ssu_bridge.QuantizedState(jnp.zeros((4, 1024), "int8"), jnp.zeros(4))
    view = ssu_bridge.to_torch(state.scale)
    with pytest.raises(ValueError, match="got one with a live Torch view"):
        ssu_bridge.after_torch(state)
    del view
    np.testing.assert_array_equal(state.values, np.zeros((4, 1024)))
    np.testing.assert_array_equal(state.scale, np.zeros(4))


@pytest.mark.gpu
def test_nothing_waits_while_jax_traces_or_torch_captures():
    state = jnp.zeros((64, 1024))
    torch.ones(1, device="cuda")
    with pytest.raises(ValueError, match="state: expected a call outside of jit"):
        jax.jit(lambda x: x + ssu_bridge.after_torch(state))(1.0)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        torch.ones(1, device="cuda")
        with pytest.raises(ValueError, match="captured in a CUDA graph"):
            ssu_bridge.after_torch(state)
    assert ssu_bridge.after_torch(jnp.zeros((0, 4))).shape == (0, 4)
    np.testing.assert_array_equal(ssu_bridge.after_torch(state), np.zeros((64, 1024)))


@pytest.mark.gpu
def test_states_come_back_from_several_threads():
    def there_and_back(number):
        with torch.cuda.stream(torch.cuda.Stream()):
            state = jnp.full((256, 256), float(number))
            for _ in range(100):
                view = ssu_bridge.to_torch(state)
                view += 1
                del view
                state = ssu_bridge.after_torch(state)
        return np.array(state)

    with ThreadPoolExecutor(8) as pool:
        for number, state in enumerate(pool.map(there_and_back, range(8))):
            np.testing.assert_array_equal(state, np.full((256, 256), number + 100.0))


@pytest.mark.gpu
def test_both_ways_on_a_gpu():
    device = jax.devices("cuda")[0]
    for dtype in DTYPES:
        array = jax.device_put(jnp.arange(64).astype(dtype), device)
        tensor = ssu_bridge.to_torch(array)
        assert tensor.is_cuda
        assert tensor.data_ptr() == address(array)
        back = ssu_bridge.to_jax(tensor.clone())
        assert back.devices() == {device}
        np.testing.assert_array_equal(np.array(back.astype(jnp.float32)), np.arange(64.0))
        own = torch.arange(64, device="cuda").to(getattr(torch, dtype))
        assert address(ssu_bridge.to_jax(own)) == own.data_ptr()


@pytest.mark.gpu
def test_torch_waits_for_jax_and_jax_for_torch():
    x = jax.device_put(jnp.ones((4096, 4096)), jax.devices("cuda")[0])
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, y: (y @ x) / 4096, x) * 3)
    slow(x).block_until_ready()
    tensor = ssu_bridge.to_torch(slow(x))  # not waited for
    assert (tensor == 3).all()
    own = torch.ones(4096, 4096, device="cuda")
    product = own
    for _ in range(20):
        product = product @ own / 4096
    array = ssu_bridge.to_jax(product * 2)
    assert (np.array(array) == 2).all()
