"""Calls leave nothing behind: neither memory nor XLA FFI targets."""

import gc

import jax
import pytest
from copied import copied
from sharded import run
from thinned import thinned

import ssu_bridge
from ssu_bridge.bench import memory
from ssu_bridge.core.problem import Problem
from ssu_bridge.frontends.jax.ffi_targets import registered
from ssu_bridge.testing.cases import Case

# Where nothing is left behind, it is 160 KB at most.
ALLOWED = 3 * 2**18


@pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
# 16 bytes that each call leaves behind are more than is allowed; nightly: 3 bytes.
@pytest.mark.parametrize(
    ("measure", "calls"),
    [
        (memory.eager, 50_000),
        (memory.traced, 250_000),
        pytest.param(memory.traced, 1_000_000, marks=pytest.mark.nightly),
    ],
)
def test_calls_leave_nothing_behind(measure, calls, device):
    measure(1000)  # which registers the kernel
    before = registered()
    left = measure(calls)
    assert left.resident < ALLOWED
    assert not left.device  # a CPU does not say
    assert registered() == before


# 1,123 bytes a call: less than any state takes that is kept.
# By default each form in one of the frameworks.
@pytest.mark.parametrize(
    ("case", "framework"),
    thinned(memory.FORMS, ["numpy", "torch", "jax"], one_in=3),
    ids=lambda v: getattr(v, "name", v),
)
def test_calls_of_other_forms_leave_nothing_behind(case, framework):
    """Several tokens, prompts, trees, quantised states and replay; docs/benchmarks.md has more calls of each."""
    assert memory.eager(700, case, framework).resident < ALLOWED


def test_calls_of_the_matrix_form_leave_nothing_behind():
    assert memory.eager(700, memory.PROMPT, algorithm="matrix").resident < ALLOWED


# Torch's cache holds so many that filling it takes seconds; that it is bounded is tested where it is.
@pytest.mark.parametrize("framework", ["numpy", pytest.param("torch", marks=pytest.mark.nightly)])
def test_many_shapes_leave_nothing_behind(framework):
    """What is remembered of each shape, about 4 KB, is bounded, and is full before the measurement begins."""
    assert memory.shapes(500, framework).resident < ALLOWED


def test_forgotten_shapes_are_forgotten():
    """Of shapes that JAX has forgotten no more is kept than a fixed number."""

    def trace(number):
        given = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in memory._of_shape(number).items()}
        jax.eval_shape(lambda given: ssu_bridge.update(**given, backend="cpu"), given)

    def kept():
        jax.clear_caches()
        gc.collect()
        return sum(type(one) is Problem for one in gc.get_objects())

    for number in range(350):
        trace(number)
    before = kept()
    assert before > 0
    for number in range(350, 450):
        trace(number)
    assert kept() <= before + 20


def test_few_bytes_that_each_call_leaves_behind_are_seen():
    kept = []
    # 16 bytes and a pointer a call: more in all than earlier tests of the process may have left free.
    leak = memory.growth(lambda count: kept.extend(object() for _ in range(count)), 1_000_000)
    assert leak.resident > ALLOWED


def test_sizes_that_vary_need_no_targets_of_their_own():
    def step(sequences):
        case = Case("sizes", sequences=sequences, slots=sequences + 1, indices=tuple(range(sequences)), headdim=8)
        given = copied(case.arrays(seed=0))
        ssu_bridge.update(**given, **case.flags, backend="cpu")

    step(1)
    before = registered()
    for sequences in range(2, 12):
        step(sequences)
    assert registered() == before


FULL = """
import jax_tvm_ffi
import tvm_ffi
from ssu_bridge.cases import Case
from ssu_bridge.frontends.jax.ffi_targets import registered
case = Case("targets", headdim=8, dstate=16)
arrays = lambda: copied(drawn(case))
another = lambda arrays: ssu_bridge.update(**arrays, dt_softplus=False, backend="cpu")
others = tvm_ffi.convert(lambda *_: None)
while jax_tvm_ffi.registered_count() < 1023:
    jax_tvm_ffi.register_ffi_target(f"other {jax_tvm_ffi.registered_count()}", others, platform="cpu")
expected = step(case, arrays())  # the last that there is room for
assert jax_tvm_ffi.registered_count() == 1024 and len(registered()) == 1
for run_another in (another, jax.jit(another, donate_argnums=0)):
    given = arrays()
    refused("1024 kernels are registered with XLA in this process.*optional arguments and flags", lambda: run_another(given), RuntimeError)
    assert not any(array.is_deleted() for array in given.values())
same(step(case, arrays()), expected)
"""


def test_a_full_table_of_targets_is_an_error_that_says_so():
    run(FULL, devices=1)
