"""Several devices in one process: four of the virtual CPU devices."""

import warnings

import jax
import numpy as np
from copied import copied
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded import refused

import ssu_bridge
from ssu_bridge.cases import CASES

devices, case = jax.devices()[:4], CASES[0]
arrays = case.arrays(seed=0)
expected = ssu_bridge.update(**case.arrays(seed=0), **case.flags)


def test_runs_where_its_arrays_are():
    out, state = ssu_bridge.update(**copied(arrays, devices[2]), **case.flags)
    assert out.devices() == state.devices() == {devices[2]}
    assert np.array_equal(out, expected[0])
    assert np.array_equal(state, expected[1])


def test_names_the_array_on_another_device():
    there = copied(arrays, devices[1])
    there["C"] = jax.device_put(arrays["C"], devices[2])
    message = f"^C: expected an array on {devices[1]}, where state is, got one on {devices[2]}$"
    refused(message, lambda: ssu_bridge.update(**there, **case.flags), ValueError)
    assert not there["state"].is_deleted()


def test_names_the_array_on_another_device_than_the_first_that_is_on_one():
    mixed = {n: jax.numpy.array(a) for n, a in arrays.items()}
    mixed["x"], mixed["D"] = jax.device_put(arrays["x"], devices[1]), jax.device_put(arrays["D"], devices[2])
    message = f"^D: expected an array on {devices[1]}, where x is, got one on {devices[2]}$"
    refused(message, lambda: ssu_bridge.update(**mixed, **case.flags), ValueError)


def test_is_right_inside_shard_map():
    mesh = Mesh(np.array(devices), ("s",))

    def body(B, **rest):
        return ssu_bridge.update(B=B, **rest, **case.flags, backend="cpu")

    shared = {n: a for n, a in arrays.items() if n != "B"}
    stacked = np.concatenate([arrays["B"] * (1 + i) for i in range(4)])
    run = jax.jit(jax.shard_map(lambda B, rest: body(B, **rest), mesh=mesh, in_specs=(P("s"), P()), out_specs=P("s")))
    out, state = run(stacked, shared)
    for i in range(4):
        one = ssu_bridge.update(**{**case.arrays(seed=0), "B": arrays["B"] * (1 + i)}, **case.flags)
        assert np.array_equal(out[3 * i : 3 * i + 3], one[0])
        assert np.array_equal(state[6 * i : 6 * i + 6], one[1])
    # Results that differ by shard are not taken for the same.
    alike = jax.shard_map(lambda B, rest: body(B, **rest), mesh=mesh, in_specs=(P("s"), P()), out_specs=P())
    refused("replicated|out_specs", lambda: alike(stacked, shared), ValueError)


def test_gives_each_shard_of_a_state_a_seed_of_its_own():
    from ssu_bridge.frontends.jax.sharding import shards
    from ssu_bridge.frontends.jax.step_primitive import varying

    def shard_seed(seed, state):
        return shards.shard_seed(seed, varying(jax.typeof(state)) - varying(jax.typeof(seed)))

    mesh = Mesh(np.array(devices).reshape(2, 2), ("a", "b"))
    seed = np.array([3, 4], "uint32")

    def seeds(state_spec, seed_spec, seed):
        def body(state, seed):
            return shard_seed(seed.reshape(2), state)[None]

        specs = (state_spec, seed_spec)
        return np.array(jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P(("a", "b")))(np.zeros((4, 4)), seed))

    both = seeds(P("a", "b"), P(), seed)
    assert len({*map(tuple, both)}) == 4
    assert np.array_equal(both, seeds(P("a", "b"), P(), seed))
    # A seed that is a shard's own already stays.
    own = np.arange(8, dtype="uint32").reshape(4, 2)
    assert np.array_equal(seeds(P("a", "b"), P(("a", "b")), own), own)
    # Along an axis over which the state does not vary, its copies are rounded alike.
    along = jax.shard_map(lambda x, s: shard_seed(s, x)[None], mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a"))
    assert len({*map(tuple, np.array(along(np.zeros((4, 4)), seed)))}) == 2


def test_is_right_for_sharded_arrays():
    mesh = Mesh(np.array(devices), ("heads",))
    for backend in ("cpu", "xla"):
        there = jax.device_put(arrays, NamedSharding(mesh, P()))
        for name in ("state", "x"):
            there[name] = jax.device_put(arrays[name], NamedSharding(mesh, P(None, "heads")))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out, state = ssu_bridge.update(**there, **case.flags, backend=backend)
        np.testing.assert_allclose(out, expected[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(state, expected[1], rtol=1e-5, atol=1e-5)


def test_runs_on_all_devices_at_once():
    import threading

    def run(device, results):
        rest = copied(arrays, device)
        state = rest.pop("state")
        for _ in range(50):
            _out, state = ssu_bridge.update(state, **rest, **case.flags, backend="cpu")
        results.append(np.array(state))

    results = []
    threads = [threading.Thread(target=run, args=(device, results)) for device in devices]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(results) == 4
    assert all(np.array_equal(result, results[0]) for result in results)
