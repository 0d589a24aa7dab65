"""Replay on the flashinfer backend: what it refuses, and what checkpointing_ssu is called with, by what stands in for it."""

import dataclasses

import numpy as np
import pytest
import torch
import tvm_ffi
from flashinfer_calls import (
    MOST,
    REPLAY,
    REPLAY_PACKED,
    REPLAY_TOKENS,
    WINDOW,
    address,
    as_checkpointing_wants,
    assert_refused,
    draw,
    problem_of,
    quantized,
    sized,
    tensors_of,
    without_nan,
)

from ssu_bridge.backends.flashinfer import backend as flashinfer
from ssu_bridge.backends.flashinfer import kernel, module, replay
from ssu_bridge.config import Backend
from ssu_bridge.testing.check import judge

NAMES = module.REPLAY_ARGUMENTS.split(", ")


def typed(case=REPLAY, **dtypes):
    return sized(case, dtypes={**case.dtypes, **dtypes})


def replaced(**fields):
    return lambda problem: dataclasses.replace(problem, **fields)


# Calls that checkpointing_ssu rejects or computes otherwise: the case, what is changed in its Problem, what is said.
REFUSED = {
    "the CPU": (REPLAY, lambda p: p.on("cpu"), "runs on CUDA arrays only"),
    "headdim 128": (sized(REPLAY, headdim=128), None, "supports headdim 64, and this is 128"),
    "dstate 96": (sized(REPLAY, dstate=96), None, "supports dstate 64, 128, .*and this is 96"),
    "int8, dstate 64": (
        sized(quantized(REPLAY, "int8"), dstate=64),
        None,
        "supports dstate 128, 256 with int8, and this is 64",
    ),
    "a long window": (
        sized(REPLAY, window=17), None, "with a ReplayState it supports a window of at most 16 tokens, and this is 17"
    ),
    "many sequences": (REPLAY, replaced(sequences=65536), "at most 65535 sequences"),
    "many heads": (REPLAY, replaced(nheads=65536, ngroups=65536), "at most 65535 heads"),
    "a wide pad id": (sized(REPLAY, pad_slot_id=2**40), None, "pad_slot_id of 32 bits"),
    "one token of three": (sized(REPLAY, most=3), None, "as the cursor has, 3, and these are 1; with cu_seqlens it"),
    "two tokens of three": (sized(REPLAY_TOKENS, tokens=2), None, "as the cursor has, 3, and these are 2"),
    "int16": (quantized(REPLAY), None, "supports checkpoints of float32.* and this is int16"),
    "rounding bfloat16": (sized(REPLAY, seed=1), None, "rounds only float16, int8, .*, and this is bfloat16"),
    "inputs of float32": (typed(**{"*": "float32"}), None, "requires x in bfloat16, and this is float32"),
    "inputs of float16": (typed(**{"*": "float16"}), None, "requires x in bfloat16, and this is float16"),
    **{
        f"{name} unlike x": (typed(**{name: "float32"}), None, f"requires {name} in x's dtype bfloat16, and this is float32")
        for name in ("B", "C", "z")
    },
    "D unlike dt_bias": (typed(D="float32"), None, "D and dt_bias in one dtype, and these are float32 and bfloat16"),
    "an untied D": (sized(REPLAY, untied=("D",)), None, "requires D tied to heads"),
    "wide cu_seqlens": (typed(REPLAY_PACKED, cu_seqlens="int64"), None, "cu_seqlens in int32, and this is int64"),
    **{
        f"unaligned {name}": (REPLAY, replaced(unaligned=(name,)), f"requires {name} at addresses that are multiples of 16")
        for name in ("state", "x", "B", "C", "z", "replay_x", "replay_B", "out")
    },
    **{
        f"strided {name}": (REPLAY_PACKED, replaced(strided=(name,)), f"requires dense {name}, and got gaps")
        for name in ("state_batch_indices", "cu_seqlens")
    },
    **{
        f"the {form} form": (
            REPLAY_TOKENS,
            lambda p, form=form: dataclasses.replace(
                p, options=dataclasses.replace(p.options, config=dataclasses.replace(p.options.config, algorithm=form))
            ),
            f"does not support the {form} form of several tokens",
        )
        for form in ("loop", "matrix")
    },
}  # fmt: skip
TAKEN = {
    "one token": REPLAY,
    "no slots": sized(REPLAY, indices=None, sequences=6),
    "bare": sized(REPLAY, absent=("D", "z", "dt_bias"), ngroups=1, group_axis=False),
    "tokens": REPLAY_TOKENS,
    "packed": REPLAY_PACKED,
    "pads": sized(REPLAY, indices=(-1, 2, -1)),
    "pads, tokens": sized(REPLAY_TOKENS, indices=(4, -1, -1)),
    "pads, packed": sized(REPLAY_PACKED, indices=(4, -1, 0)),
    "wide slots": typed(state_batch_indices="int64"),
    "float32": typed(state="float32", D="float32", dt_bias="float32"),
    "float16": typed(REPLAY_TOKENS, state="float16"),
}
QUANTIZED = {
    "int8": quantized(REPLAY, "int8"),
    "int8, tokens": quantized(REPLAY_TOKENS, "int8"),
    "float8": quantized(REPLAY_PACKED, "float8_e4m3fn"),
    "int8, stochastic": sized(quantized(REPLAY, "int8"), seed=3),
    "float16, stochastic": sized(typed(state="float16"), seed=3),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    assert_refused(*REFUSED[name])


@pytest.mark.parametrize("case", [*TAKEN.values(), *QUANTIZED.values()], ids=[*TAKEN, *QUANTIZED])
def test_taken(case):
    assert flashinfer.refusal(problem_of(case)) is None


@pytest.mark.parametrize("algorithm", ["simple", "vertical", "horizontal"])
def test_the_algorithms_of_its_other_function_are_ignored(algorithm):
    problem = problem_of(REPLAY_TOKENS)
    config = dataclasses.replace(problem.options.config, algorithm=algorithm)
    problem = dataclasses.replace(problem, options=dataclasses.replace(problem.options, config=config))
    assert flashinfer.refusal(problem) is None


def test_explain_says_what_it_guarantees_less():
    said = flashinfer.settings(problem_of(REPLAY_PACKED))
    assert said == (
        "its checkpointing kernel, which multiplies in bfloat16; computes the outputs of a call that writes the "
        "checkpoint from one that is rounded to bfloat16; requires finite numbers in all rows of the rings, and checks "
        "no number of the cursor; checks no index but pad_slot_id; sequences of at most 3 tokens"
    )
    said = flashinfer.settings(problem_of(sized(QUANTIZED["int8, stochastic"], indices=None, sequences=6)))
    assert said == (
        "its checkpointing kernel, which multiplies in bfloat16; requires finite numbers in all rows of the rings, and "
        "checks no number of the cursor; rounds with its own random numbers"
    )


ENTRY = "def _get_module({fields}):\n    return None\n"
BINDING = """
void checkpointing_ssu(
    TensorView {arguments});  // so that it is exported (and called)
"""


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Install a FlashInfer whose checkpointing_ssu takes these arguments, as far as is looked at."""

    def install(fields=module.ReplayModule._fields, arguments=module.REPLAY_ARGUMENTS):
        (tmp_path / "flashinfer" / "mamba").mkdir(parents=True)
        (tmp_path / "flashinfer" / "data" / "csrc").mkdir(parents=True)
        (tmp_path / "flashinfer" / "__init__.py").touch()
        entry = tmp_path / "flashinfer" / "mamba" / "checkpointing_ssu.py"
        entry.write_text(ENTRY.format(fields=", ".join(fields)))
        binding = tmp_path / "flashinfer" / "data" / "csrc" / "checkpointing_ssu_jit_binding.cu"
        binding.write_text(BINDING.format(arguments=",  // one, two\n  TensorView ".join(arguments.split(", "))))
        metadata = tmp_path / "flashinfer_python-0.7.4.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: flashinfer-python\nVersion: 0.7.4\n")
        monkeypatch.syspath_prepend(tmp_path)

    return install


def test_its_interface_is_known(installed):
    installed()
    assert flashinfer.refusal(problem_of(REPLAY)) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"fields": module.ReplayModule._fields[:-1]},
        {"arguments": module.REPLAY_ARGUMENTS.replace("ring_start", "cache_buf_idx")},  # two buffers, before 0.7.4
        {"arguments": "state"},
    ],
)
def test_another_interface_is_refused(installed, changes):
    installed(**changes)
    assert "another one than 0.7.4, whose checkpointing_ssu is known: pip install" in flashinfer.refusal(
        problem_of(REPLAY)
    )


def test_a_version_without_it_is_refused(installed, tmp_path):
    installed()
    (tmp_path / "flashinfer" / "mamba" / "checkpointing_ssu.py").unlink()
    assert "FlashInfer 0.7.4 has no function for a checkpoint" in flashinfer.refusal(problem_of(REPLAY))


def test_the_module_it_is_asked_for():
    case = sized(quantized(REPLAY_PACKED, "int8"), nheads=6, ngroups=2, seed=3)
    assert replay.module_of(problem_of(case)) == module.ReplayModule(
        state_dtype="int8",
        input_dtype="bfloat16",
        dt_dtype="bfloat16",
        weight_dtype="bfloat16",
        matrixA_dtype="float32",
        stateIndex_dtype="int32",
        state_scale_dtype="float32",
        dim=64,
        dstate=128,
        npredicted=MOST,
        max_window=WINDOW,
        heads_per_group=3,
        num_groups=2,
        philox_rounds=10,
        enable_pdl=False,
    )
    weights = replay.module_of(problem_of(typed(dt="float32", D="float16", dt_bias="float16"))).weight_dtype
    assert weights == "float16"
    assert (
        replay.module_of(problem_of(typed(sized(REPLAY, absent=("D", "dt_bias")), dt="float32"))).weight_dtype
        == "float32"
    )


# --- What it is called with ---


def simulated(most, tensors, of_pads=False):
    """Return what computes as checkpointing_ssu does, which leaves padding indices alone, or what computes those alone.

    What it is called with are views of the tensors.
    """

    def as_tensor(value):
        if not isinstance(value, tvm_ffi.Tensor):
            return value
        (memory,) = (tensor for tensor in tensors.values() if tensor.data_ptr() == address(value))
        return memory.as_strided(tuple(value.shape), tuple(value.strides))

    def run(*arguments):
        given = dict(zip(NAMES, map(as_tensor, arguments), strict=True))
        state, cu_seqlens, x_cache = given["state"], given["cu_seqlens"], given["x_cache"]
        assert [given[name].stride()[-1] for name in ("A", "dt")] == [0, 0]
        assert [given[name].ndim for name in ("x", "dt", "B", "C", "output")] == [4] * 5
        sequences = len(given["x"]) if cu_seqlens is None else len(cu_seqlens) - 1
        for number in range(sequences):
            slot = number if given["state_batch_indices"] is None else int(given["state_batch_indices"][number])
            if (slot == given["pad_slot_id"]) != of_pads:
                continue
            row, first, last = (
                (number, 0, most) if cu_seqlens is None else (0, *cu_seqlens[number : number + 2].tolist())
            )
            assert cu_seqlens is not None or given["x"].shape[1] == most
            rings = [given[name] for name in ("x_cache", "B_cache", "dt_cache")]
            start, pending = (
                (int(given[n][slot]) for n in ("ring_start", "prev_num_accepted")) if not of_pads else (0, 0)
            )
            S = torch.zeros(state.shape[1:], dtype=torch.float64) if of_pads else state[slot].double()
            for k in range(pending):
                S = advanced(S, given["A"], *(ring[slot, :, (start + k) % x_cache.shape[2]].double() for ring in rings))
            if not of_pads and last > first and pending + last - first > x_cache.shape[2] - most:
                state[slot] = S.to(state.dtype)
            for i, token in enumerate(range(first, last)):
                new = [given[name][row, token].double() for name in ("x", "B", "dt")]
                new[2] = new[2][:, 0] + (0 if given["dt_bias"] is None else given["dt_bias"][:, 0])
                new[2] = torch.nn.functional.softplus(new[2]) if given["dt_softplus"] else new[2]
                S = advanced(S, given["A"], *new)
                C = given["C"][row, token].double().repeat_interleave(S.shape[0] // given["C"].shape[2], 0)
                y = (S * C[:, None]).sum(-1) + (0 if given["D"] is None else given["D"] * new[0])
                if given["z"] is not None:
                    y = y * torch.nn.functional.silu(given["z"][row, token].double())
                given["output"][row, token] = y.to(given["output"].dtype)
                for ring, value in zip(rings, new, strict=True):
                    if not of_pads:
                        ring[slot, :, (start + pending + i) % x_cache.shape[2]] = value.to(ring.dtype)

    return tvm_ffi.convert(run)


def advanced(S, A, x, B, dt):
    B = B.repeat_interleave(S.shape[0] // B.shape[0], 0)
    return S * torch.exp(A[:, 0, 0].double() * dt)[:, None, None] + (dt[:, None] * x)[..., None] * B[:, None]


@pytest.fixture
def cleared():
    kernel.load.cache_clear()
    yield
    kernel.load.cache_clear()


def run(case, tensors, window=None):
    problem = problem_of(case)
    flashinfer.load(problem).function(*(tensors[name] for name in (*problem.names, *problem.results)))
    return problem


@pytest.mark.usefixtures("cleared")
@pytest.mark.parametrize("name", TAKEN)
def test_results(name, monkeypatch):
    case = TAKEN[name]
    before = without_nan(case.arrays(seed=3))
    tensors = tensors_of(before)
    tensors["out"] = torch.full_like(tensors["x"], torch.nan)
    monkeypatch.setattr(module, "load", lambda asked: simulated(asked.npredicted, tensors))
    monkeypatch.setattr(module, "load_pads", lambda: simulated(case.most, tensors, of_pads=True))
    problem = run(case, tensors)
    after = {n: tensors[n].float().numpy().astype(before[n if n != "out" else "x"].dtype) for n in problem.results}
    before["out"] = np.full_like(before["x"], np.nan)
    rows = judge(problem.on("cpu"), Backend.TRITON, before, after)
    assert all(row.passed for row in rows), rows


@pytest.fixture
def calls(monkeypatch, cleared):
    """Record the arguments of both functions in place of running them."""
    recorded = []

    def recorder(name):
        return tvm_ffi.convert(lambda *arguments: recorded.append((name, [described(a) for a in arguments])))

    monkeypatch.setattr(module, "load", lambda asked: recorder("checkpointing_ssu"))
    monkeypatch.setattr(module, "load_pads", lambda: recorder("fill_pads"))
    return recorded


def described(value):
    """What a tensor looks like while the call lasts."""
    if not isinstance(value, tvm_ffi.Tensor):
        return value
    return tuple(value.shape), tuple(value.strides), str(value.dtype), address(value)


SCALARS = {"dt_softplus": True, "pad_slot_id": -1, "d_split": 1, "precompute_heads_per_cta": 0}
SCALARS |= {"main_pipeline_stages": 0, "main_ctas_per_sm": 0}


@pytest.mark.parametrize("case", [*TAKEN.values(), *QUANTIZED.values()], ids=[*TAKEN, *QUANTIZED])
def test_arguments(case, calls):
    tensors = tensors_of(draw(case))
    tensors["out"] = torch.empty_like(tensors["x"])
    problem = run(case, tensors)
    wanted = as_checkpointing_wants(
        {**tensors, "B": with_groups(case, tensors, "B"), "C": with_groups(case, tensors, "C")}, problem.layout
    )
    if "rand_seed" in tensors:
        wanted["rand_seed"] = tensors["rand_seed"].reshape(1)
    expected = [
        SCALARS.get(n) if t is None else (tuple(t.shape), t.stride(), str(t.dtype).removeprefix("torch."), t.data_ptr())
        for n, t in wanted.items()
    ]
    functions = ["checkpointing_ssu"] + ["fill_pads"] * (case.indices is not None)
    assert calls == [(function, expected) for function in functions]


def with_groups(case, tensors, name):
    return tensors[name] if case.group_axis else tensors[name].unsqueeze(-2)


def test_strides_of_slots_and_of_the_cursor_are_kept(calls):
    tensors = tensors_of(draw(REPLAY))
    tensors["out"] = torch.empty_like(tensors["x"])
    for name in ("state", "replay_x", "replay_B", "replay_dt", "replay_start", "replay_pending"):
        wide = torch.zeros(len(tensors[name]), 2, *tensors[name].shape[1:], dtype=tensors[name].dtype)
        wide[:, 0] = tensors[name]
        tensors[name] = wide[:, 0]
    run(REPLAY, tensors)
    got = dict(zip(NAMES, calls[0][1], strict=True))
    for name, argument in zip(module.REPLAY_PARAMETERS, NAMES, strict=True):
        if name.startswith("replay") or name == "state":
            assert got[argument][1] == tensors[name].stride()


@pytest.mark.parametrize(
    "case",
    [
        sized(REPLAY, sequences=0, indices=()),
        sized(REPLAY_TOKENS, tokens=0),
        sized(REPLAY_PACKED, tokens=0, cu_seqlens=(0, 0, 0, 0)),
    ],
)
def test_nothing_to_do_is_not_asked_of_it(case, calls):
    tensors = tensors_of(draw(case))
    run(case, tensors | {"out": torch.empty_like(tensors["x"])})
    assert calls == []


def test_kernels_are_told_apart_by_their_names(calls):
    different = [*TAKEN.values(), *QUANTIZED.values(), sized(REPLAY, pad_slot_id=7), sized(REPLAY, window=6)]
    same = {"pads": "one token", "pads, tokens": "tokens", "pads, packed": "packed"}
    targets = {flashinfer.load(problem_of(case)).target for case in different}
    assert len(targets) == len(different) - len(same)


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("name", ["replay_x", "replay_B", "replay_dt"])
def test_the_check_knows_the_length_of_the_rings(name):
    tensors = tensors_of(draw(REPLAY))
    tensors["out"] = torch.empty_like(tensors["x"])
    problem = problem_of(REPLAY)
    check = flashinfer.load(problem).check
    order = (*problem.names, *problem.results)
    check(*(tensors[n] for n in order))
    tensors[name] = tensors[name][:, :, :-1].contiguous()
    with pytest.raises(ValueError, match=f"{name}: axis 2 must have size 6, got 5"):
        check(*(tensors[n] for n in order))
