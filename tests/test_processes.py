"""Several processes, as on several hosts: JAX's distributed runtime over CPU devices, and torch.distributed."""

import pytest
from processes import JAX, TORCH, run

# Each process has the bits of its shards, without communication, in place; and all processes the same programs.
STEPS = (
    JAX
    + """
from ssu_bridge.cases import Case

cases = [
    Case("one token", nheads=8, ngroups=2, headdim=8, dstate=16),
    Case("several tokens", nheads=8, ngroups=2, headdim=8, dstate=16, tokens=3),
    Case("packed", nheads=8, ngroups=2, headdim=8, dstate=16, tokens=6, cu_seqlens=(0, 2, 3, 6)),
    Case("quantised", nheads=8, ngroups=2, headdim=8, dstate=16, dtypes={"state": "int8"}),
]
targets = set()
# Compiling all of them takes a minute.
kinds = (AxisType.Auto, AxisType.Explicit) if sys.argv[4:] else (AxisType.Auto,)
for kind in kinds:
    mesh = mesh_of(kind, h=len(jax.devices()))
    for case in cases if sys.argv[4:] else cases[::2]:
        specs = heads(2 if case.tokens and case.cu_seqlens is None else 1)
        expected = alone(case)
        with jax.set_mesh(mesh):
            if kind is AxisType.Auto:
                same_here(decode_in_place(case, put(drawn(case), mesh, specs)), expected)
            if kind is AxisType.Auto and case is cases[0]:
                text = jax.jit(functools.partial(step, case)).lower(put(drawn(case), mesh, specs)).compile().as_text()
                targets |= set(re.findall(r'custom_call_target="(ssu_bridge[^"]*)"', text))
            same_here(decode_eagerly(case, put(drawn(case), mesh, specs)), expected)
print(sorted(targets))

# A cache whose slots lie with their sequences: indices count from 0 on each device.
mesh, case = mesh_of(s=len(jax.devices())), Case("local slots", headdim=8, dstate=16)
slots, rows = 3 * len(jax.devices()), 2 * len(jax.devices())
rng = np.random.default_rng(0)
arrays = {n: np.repeat(a[:1], rows, 0) for n, a in drawn(case).items() if n in ("x", "z", "dt", "B", "C")}
arrays |= {n: a for n, a in drawn(case).items() if n in ("A", "D", "dt_bias")}
arrays["state"] = rng.standard_normal((slots, *drawn(case)["state"].shape[1:]), "float32")
arrays["state_batch_indices"] = np.tile(np.array([2, 0], "int32"), len(jax.devices()))
specs = {n: P() if n in ("A", "D", "dt_bias") else P("s") for n in arrays}
there = put(arrays, mesh, specs)
mapped = jax.shard_map(functools.partial(step, case), mesh=mesh, in_specs=(specs,), out_specs={"out": P("s"), "state": P("s")})
jitted = jax.jit(lambda state, rest: mapped({**rest, "state": state}), donate_argnums=0)
state = there.pop("state")
before, compiled = addresses(state), jitted.lower(state, there).compile()
assert not re.search(COLLECTIVE, compiled.as_text())
after = compiled(state, there)
assert addresses(after["state"]) == before
whole = arrays["state_batch_indices"] + 3 * np.repeat(np.arange(len(jax.devices())), 2).astype("int32")
same_here(after, step(case, copied({**arrays, "state_batch_indices": whole})))

# What is wrong on one host is raised there, and the others finish the step; then all go on.
mesh, case = mesh_of(h=len(jax.devices())), cases[0]
there = put(drawn(case), mesh, heads())
expected = step(case, copied(drawn(case)))
if rank == 1:
    refused("state_batch_indices: expected", lambda: step(case, {**there, "state_batch_indices": np.zeros(99, "int32")}), ValueError)
else:
    same_here(jax.block_until_ready(step(case, there)), expected)
same_here(step(case, put(drawn(case), mesh, heads())), expected)
print("done")
"""
)


@pytest.mark.parametrize(
    ("processes", "everything"),
    [
        pytest.param(2, [], id="two"),
        pytest.param(2, ["everything"], id="two, everything", marks=pytest.mark.nightly),
        pytest.param(4, ["everything"], id="four, everything", marks=pytest.mark.nightly),
    ],
)
def test_jax_over_processes(processes, everything):
    shown = run(STEPS, processes, *everything)
    assert len(set(shown)) == 1, shown  # programs by the same names
    targets, done = shown[0].splitlines()
    assert targets.startswith("['ssu_bridge.cpu(")
    assert done == "done"


# A layer as vLLM splits it: each rank has its heads with their groups, and the output projection adds the ranks up.
LAYER = (
    TORCH
    + """
import ssu_bridge

ranks = torch.distributed.get_world_size()
b, H, P, N, G, hidden = 3, 8, 16, 32, 4, 24
rng = torch.Generator().manual_seed(0)
normal = lambda *shape: torch.randn(*shape, generator=rng)
state, A, D, W = normal(5, H, P, N), -normal(H).exp(), normal(H), normal(hidden, H * P)
slots = torch.tensor([4, 0, 2])
mine = lambda tensor, axis: tensor.chunk(ranks, axis)[rank].contiguous()
own = mine(state, 1)
for _ in range(3):
    x, dt, B, C = normal(b, H, P), normal(b, H), normal(b, G, N), normal(b, G, N)
    expected, _ = ssu_bridge.update(state, x, dt, A, B, C, D, dt_softplus=True, state_batch_indices=slots)
    parts = (mine(x, 1), mine(dt, 1), mine(A, 0), mine(B, 1), mine(C, 1), mine(D, 0))
    y, same = ssu_bridge.update(own, *parts, dt_softplus=True, state_batch_indices=slots)
    assert same is own
    assert torch.equal(y, mine(expected, 1))
    assert torch.equal(own, mine(state, 1))
    out = y.flatten(1) @ mine(W, 1).T
    torch.distributed.all_reduce(out)
    torch.testing.assert_close(out, expected.flatten(1) @ W.T, rtol=1e-4, atol=1e-4)
torch.distributed.destroy_process_group()
print("done")
"""
)


def test_torch_over_processes():
    assert run(LAYER, 2) == ["done\n"] * 2
