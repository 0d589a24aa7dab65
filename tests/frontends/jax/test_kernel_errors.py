"""What a kernel raises for the types of its arguments comes before anything is donated to it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from copied import copied
from native import run_script

import ssu_bridge
from ssu_bridge import api
from ssu_bridge.backends import cpu
from ssu_bridge.backends.base import DeviceKernel
from ssu_bridge.core.quantized import QuantizedState
from ssu_bridge.core.shapes import Shapes
from ssu_bridge.testing.cases import Case

CASE = Case("refused by the kernel", nheads=4, ngroups=2, headdim=8, dstate=16)


@pytest.fixture
def unchecked_groups(monkeypatch):
    """``describe`` accepts what the kernel does not: three groups of four heads."""
    monkeypatch.setattr(Shapes, "_check_heads", lambda self, name: None)


def call_of_three_groups():
    given = copied(CASE.arrays(seed=1))
    given |= {name: jnp.zeros((len(given["x"]), 3, 16), given[name].dtype) for name in ("B", "C")}
    return given


def wrapped(how):
    if how == "eager":
        return ssu_bridge.update
    donating = jax.jit(lambda state, rest: ssu_bridge.update(state, **rest, backend="cpu"), donate_argnums=0)
    return lambda state, backend, **rest: donating(state, rest)


@pytest.mark.parametrize("how", ["eager", "jit"])
def test_a_refusing_kernel_leaves_the_state(how, unchecked_groups):
    given = call_of_three_groups()
    before = np.array(given["state"])
    for _ in range(2):
        with pytest.raises(ValueError, match="B has 3 groups, which does not divide 4 heads"):
            wrapped(how)(**given, backend="cpu")
        assert not given["state"].is_deleted()
    np.testing.assert_array_equal(np.array(given["state"]), before)


def test_a_refusing_kernel_leaves_a_sharded_state(unchecked_groups):
    given = call_of_three_groups()
    mesh = jax.make_mesh((2,), ("slots",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    given = {name: jax.device_put(array, everywhere) for name, array in given.items()}
    with pytest.raises(Exception, match="B has 3 groups, which does not divide 4 heads"):
        ssu_bridge.update(**given, backend="cpu")
    assert not given["state"].is_deleted()


def test_a_refusing_kernel_leaves_a_reference(unchecked_groups):
    given = call_of_three_groups()
    before = np.array(given["state"])
    reference = jax.new_ref(given.pop("state"))
    with pytest.raises(ValueError, match="B has 3 groups, which does not divide 4 heads"):
        ssu_bridge.update(reference, **given, backend="cpu")
    np.testing.assert_array_equal(np.array(reference[...]), before)


def test_a_kernel_checks_each_signature_once(monkeypatch):
    """When it is traced, so that a repeated call costs what it did."""
    checked = []
    load = cpu.load

    def counted(problem):
        kernel = load(problem)
        return kernel._replace(check=lambda *tensors: (checked.append(len(tensors)), kernel.check(*tensors)))

    monkeypatch.setattr(cpu, "load", counted)
    case = Case("checked once", nheads=2, ngroups=1, headdim=3, dstate=5)
    given = copied(case.arrays(seed=2))
    arrays = len(given) + 2  # out, and the state as a result
    for _ in range(3):
        _, given["state"] = ssu_bridge.update(**given, backend="cpu")
    assert checked == [arrays]


def test_a_check_looks_at_every_argument():
    """Scales, seeds and intermediate states have types as good as the others'."""
    case = Case("all", tokens=3, steps=3)
    given = copied(case.arrays(seed=3))
    shape = given["state"].shape
    quantized = QuantizedState(jnp.zeros(shape, jnp.int8), jnp.ones(shape[:-1], jnp.float32))
    buffer = given["intermediate_states"].shape
    steps = QuantizedState(jnp.zeros(buffer, jnp.int8), jnp.ones(buffer[:-1], jnp.float32))
    given |= {"state": quantized, "intermediate_states": steps, "rand_seed": jax.random.key(0)}
    out, state, _ = ssu_bridge.update(**given, **case.flags, backend="cpu")
    assert np.isfinite(np.array(out)).all()
    assert quantized.values.is_deleted()
    assert state.values.dtype == jnp.int8


# The native code's own words, and no more of them than are looked for.
NO_MEMORY = "no memory for the scratch of a state"


@pytest.fixture
def failing_kernel(monkeypatch):
    """The cpu backend's kernel finds no memory while it runs."""
    import tvm_ffi

    def fail(*tensors):
        raise MemoryError(NO_MEMORY)

    function = tvm_ffi.convert(fail)
    monkeypatch.setattr(cpu, "load", lambda problem: DeviceKernel("ssu_bridge.cpu(failing)", function, lambda *a: None))
    # A program compiled before for the same shapes would be run here, and the one compiled here by a later test.
    forget_programs()
    yield
    forget_programs()


def forget_programs():
    jax.clear_caches()
    api._launchers.clear()


def arrays():
    return copied(CASE.arrays(seed=1))


def is_noted_as_lost(error):
    return any("donated to it is lost" in note for note in getattr(error, "__notes__", ()))


def test_a_kernel_that_fails_while_it_runs_says_so_itself(failing_kernel):
    given = arrays()
    with pytest.raises(MemoryError, match=f"^{NO_MEMORY}") as caught:
        jax.block_until_ready(ssu_bridge.update(**given, backend="cpu"))
    # The state is not blamed: it was this call that took it.
    assert given["state"].is_deleted()
    assert is_noted_as_lost(caught.value)
    with pytest.raises(ValueError, match="state: expected a live array"):
        ssu_bridge.update(**given, backend="cpu")


def test_a_failing_kernel_that_was_given_a_copy_costs_nothing(failing_kernel):
    given = arrays()
    with pytest.raises(MemoryError, match=NO_MEMORY) as caught:
        jax.block_until_ready(ssu_bridge.update(**given, donate=False, backend="cpu"))
    assert not given["state"].is_deleted()
    assert not is_noted_as_lost(caught.value)


def test_a_failing_kernel_loses_a_reference_and_says_so(failing_kernel):
    given = arrays()
    reference = jax.new_ref(given.pop("state"))
    with pytest.raises(MemoryError, match=NO_MEMORY) as caught:
        jax.block_until_ready(ssu_bridge.update(reference, **given, backend="cpu"))
    assert is_noted_as_lost(caught.value)
    with pytest.raises(RuntimeError, match="deleted"):
        reference[...]


def test_a_failing_kernel_without_jit(failing_kernel):
    given = arrays()
    with jax.disable_jit(), pytest.raises(MemoryError, match=NO_MEMORY):
        ssu_bridge.update(**given, backend="cpu")
    assert not given["state"].is_deleted()


def test_inside_of_jit_the_error_is_jax_s(failing_kernel):
    given = arrays()
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"INTERNAL: {NO_MEMORY}"):
        jax.block_until_ready(jax.jit(functools.partial(ssu_bridge.update, backend="cpu"))(**given))


# A state of so many columns that its scratch, 400 MB, does not fit into what is left, while all else does, and what XLA
# may give back meanwhile is not enough.
SCRIPT = """
import resource
import numpy as np, ssu_bridge
{imports}
def arrays(N):
    a = {{"state": np.zeros((1, 1, 1, N), "f2"), "x": np.ones((1, 1, 1), "f"), "dt": np.ones((1, 1), "f"),
         "A": -np.ones(1, "f"), "B": np.ones((1, N), "f2"), "C": np.ones((1, N), "f2")}}
    return {{name: {convert}(array) for name, array in a.items()}}
ssu_bridge.update(**arrays(8), backend="cpu")
a = arrays(1 << 23)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limits = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (150 << 20), limits[1]))
try:
    ssu_bridge.update(**a, backend="cpu")
except MemoryError as error:
    resource.setrlimit(resource.RLIMIT_AS, limits)  # what looks at the state below may start threads
    print(error, *getattr(error, "__notes__", ()), sep="|")
    print("lost" if {lost} else "kept")
"""


@pytest.mark.parametrize(
    ("imports", "convert", "lost"),
    [
        # In test_native_threads.py the kernel gets such arrays, too.
        pytest.param("", "", "a['state'].any()", marks=pytest.mark.nightly),
        ("import torch", "torch.from_numpy", "a['state'].any()"),
        # Where arrays are not ready yet, the kernel runs later, and its error comes with its results.
        ("import jax.numpy as jnp", "(lambda array: jnp.array(array).block_until_ready())", "a['state'].is_deleted()"),
    ],
    ids=["numpy", "torch", "jax"],
)
def test_scratch_without_memory_in_each_framework(imports, convert, lost):
    result = run_script(SCRIPT.format(imports=imports, convert=convert, lost=lost), SSU_BRIDGE_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    message, verdict = result.stdout.splitlines()
    assert message.startswith("no memory for the scratch of a state with 8388608 columns (dstate) on 1 threads")
    assert verdict == ("lost" if "jax" in imports else "kept")
    assert ("donated to it is lost" in message) == ("jax" in imports)
