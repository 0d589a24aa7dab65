"""The native cache of kernels by the signatures of calls."""

import threading

import pytest
import torch

from ssu_bridge.core.arguments import VECTOR_BYTES
from ssu_bridge.native import library


def cache(written=(), limit=8):
    """Return the cache's two functions, and the list of the arguments that kernels were called with."""
    run, add, _ = library().signature_cache(list(written), limit, VECTOR_BYTES)
    return run, add, []


def kernel(seen, name):
    return lambda *tensors: seen.append((name, *[tensor.shape[0] for tensor in tensors]))


def test_a_kernel_runs_for_its_signature_alone():
    run, add, seen = cache([1])
    out, x, y = torch.zeros(5), torch.zeros(3, 4), torch.zeros(4)
    assert not run(out, x, None, y)
    add(kernel(seen, "first"), out, x, None, y)
    assert run(out, x, None, y)
    assert run(out.clone(), torch.ones(3, 4), None, y.clone())
    others = [(x, y, None), (x, None), (x, None, y, y), (x[:2], None, y), (x.half(), None, y), (x.t(), None, y)]
    for other in (*others, (torch.zeros(3, 8)[:, ::2], None, y)):
        assert not run(out, *other)
    assert not run(out[:4], x, None, y)
    assert seen == [("first", 3, 4, 5, 3)] * 2


def test_each_signature_has_its_kernel():
    run, add, seen = cache(limit=16)
    tensors = [torch.zeros(n, dtype=dtype) for n in range(1, 9) for dtype in (torch.float32, torch.float16)]
    for i, tensor in enumerate(tensors):
        add(kernel(seen, i), tensor)
    add(kernel(seen, "late"), tensors[0])  # which has one
    for tensor in tensors:
        assert run(tensor)
    assert seen == [(i, tensor.shape[0]) for i, tensor in enumerate(tensors)]


def test_a_full_cache_forgets():
    run, add, seen = cache(limit=2)
    one, two, three = (torch.zeros(n) for n in (1, 2, 3))
    for tensor in (one, two, three):
        add(kernel(seen, "kernel"), tensor)
    assert [run(tensor) for tensor in (one, two, three)] == [False, False, True]


def test_written_arguments_come_again_where_they_are_there():
    run, add, seen = cache([3, 1])
    tensors = [torch.zeros(n) for n in (1, 2, 3, 4)]
    add(kernel(seen, "all"), *tensors)
    add(kernel(seen, "fewer"), *tensors[:2], None, None)
    add(kernel(seen, "short"), *tensors[:2])
    assert run(*tensors)
    assert run(*tensors[:2], None, None)
    assert run(*tensors[:2])
    assert seen == [("all", 2, 3, 4, 1, 4, 2), ("fewer", 2, 1, 2), ("short", 2, 1, 2)]


def test_wrong_numbers():
    with pytest.raises(ValueError, match="expected places of arguments from 1 on, got 0"):
        library().signature_cache([0], 8, VECTOR_BYTES)
    with pytest.raises(ValueError, match="expected a limit of at least 1, got 0"):
        library().signature_cache([], 0, VECTOR_BYTES)
    for size in (0, -16, 24):
        with pytest.raises(ValueError, match=f"expected vectors of a power of two bytes, got {size}"):
            library().signature_cache([], 1, size)
    run, add, _ = cache()
    with pytest.raises(ValueError, match="expected 1 to 32 arguments, got 0"):
        run()
    with pytest.raises(ValueError, match="expected 1 to 32 arguments, got 33"):
        add(lambda *_: None, *[None] * 33)
    with pytest.raises(TypeError, match="expected a kernel and its arguments"):
        add()


def test_from_many_threads():
    run, add, seen = cache(limit=3)  # fewer than there are signatures
    tensors = [torch.zeros(n) for n in (1, 2, 3, 4)]

    def work(place):
        for _ in range(50):
            if not run(tensors[place]):
                add(kernel(seen, place + 1), tensors[place])

    threads = [threading.Thread(target=work, args=(i % 4,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen
    assert all(name == size for name, size in seen)
