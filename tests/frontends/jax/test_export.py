"""``jax.export`` in one process and the program called in another; the compilation cache of JAX over two processes."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from jax import export
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import mlir
from matrix_cases import MATRIX_CASES
from modes import bits, int64_as_it_is, skip_if_refused, to_mode
from sharded import run
from thinned import thinned

import ssu_bridge
from ssu_bridge.api import explain
from ssu_bridge.core.arrays import ArrayInfo
from ssu_bridge.core.quantized import paired, unpaired
from ssu_bridge.core.validate import axes
from ssu_bridge.frontends.jax import ffi_targets
from ssu_bridge.frontends.jax.ffi_targets import parse, registered
from ssu_bridge.testing.cases import CASES, Case

CASE = Case("export", headdim=8, dstate=16, destinations=(1, -1, 5), pad_slot_id=3)
NODES = ((0, 4), (1, 5), (2, 3))
TREES = Case(
    "export, trees",
    headdim=8,
    dstate=16,
    tokens=2,
    destinations=NODES,
    parents=((-1, 0), (-1, -1), (0, 0)),
    has_initial_state=(True, False, True),
)
LARGE = Case("export", headdim=64, dstate=128)

ELSEWHERE = """
for path in sys.argv[1:]:
    with open(path + "/program", "rb") as file:
        exported = jax.export.deserialize(bytearray(file.read()))
    arrays = dict(np.load(path + "/arrays.npz"))
    targets = ssu_bridge.prepare(exported)
    assert len(targets) == 1, targets
    out, state, *_ = exported.call(**arrays)
    np.savez(path + "/results.npz", out=out, state=state)
"""


def exported_step(case, **flags):
    given = to_mode(case.arrays(seed=3), "jax", case.window)
    return exported_function(functools.partial(ssu_bridge.update, **case.flags, **flags), given)


def exported_function(function, types):
    return export.export(jax.jit(function), disabled_checks=ssu_bridge.export_checks())(**types)


def called_elsewhere(folder, *programs, platform="cpu"):
    """Call programs with arrays in another process, which finds no compiled kernel; return outputs and states."""
    places = []
    for exported, arrays in programs:
        places.append(folder / str(len(places)))
        places[-1].mkdir()
        (places[-1] / "program").write_bytes(exported.serialize())
        np.savez(places[-1] / "arrays.npz", **arrays)
    run(ELSEWHERE, *places, devices=1, JAX_PLATFORMS=platform, SSU_BRIDGE_CACHE_DIR=str(folder / "kernels"))
    results = [np.load(place / "results.npz") for place in places]
    return [(result["out"], result["state"]) for result in results]


def same(got, expected):
    for array, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(bits(array), bits(np.array(other)))


def exported_call(case, backend, export_it=exported_step, **flags):
    """Return an exported step, its arrays, and the output and state that it has to give."""
    arrays = case.arrays(seed=3)
    expected = ssu_bridge.update(**to_mode(arrays, "jax"), **case.flags, backend=backend, **flags)
    return export_it(case, backend=backend, **flags), arrays, expected[:2]


def exported_vmap(backend):
    """Return the same of two mapped steps."""
    calls = [CASE.arrays(seed) for seed in (3, 4)]
    stacked = {**calls[0], **{name: np.stack([call[name] for call in calls]) for name in ("state", "x")}}
    step = functools.partial(ssu_bridge.update, **{**CASE.flags, "pad_slot_id": 5}, backend=backend)

    def both(state, x, **rest):
        return jax.vmap(lambda state, x: step(state, x, **rest))(state, x)

    alone = [step(**to_mode({**calls[0], "state": call["state"], "x": call["x"]}, "jax")) for call in calls]
    together = [np.stack(pair) for pair in zip(*alone, strict=True)]
    return exported_function(both, to_mode(stacked, "jax")), stacked, together


@pytest.mark.parametrize(
    ("platform", "backend"),
    [
        ("cpu", "cpu"),
        pytest.param("cuda", "triton", marks=pytest.mark.gpu),
        pytest.param("cuda", "flashinfer", marks=pytest.mark.gpu),
    ],
)
def test_a_fresh_process_runs_exported_programs(tmp_path, platform, backend):
    """One process for all of them: the target of each is another, and so as unknown there as in its own."""
    programs = [exported_call(LARGE if backend == "flashinfer" else CASE, backend)]
    if backend != "flashinfer":
        programs.append(exported_vmap(backend))
        form = "matrix" if backend == "triton" else "loop"
        programs += [exported_call(case, backend, algorithm=form) for case in MATRIX_CASES.values()]
    if backend == "cpu":
        programs.append(exported_call(TREES, backend))
        with_open_sizes = functools.partial(exported_open, opened="bS")
        programs.append(exported_call(dataclasses.replace(CASE, pad_slot_id=4), backend, with_open_sizes))
    targets = [target for exported, _, _ in programs for target in ssu_bridge.prepare(exported)]
    assert len({*targets}) == len(programs)
    elsewhere = called_elsewhere(tmp_path, *(program[:2] for program in programs), platform=platform)
    for got, (_, _, expected) in zip(elsewhere, programs, strict=True):
        same(got, expected)
    assert (tmp_path / "kernels").exists() == (backend == "triton")


def test_the_stride_is_spelt_only_where_there_is_one():
    """So that programs of versions without strides are still known."""
    steps = Case("export, steps", headdim=8, dstate=16, tokens=4, steps=4)
    (plain,) = ssu_bridge.prepare(exported_step(steps, backend="cpu"))
    (strided,) = ssu_bridge.prepare(exported_step(dataclasses.replace(steps, intermediate_stride=3), backend="cpu"))
    assert "stride" not in plain
    assert parse(plain).options.intermediate_stride == 1
    assert parse(strided).options.intermediate_stride == 3


@pytest.mark.parametrize(
    ("tokens", "state", "differs"), [(2, "bfloat16", True), (None, "bfloat16", False), (2, "float32", False)]
)
def test_rounding_each_token_is_spelt_only_where_it_makes_a_difference(tokens, state, differs):
    case = Case("export, each", headdim=8, dstate=16, tokens=tokens, dtypes={"state": state})
    (plain,) = ssu_bridge.prepare(exported_step(case, backend="cpu"))
    (each,) = ssu_bridge.prepare(exported_step(dataclasses.replace(case, round_each_token=True), backend="cpu"))
    assert (plain != each) is differs
    assert not parse(plain).options.config.round_each_token
    assert parse(each).options.config.round_each_token is differs


@pytest.mark.gpu
def test_a_program_for_another_gpu_is_refused():
    exported = exported_step(CASE, backend="triton")
    here = re.search(r"ssu_bridge\.triton\((sm\d+)", exported.mlir_module())[1]
    with pytest.raises(ssu_bridge.UnsupportedError, match=rf"calls ssu_bridge\.triton\(sm70;.*have .*{here}"):
        ssu_bridge.prepare(renamed(exported, here, "sm70"))


# By default of a third of the cases.
@pytest.mark.parametrize("case", thinned(CASES, one_in=3), ids=lambda case: case.name)
def test_every_kernel_is_found_by_its_name(case):
    arrays = case.arrays(seed=3)
    with int64_as_it_is(arrays):
        skip_if_refused(explain(**to_mode(arrays, "jax", case.window), **case.flags, backend="cpu"))
        targets = ssu_bridge.prepare(exported_step(case, backend="cpu"))
    assert len(targets) == 1
    assert targets[0] in registered()


def open_types(arrays, opened):
    """Return the arrays' types, with symbols for the sizes of these axes."""
    arrays = unpaired(to_mode(arrays, "jax"))
    symbols = axes({name: ArrayInfo(array.shape, str(array.dtype)) for name, array in arrays.items()})
    # JAX takes none that is in no shape.
    opened = [symbol for symbol in opened if symbol in "".join(symbols.values())]
    room = [f"{pair[0]} >= {pair[1]}".lower() for pair in ("Sb", "WT", "VT", "KT") if {*pair} <= {*opened}]
    sizes = dict(zip(opened, export.symbolic_shape(", ".join(opened).lower(), constraints=room), strict=True))
    sizes |= {"Q": sizes["b"] + 1} if "b" in sizes else {}
    return {
        name: jax.ShapeDtypeStruct(
            tuple(sizes.get(symbol, n) for symbol, n in zip(symbols[name], array.shape, strict=True)), array.dtype
        )
        for name, array in arrays.items()
    }


def exported_open(case, opened, **flags):
    def step(**arrays):
        return ssu_bridge.update(**paired(arrays), **case.flags, **flags)

    return exported_function(step, open_types(case.arrays(seed=3), opened))


OPEN = (
    CASE,
    Case("own slots", sequences=4, slots=4, indices=None),
    Case("accepted", tokens=2, slots=9, indices=((4, 1), (0, 8), (2, 3)), accepted=(2, 1, 0), destinations=(1, 7, 5)),
    Case("a destination each", tokens=2, slots=9, indices=(4, 0, 2), destinations=((1, 3), (0, -1), (5, 6))),
    Case("packed", tokens=9, cu_seqlens=(0, 4, 4, 9)),
    Case("entries", tokens=2, steps=4, entries=(5, 1, 6), spare_entries=2, dtypes={"state": "int8"}),
    Case("mamba1", nheads=0, ngroups=1, headdim=16, group_axis=False, dtypes={"state": "int8"}),
)


@pytest.mark.parametrize("case", OPEN, ids=lambda case: case.name)
def test_sizes_that_are_read_in_each_call_may_be_open(case):
    exported = exported_open(case, "bTLSEWVK", backend="cpu")
    assert "tensor<?x" in exported.mlir_module()
    (target,) = ssu_bridge.prepare(exported)
    assert f'@"{target}"' in exported.mlir_module()
    arrays = case.arrays(seed=3)
    got = exported.call(**unpaired(to_mode(arrays, "jax")))
    expected = ssu_bridge.update(**to_mode(arrays, "jax"), **case.flags, backend="cpu")
    same(jax.tree.leaves(got), jax.tree.leaves(expected))


@pytest.mark.parametrize("case", OPEN, ids=lambda case: case.name)
def test_xla_has_open_sizes_too(case):
    arrays = case.arrays(seed=3)
    skip_if_refused(explain(**to_mode(arrays, "jax"), **case.flags, backend="xla"))
    exported = exported_open(case, "bTLSEWVK", backend="xla")
    assert "tensor<?x" in exported.mlir_module()
    got = exported.call(**unpaired(to_mode(arrays, "jax")))
    expected = ssu_bridge.update(**to_mode(arrays, "jax"), **case.flags, backend="xla")
    for ours, wanted in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", OPEN, ids=lambda case: case.name)
def test_the_number_of_mapped_calls_may_be_open(case):
    calls = [unpaired(case.arrays(seed)) for seed in (3, 4, 5)]
    shared = ("A", "D", "dt_bias")
    stacked = {n: a if n in shared else np.stack([c[n] for c in calls]) for n, a in calls[0].items()}
    axes_of_maps = {name: None if name in shared else 0 for name in stacked}

    def mapped(**arrays):
        call = jax.vmap(lambda a: ssu_bridge.update(**paired(a), **case.flags, backend="cpu"), in_axes=(axes_of_maps,))
        return call(arrays)

    (number,) = export.symbolic_shape("v")
    kinds = {
        name: jax.ShapeDtypeStruct(array.shape if name in shared else (number, *array.shape[1:]), array.dtype)
        for name, array in stacked.items()
    }
    exported = exported_function(mapped, kinds)
    ssu_bridge.prepare(exported)
    got = jax.tree.leaves(exported.call(**stacked))
    for j, call in enumerate(calls):
        alone = {**call, **{name: calls[0][name] for name in shared if name in call}}
        expected = ssu_bridge.update(**to_mode(alone, "jax"), **case.flags, backend="cpu")
        same([array[j] for array in got], jax.tree.leaves(expected))


@pytest.mark.gpu
def test_a_tile_that_is_given_lets_sizes_be_open_on_a_gpu(tmp_path):
    arrays = CASE.arrays(seed=3)
    with ssu_bridge.using(backend="triton", triton_tile=(8, 1)):
        exported = exported_open(CASE, "bS")
        expected = ssu_bridge.update(**to_mode(arrays, "jax"), **CASE.flags)
    same(*called_elsewhere(tmp_path, (exported, arrays), platform="cuda"), expected)


def test_a_size_that_a_kernel_is_made_for_must_not_be_open():
    exported = exported_open(CASE, "b", backend="cpu")
    with pytest.raises(ssu_bridge.UnsupportedError, match="^state: the program leaves headdim open.*for a number"):
        ssu_bridge.prepare(renamed(exported, "x4x8x16xf32>", "x4x?x16xf32>"))


def test_the_checks_are_needed_and_enough():
    given = to_mode(CASE.arrays(seed=3), "jax")
    step = jax.jit(functools.partial(ssu_bridge.update, **CASE.flags, backend="cpu"))
    with pytest.raises(ValueError, match="ssu_bridge.cpu"):
        export.export(step)(**given)
    exported = export.export(step, disabled_checks=ssu_bridge.export_checks())(**given)
    assert [parse(name) for name in ssu_bridge.prepare(exported)] != [None]


def renamed(exported, old, new):
    """Return a program that calls something else."""
    program = exported.mlir_module()
    assert old in program
    with mlir.make_ir_context():
        module = ir.Module.parse(program.replace(old, new))
        serialized = stablehlo.serialize_portable_artifact(module, stablehlo.get_current_version())
    return dataclasses.replace(exported, mlir_module_serialized=serialized)


def test_a_program_whose_calls_are_spelt_as_they_once_were():
    """Names held all of the configuration, also where the backend ignores it."""
    exported = exported_step(CASE, backend="cpu")
    (name,) = ssu_bridge.prepare(exported)
    old = f"{name.removesuffix(']')};algorithm=vertical;tile=16,4]"
    program = renamed(exported, f'"{name}"', f'"{old}"')
    assert ssu_bridge.prepare(program) == (old,)
    assert old in registered()
    with ssu_bridge.using(algorithm="vertical", triton_tile=(16, 4)):
        assert ssu_bridge.prepare(exported_step(CASE, backend="cpu")) == (name,)
    kernels = [ffi_targets._functions[spelt, "cpu"] for spelt in (name, old)]
    assert kernels[0] is kernels[1]


def test_what_is_missing_is_said():
    exported = exported_step(CASE, backend="cpu")
    with pytest.raises(ssu_bridge.UnsupportedError, match="exported for tpu, and this process has cpu"):
        ssu_bridge.prepare(dataclasses.replace(exported, platforms=("tpu",)))
    with pytest.raises(ssu_bridge.UnsupportedError, match=r"calls ssu_bridge\.cpu.*does not know"):
        ssu_bridge.prepare(renamed(exported, "softplus=1;pad=3;update", "softplus=1;pad=3;renewal"))
    with pytest.raises(
        ssu_bridge.UnsupportedError, match=r"calls ssu_bridge\.cpu\(sm90;.*have ssu_bridge\.cpu\(D.*again"
    ):
        ssu_bridge.prepare(renamed(exported, "ssu_bridge.cpu(", "ssu_bridge.cpu(sm90;"))
    with pytest.raises(ssu_bridge.UnsupportedError, match="triton: it runs on CUDA arrays only"):
        ssu_bridge.prepare(renamed(exported, "ssu_bridge.cpu(", "ssu_bridge.triton("))
    with pytest.raises(TypeError, match="exported: expected a jax.export.Exported, got bytes"):
        ssu_bridge.prepare(b"")


SPELT = "ssu_bridge.cpu(;)[arrays=state,x,dt,A,B,C;softplus=1;pad=3;update=1;rounds=0;tile=8,1]"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tile=8,1", "tile=8,1,2"),
        ("tile=8,1", "tile=8"),
        ("tile=8,1", "tile=7,1"),
        ("softplus=1", "softplus=2"),
        ("softplus=1;", ""),
        ("pad=3", "pad=03"),
        ("pad=3", "pad=3;pad=4"),
        ("pad=3", "pad=three"),
        ("update=1", "update=yes"),
        ("rounds=0", "rounds=7"),
        ("state,x", "x,state"),
        ("B,C", "B"),
        ("B,C", "B,C,E"),
        ("B,C", "B,C,C"),
        ("]", ";more=1]"),
        ("ssu_bridge.cpu", "ssu_bridge.tpu"),
    ],
)
def test_a_target_with_a_malformed_part_is_none_of_ours(old, new):
    assert parse(SPELT) is not None
    assert parse(SPELT.replace(old, new)) is None


def test_a_call_that_lacks_operands_is_none_of_ours():
    exported = exported_step(CASE, backend="cpu")
    with pytest.raises(ssu_bridge.UnsupportedError, match="does not know; export it again"):
        ssu_bridge.prepare(renamed(exported, "[arrays=state,x,dt,A,B,C,", "[arrays=state,x,dt,A,B,C,out,"))


def test_prepare_makes_no_text_of_a_program(monkeypatch):
    exported = exported_step(CASE, backend="cpu")
    monkeypatch.delattr(export.Exported, "mlir_module")
    assert [parse(name) for name in ssu_bridge.prepare(exported)] != []


CACHED = """
import jax.numpy as jnp
from ssu_bridge.cases import Case
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
misses = []
jax.monitoring.register_event_listener(lambda name, **_: misses.append(name) if name.endswith("cache_misses") else None)


def run(mesh, case):
    # Nothing but the flag differs.
    arrays = {n: abs(a) if n in ("dt", "dt_bias") else a for n, a in Case("cached", headdim=8, dstate=16).arrays(5).items()}
    def program(arrays):
        return step(case, arrays)
    with jax.set_mesh(mesh):
        after = jax.jit(program)(put(arrays, mesh, heads()))
    same(after, step(case, copied(arrays)))
    if mesh.size > 1:
        def mapped(x, dt, arrays):
            return jax.vmap(lambda x, dt: step(case, {**arrays, "x": x, "dt": dt})["out"])(x, dt)
        with jax.set_mesh(mesh):
            there = put(arrays, mesh, heads())
            out = jax.jit(mapped)(*(jnp.stack([there.pop(name)] * 2) for name in ("x", "dt")), there)
        same({"out": out[1]}, {"out": after["out"]})


for devices, kind in zip(sys.argv[2::2], sys.argv[3::2]):
    for softplus in (True, False):
        run(mesh_of(getattr(AxisType, kind), h=int(devices)), Case("cached", headdim=8, dstate=16, dt_softplus=softplus))
print(len(misses))
"""
AUTO, EXPLICIT = (4, "Auto"), (4, "Explicit")


def kept_programs(tmp_path, *meshes, platform="cpu"):
    """Run those programs in a process; return the names of what JAX keeps then, and how many it did not find."""
    misses = run(CACHED, tmp_path, *sum(meshes, ()), devices=4, JAX_PLATFORMS=platform)
    return sorted(file.name for file in tmp_path.iterdir()), int(misses)


def require_found_again(first, second, count):
    programs, misses = first
    assert sum(name.startswith("jit_program-") for name in programs) == count
    assert misses >= count
    assert second == (programs, 0)


def test_the_compilation_cache_of_jax(tmp_path):
    require_found_again(*(kept_programs(tmp_path, (1, "Auto"), AUTO, EXPLICIT) for _ in range(2)), count=6)


@pytest.mark.gpu
def test_the_compilation_cache_of_jax_on_a_gpu(tmp_path):
    require_found_again(*(kept_programs(tmp_path, (1, "Explicit"), platform="cuda") for _ in range(2)), count=2)


FORGETFUL = """
from ssu_bridge.frontends.jax import step_primitive
step_primitive.kernels_in = lambda program: ()
"""


def test_a_partitioned_program_in_the_cache_whose_kernel_is_not_registered_is_compiled_again(tmp_path):
    """As on a GPU, where a shard's kernel is known only to the process that has partitioned the program."""
    counts = [run(FORGETFUL + CACHED, tmp_path, *AUTO, devices=4) for _ in range(2)]
    assert int(counts[1]) >= 2
