"""What JAX does to a function that calls ``update``: references, control flow, compiling ahead, threads, gradients."""

import dataclasses
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from modes import GPU_BACKENDS, bits, skip_if_refused, to_mode
from sharded import run

import ssu_bridge
from ssu_bridge.api import explain
from ssu_bridge.testing.cases import Case

CASE = Case("transforms", headdim=64, dstate=64)  # which FlashInfer takes
# Those that call a kernel: the same bits under every transform.
KERNELS = ("cpu", *GPU_BACKENDS)
BACKENDS = ("xla", *KERNELS)


@pytest.fixture
def arrays():
    return CASE.arrays(seed=11)


def as_jax(arrays):
    given = to_mode(arrays, "jax")
    return given.pop("state"), given


def steps(arrays, count, backend):
    """Return the output and state of the last of some eager steps."""
    state, rest = as_jax(arrays)
    for _ in range(count):
        out, state = ssu_bridge.update(state, **rest, **CASE.flags, backend=backend)
    return np.array(out), np.array(state)


def assert_same(got, expected, backend):
    for mine, theirs in zip(map(np.array, got), expected, strict=True):
        if backend in ("xla", "reference"):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(bits(mine), bits(theirs))


def compiled_in_place(function, state, *rest, backend, part=4):
    """Compile a jitted function that changes a state; the program has no room for a copy of it, unless XLA computes it."""
    compiled = function.lower(state, *rest).compile()
    if backend != "xla":
        assert compiled.memory_analysis().temp_size_in_bytes < state.size * state.dtype.itemsize / part
    return compiled


def run_in_place(function, state, *rest, backend):
    compiled = compiled_in_place(function, state, *rest, backend=backend)
    before = state.unsafe_buffer_pointer()
    results = compiled(state, *rest)
    after = state if isinstance(state, jax.Ref) else results[1]
    assert after.unsafe_buffer_pointer() == before
    return results


# --- References ---


@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
def test_an_eager_step_updates_a_reference(arrays, backend):
    state, rest = as_jax(arrays)
    ref = jax.new_ref(state)
    before = ref.unsafe_buffer_pointer()
    assert explain(ref, **rest, **CASE.flags, backend=backend).backend == backend
    for _ in range(3):
        out, same = ssu_bridge.update(ref, **rest, **CASE.flags, backend=backend)
        assert same is ref
    if backend != "reference":
        assert ref.unsafe_buffer_pointer() == before
    assert_same((out, ref[...]), steps(arrays, 3, backend), backend)
    np.testing.assert_array_equal(bits(np.array(state)), bits(arrays["state"]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_jitted_scan_updates_a_reference(arrays, backend):
    state, rest = as_jax(arrays)
    ref = jax.new_ref(state)

    @jax.jit
    def run(ref, rest):
        def token(_, __):
            out, same = ssu_bridge.update(ref, **rest, **CASE.flags, backend=backend)
            assert same is ref
            return None, out

        return jax.lax.scan(token, None, None, length=4)[1]

    outs = run_in_place(run, ref, rest, backend=backend)
    assert_same((outs[-1], ref[...]), steps(arrays, 4, backend), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loop", ("while_loop", "fori_loop", "cond"))
def test_a_reference_in_control_flow(arrays, loop, backend):
    state, rest = as_jax(arrays)
    ref = jax.new_ref(state)

    @jax.jit
    def run(ref):
        def token(i):
            ssu_bridge.update(ref, **rest, **CASE.flags, backend=backend)
            return i + 1

        if loop == "while_loop":
            return jax.lax.while_loop(lambda i: i < 3, token, 0)
        if loop == "fori_loop":
            return jax.lax.fori_loop(0, 3, lambda _, i: token(i), 0)
        count = 0
        for go in (True, False, True, True):
            count = jax.lax.cond(go, token, lambda i: i, count)
        return count

    assert run_in_place(run, ref, backend=backend) == 3
    assert_same((ref[...],), steps(arrays, 3, backend)[1:], backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_quantised_state_in_references(backend):
    case = Case("quantised", headdim=64, dstate=64, dtypes={"state": "int16"})
    given = to_mode(case.arrays(3), "jax")
    expected = ssu_bridge.update(**given, **case.flags, backend=backend, donate=False)
    refs = ssu_bridge.QuantizedState(*map(jax.new_ref, given.pop("state")))
    out, after = ssu_bridge.update(refs, **given, **case.flags, backend=backend)
    assert all(mine is theirs for mine, theirs in zip(after, refs, strict=True))
    assert_same((out, *(ref[...] for ref in refs)), (expected[0], *expected[1]), backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_reference_is_not_copied(backend):
    case = Case("large", slots=64, nheads=8, headdim=64, dstate=64)
    state, rest = as_jax(case.arrays(0))
    run = jax.jit(lambda ref: ssu_bridge.update(ref, **rest, **case.flags, backend=backend)[0])
    compiled_in_place(run, jax.new_ref(state), backend=backend, part=8)


@pytest.mark.parametrize("backend", KERNELS)
def test_intermediate_states_in_a_reference(backend):
    case = Case("intermediates", headdim=64, dstate=64, tokens=2, steps=2)
    given = to_mode(case.arrays(3), "jax")
    flags = {**case.flags, "backend": backend}
    skip_if_refused(explain(**given, **flags))
    expected = ssu_bridge.update(**given, **flags, donate=False)
    ref = jax.new_ref(given.pop("intermediate_states"))
    out, state, same = ssu_bridge.update(**given, **flags, intermediate_states=ref)
    assert same is ref
    assert given["state"].is_deleted()
    assert_same((out, state, ref[...]), expected, backend)
    *_, both = ssu_bridge.update(**{**given, "state": jax.new_ref(state)}, **flags, intermediate_states=ref)
    assert both is ref


def test_a_reference_with_a_wrong_argument(arrays):
    state, rest = as_jax(arrays)
    with pytest.raises(ValueError, match="x: expected shape"):
        ssu_bridge.update(jax.new_ref(state), **{**rest, "x": rest["x"][:, :2]}, **CASE.flags)
    with pytest.raises(TypeError, match="got Ref"):
        ssu_bridge.to_torch(jax.new_ref(state))


@pytest.mark.parametrize("backend", KERNELS)
def test_mapped_references(arrays, backend):
    state, rest = as_jax(arrays)
    flags = {**CASE.flags, "backend": backend}
    ref = jax.new_ref(jnp.stack([state, 2 * state]))
    outs = jax.vmap(lambda ref: ssu_bridge.update(ref, **rest, **flags)[0])(ref)
    for j, one in enumerate((state, 2 * state)):
        assert_same((outs[j], ref[j]), ssu_bridge.update(one, **rest, **flags, donate=False), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("axis", (1, -1))
def test_references_that_are_mapped_at_another_axis(arrays, axis, backend):
    state, rest = as_jax(arrays)
    flags = {**CASE.flags, "backend": backend}
    both = jnp.stack([state, 2 * state], axis)
    ref = jax.new_ref(both)
    before = ref.unsafe_buffer_pointer()
    mapped = jax.vmap(lambda ref: ssu_bridge.update(ref, **rest, **flags)[0], in_axes=axis)
    outs = jax.jit(lambda ref: jax.lax.scan(lambda _, __: (None, mapped(ref)), None, None, length=3)[1])(ref)
    assert ref.unsafe_buffer_pointer() == before
    for j in range(2):
        one = jnp.take(both, j, axis)
        for _ in range(3):
            out, one = ssu_bridge.update(one, **rest, **flags)
        assert_same((outs[-1][j], jnp.take(ref[...], j, axis)), (out, one), backend)


# --- Control flow and compilation ---


def while_loop(step, state, count):
    return jax.lax.while_loop(lambda c: c[0] < count, lambda c: (c[0] + 1, *step(c[2])), (0, *_empty(step, state)))[1:]


def _empty(step, state):
    out, _ = jax.eval_shape(step, state)
    return jnp.zeros(out.shape, out.dtype), state


def cond(step, state, count):
    def token(carry, i):
        return jax.lax.cond(i % 2 == 0, lambda c: step(c[1]), lambda c: c, carry), None

    return jax.lax.scan(token, _empty(step, state), jnp.arange(2 * count))[0]


def checkpoint(step, state, count):
    for _ in range(count):
        out, state = jax.checkpoint(step)(state)
    return out, state


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loop", (while_loop, cond, checkpoint))
def test_control_flow(arrays, loop, backend):
    state, rest = as_jax(arrays)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state, rest):
        return loop(lambda s: ssu_bridge.update(s, **rest, **CASE.flags, backend=backend), state, 3)

    assert_same(run_in_place(run, state, rest, backend=backend), steps(arrays, 3, backend), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ("float32", "int16"))
def test_states_that_are_kept_one_after_the_other(dtype, backend):
    """XLA may write a result straight into the stacked array; what the call read must stay as it is."""
    case = dataclasses.replace(CASE, dtypes={"state": dtype})
    given = to_mode(case.arrays(seed=12), "jax")
    flags = {**case.flags, "backend": backend, "donate": False}
    skip_if_refused(explain(**given, **flags))
    xs = jnp.stack([given["x"], 2 * given["x"], -given["x"]])
    before = jax.tree.map(np.array, given["state"])
    results = jax.jit(lambda xs: jax.lax.map(lambda x: ssu_bridge.update(**{**given, "x": x}, **flags), xs))(xs)
    for i, x in enumerate(xs):
        one = ssu_bridge.update(**{**given, "x": x}, **flags)
        assert_same(jax.tree.leaves(jax.tree.map(lambda a, i=i: a[i], results)), jax.tree.leaves(one), backend)
    assert_same(jax.tree.leaves(given["state"]), jax.tree.leaves(before), "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_state_after_each_token_of_a_scan(arrays, backend):
    state, rest = as_jax(arrays)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state, rest):
        def token(state, _):
            out, state = ssu_bridge.update(state, **rest, **CASE.flags, backend=backend)
            return state, (out, state)

        return jax.lax.scan(token, state, None, length=3)

    last, (outs, states) = run(state, rest)
    for i in range(3):
        assert_same((outs[i], states[i]), steps(arrays, i + 1, backend), backend)
    assert_same((last,), (np.array(states[-1]),), "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_ahead(arrays, backend):
    state, rest = as_jax(arrays)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state, rest):
        return ssu_bridge.update(state, **rest, **CASE.flags, backend=backend)

    compiled = compiled_in_place(run, state, rest, backend=backend)
    for _ in range(2):
        out, state = compiled(state, rest)
    assert_same((out, state), steps(arrays, 2, backend), backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_jitted_once_and_called_from_several_threads(backend):
    run = jax.jit(functools.partial(ssu_bridge.update, **CASE.flags, backend=backend), donate_argnums=0)
    started, results = threading.Barrier(4), {}

    def decode(number):
        state, rest = as_jax(CASE.arrays(seed=number))
        started.wait()
        for _ in range(50):
            out, state = run(state, **rest)
        results[number] = np.array(out), np.array(state)

    threads = [threading.Thread(target=decode, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        assert_same(results[number], steps(CASE.arrays(seed=number), 50, backend), backend)


def summed_gradient(f):
    return jax.grad(lambda value: f(value)[0].sum())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("deleted", "traced"), (("state", "x"), ("x", "state")))
@pytest.mark.parametrize(
    "transform", (jax.jit, jax.checkpoint, lambda f: lambda v: jax.vmap(f)(v[None]), summed_gradient)
)
def test_a_deleted_array_beside_traced_ones(transform, deleted, traced, backend):
    given = to_mode(CASE.arrays(seed=11), "jax")
    given[deleted].delete()
    run = transform(lambda value: ssu_bridge.update(**{**given, traced: value}, **CASE.flags, backend=backend))
    with pytest.raises(ValueError, match=f"{deleted}: expected a live array, got one that was deleted"):
        run(given[traced])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("doubled", (False, True))
def test_a_choice_of_two_steps(arrays, doubled, backend):
    state, rest = as_jax(arrays)
    before = state.unsafe_buffer_pointer()

    def step(times):
        def run(state, rest):
            return ssu_bridge.update(state, **{**rest, "x": times * rest["x"]}, **CASE.flags, backend=backend)

        return run

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state, rest, doubled):
        return jax.lax.cond(doubled, step(2), step(1), state, rest)

    got = run(state, rest, doubled)
    assert got[1].unsafe_buffer_pointer() == before
    assert_same(got, steps({**arrays, "x": (1 + doubled) * arrays["x"]}, 1, backend), backend)


COLD = """
import threading
from ssu_bridge.cases import Case

case, results = Case("cold"), {}
started = threading.Barrier(8)

def step(number, transform):
    arrays = copied(case.arrays(number))
    started.wait()
    for _ in range(3):
        out, arrays["state"] = transform(lambda arrays: ssu_bridge.update(**arrays, **case.flags))(arrays)
    results[number] = np.array(out), np.array(arrays["state"])

transforms = {"eager": [lambda f: f], "jitted": [jax.jit], "both": [lambda f: f, jax.jit]}[sys.argv[1]]
threads = [threading.Thread(target=step, args=(number, transforms[number % len(transforms)])) for number in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
for number in range(8):
    arrays = case.arrays(number)
    for _ in range(3):
        out, arrays["state"] = ssu_bridge.update(**arrays, **case.flags)
    np.testing.assert_array_equal(results[number][0], out)
    np.testing.assert_array_equal(results[number][1], arrays["state"])
"""


# A process each: by default the one in which every other thread does the one, and the rest the other.
@pytest.mark.parametrize(
    "how", (*(pytest.param(how, marks=pytest.mark.nightly) for how in ("eager", "jitted")), "both")
)
def test_the_first_calls_of_a_process_in_many_threads_at_once(how):
    run(COLD, how, devices=1)


# --- Gradients ---

SMOOTH = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")


def summed(arrays, backend="xla"):
    """Return the sum of a step's output as a function of x, and x."""
    state, rest = as_jax(arrays)
    x = rest.pop("x")
    return lambda x: ssu_bridge.update(state, x, **rest, **CASE.flags, backend=backend, donate=False)[0].sum(), x


@pytest.mark.parametrize("transform", (jax.checkpoint, jax.jit, lambda f: jax.jit(jax.checkpoint(f))))
def test_the_gradient_through_other_transforms(arrays, transform):
    loss, x = summed(arrays)
    np.testing.assert_allclose(jax.grad(transform(loss))(x), jax.jit(jax.grad(loss))(x), rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_scan_is_the_sum_over_its_steps(arrays):
    loss, x = summed(arrays)

    def run(x):
        return jax.lax.scan(lambda total, scale: (total + scale * loss(x), None), 0.0, jnp.arange(4.0))[0]

    np.testing.assert_allclose(jax.grad(run)(x), 6 * jax.jit(jax.grad(loss))(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("transform", (lambda f: f, jax.jit, jax.checkpoint))
def test_a_gradient_beside_a_step_needs_none_of_the_step(arrays, transform, backend):
    loss, x = summed(arrays, backend)
    slope = jax.grad(transform(lambda x: (x * loss(jax.lax.stop_gradient(x))).sum()))(x)
    np.testing.assert_array_equal(slope, jnp.full_like(x, loss(x)))


@pytest.mark.parametrize("policy", ("nothing_saveable", "everything_saveable", "dots_saveable"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_checkpoint_with_a_policy(arrays, policy, backend):
    """The step is under the checkpoint, and what it gives is part of what is differentiated."""
    loss, x = summed(arrays, backend)
    policy = getattr(jax.checkpoint_policies, policy)

    def product(x):
        return (x * (loss(x) if backend == "xla" else loss(jax.lax.stop_gradient(x)))).sum()

    got = jax.jit(jax.grad(jax.checkpoint(product, policy=policy)))(x)
    np.testing.assert_allclose(got, jax.jit(jax.grad(product))(x), rtol=1e-5, atol=1e-5)


def with_vjp(function, derivative):
    """Give a function the gradient of another."""
    custom = jax.custom_vjp(function)
    custom.defvjp(lambda x: (custom(x), x), lambda x, slope: jax.vjp(derivative, x)[1](slope))
    return custom


def with_jvp(function, derivative):
    custom = jax.custom_jvp(function)
    custom.defjvp(lambda values, slopes: (custom(*values), jax.jvp(derivative, values, slopes)[1]))
    return custom


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("custom", (with_vjp, with_jvp))
@pytest.mark.parametrize("transform", (lambda f: f, jax.jit, jax.checkpoint))
def test_a_gradient_of_ones_own(arrays, transform, custom, backend):
    state, rest = as_jax(arrays)
    given = {"state": state, **rest}

    def step(x, backend):
        return ssu_bridge.update(**{**given, "x": x}, **CASE.flags, backend=backend, donate=False)[0]

    derivative = jax.jit(functools.partial(step, backend="xla"))  # else JAX compiles each of its operations
    function = transform(custom(functools.partial(step, backend=backend), derivative))
    x = rest["x"]
    expected = jax.jit(jax.grad(lambda x: derivative(x).sum()))(x)
    for _ in range(2):
        np.testing.assert_allclose(jax.grad(lambda x: function(x).sum())(x), expected, rtol=1e-5, atol=1e-5)
    both = jax.vmap(jax.grad(lambda x: function(x).sum()))(jnp.stack([x, -x]))
    np.testing.assert_allclose(both[0], expected, rtol=1e-5, atol=1e-5)
    assert not any(array.is_deleted() for array in given.values())


def forward(loss):
    return lambda value: jax.jvp(loss, (value,), (value,))


def forward_of_many(loss):
    return lambda value: jax.vmap(lambda tangent: jax.jvp(loss, (value,), (tangent,)))(jnp.stack([value] * 2))


def of_many(loss):
    return lambda value: jax.vmap(jax.grad(loss))(jnp.stack([value] * 2))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("transform", (jax.grad, forward, forward_of_many, lambda f: jax.jit(jax.grad(f)), of_many))
def test_other_backends_have_no_gradient(arrays, name, transform, backend):
    state, rest = as_jax(arrays)
    given = {"state": state, **rest}

    def loss(value):
        return ssu_bridge.update(**{**given, name: value}, **CASE.flags, backend=backend)[0].sum()

    expected = f'backend {backend}: it cannot be differentiated; use backend="xla"'
    with pytest.raises(ssu_bridge.UnsupportedError, match=expected):
        transform(loss)(given[name])
    assert not any(array.is_deleted() for array in given.values())
