"""The flashinfer backend: what it refuses, and when auto asks it first."""

import dataclasses

import numpy as np
import pytest
from flashinfer_calls import (
    BARE,
    CASE,
    STEPS,
    TOKENS,
    assert_refused,
    draw,
    intermediates,
    packed,
    problem_of,
    quantized,
    sized,
    table,
    tokens,
)

import ssu_bridge
from ssu_bridge import dispatch
from ssu_bridge.backends.flashinfer import backend as flashinfer
from ssu_bridge.config import SSUConfig
from ssu_bridge.core.arguments import QUANTIZED
from ssu_bridge.dispatch import module


def replaced(**fields):
    return lambda problem: dataclasses.replace(problem, **fields)


def with_algorithm(name):
    return lambda p: dataclasses.replace(
        p, options=dataclasses.replace(p.options, config=dataclasses.replace(p.options.config, algorithm=name))
    )


THREE = sized(nheads=6, ngroups=2)
# Calls that FlashInfer rejects or gets wrong: the case, what is changed in its Problem, what the refusal says.
REFUSED = {
    "the CPU": (CASE, lambda p: p.on("cpu"), "runs on CUDA arrays only"),
    "an old GPU": (CASE, lambda p: p.on("cuda", (7, 5)), "compute capability 8.0 or higher, and this one has 7.5"),
    "trees": (draw(tokens(), parent_tokens=np.zeros((3, TOKENS), "int32")), None, "parent_tokens"),
    "fresh sequences": (sized(has_initial_state=(True, False, True)), None, "has_initial_state"),
    "strides": (tokens(sized(steps=1, intermediate_stride=2)), None, "intermediate_stride"),
    **{
        f"the {form} form": (tokens(), with_algorithm(form), f"does not support the {form} form of several tokens")
        for form in ("loop", "matrix")
    },
    "small heads": (sized(headdim=16), None, "it supports headdim .*, and this is 16"),
    "odd heads": (sized(headdim=72), None, "it supports headdim .*, and this is 72"),
    "large heads": (sized(headdim=512), None, "it supports headdim .*, and this is 512"),
    "small dstate": (sized(dstate=32), None, "dstate from 64 to 256 in multiples of 32, and this is 32"),
    "odd dstate": (sized(dstate=72), None, "dstate .* and this is 72"),
    "large dstate": (sized(dstate=512), None, "dstate .* and this is 512"),
    "int16, dstate 96": (quantized(sized(dstate=96)), None, "multiples of 64, and this is 96"),
    "heads in a group": (tokens(THREE), None, "heads in a group, and these are 3"),
    "heads in a group, destinations": (sized(THREE, destinations=(1, 5, 3)), None, "heads in a group, and these are 3"),
    "heads in a group, horizontal": (THREE, with_algorithm("horizontal"), "horizontal kernel supports 1"),
    "many heads": (CASE, replaced(nheads=65536, ngroups=65536), "at most 65535 heads"),
    "few slots": (sized(slots=2, indices=(0, 1, -1)), None, "as many slots as sequences, and these are 2 and 3"),
    "a wide pad id": (sized(pad_slot_id=2**40), None, "pad_slot_id of 32 bits"),
    **{
        f"{dtype} states": (quantized(dtype=dtype), None, f"only int16 among quantised states, and this is {dtype}")
        for dtype in QUANTIZED[1:]
    },
    "rounding bfloat16": (sized(dtypes={"state": "bfloat16"}, seed=1), None, "rounds only float16 states"),
    **{
        f"{name} unlike {like}": (sized(dtypes={name: "bfloat16"}), None, f"requires {name} in {like}'s dtype float32")
        for name, like in (("B", "x"), ("C", "x"), ("z", "x"), ("D", "dt"), ("dt_bias", "dt"))
    },
    "tables of two dtypes": (
        sized(destinations=(1, 5, 3), dtypes={"dst_state_batch_indices": "int64"}),
        None,
        "requires dst_state_batch_indices in state_batch_indices's dtype int32",
    ),
    **{
        f"untied {name}": (sized(untied=(name,)), None, f"requires {name} tied to heads")
        for name in ("A", "dt", "D", "dt_bias")
    },
    "Mamba-1": (sized(nheads=0, ngroups=1), None, "requires A, dt, D, dt_bias tied"),
    **{
        f"unaligned {name}": (CASE, replaced(unaligned=(name,)), f"requires {name} at addresses that are multiples of 16 bytes")
        for name in ("state", "x", "B", "C", "z")
    },
    "unaligned out, tokens": (tokens(), replaced(unaligned=("out",)), "requires out at addresses that are multiples of 16 bytes"),
    "strided out": (CASE, replaced(strided=("out",)), "requires dense out,"),
    "strided cu_seqlens": (packed(), replaced(strided=("cu_seqlens",)), "requires dense cu_seqlens,"),
    "intermediates and the state": (tokens(sized(steps=STEPS)), None, "does not update the state"),
    "entries for intermediates": (
        tokens(sized(intermediates(), entries=(1, 5, 3))), None, "write out of bounds for a padding index"
    ),
    "intermediates, packed": (packed(intermediates()), None, "steps of the intermediate states as the longest"),
    "few intermediates": (tokens(intermediates()), replaced(entries=5), "per slot, not 5 for 6"),
    "17 tokens": (tokens(count=17), None, "at most 16 tokens in a call, and these are 17"),
    "17 rows": (packed(lengths=(1, 8, 8)), None, "here none, or from the number of rows, here 17"),
    "17 columns": (sized(packed(lengths=(1, 8, 8)), indices=table(17)), None, "here 17"),
    **{
        f"{name}, tokens": (tokens(), with_algorithm(name), f"{name} multi-token kernel.* from compute capability 10")
        for name in ("vertical", "horizontal")
    },
    **{
        f"{name}, {what}": (
            case, lambda p, n=name: with_algorithm(n)(p.on("cuda", (10, 0))), f"{name} multi-token kernel.*does not support {what}"
        )
        for name in ("vertical", "horizontal")
        for what, case in {
            "destination slots": sized(destinations=(1, 5, 3)),
            "accepted token counts": tokens(sized(indices=table(), accepted=(1, 2, 3))),
            "packed sequences": packed(),
            "int16 states": tokens(quantized()),
        }.items()
    },
    **{
        f"{name} before 9.0": (CASE, lambda p, n=name: with_algorithm(n)(p.on("cuda", (8, 9))), f"{name} kernel runs from")
        for name in ("vertical", "horizontal")
    },
    "horizontal, int16": (
        quantized(sized(indices=None)), with_algorithm("horizontal"), "horizontal kernel does not support int16 states"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    assert_refused(*REFUSED[name])


@pytest.fixture
def both_there(monkeypatch):
    """As on a machine with a GPU and both of its backends installed."""
    for backend in map(module, ("flashinfer", "triton")):
        monkeypatch.setattr(backend, "missing", lambda framework: None)


@pytest.mark.usefixtures("both_there")
def test_what_is_refused_goes_to_triton_under_auto(monkeypatch):
    row = {"layout": "single", "state": "float32", "tokens": [1, 1], "elements": [0, np.inf]}
    monkeypatch.setattr(dispatch, "measured", lambda name, capability: {"flashinfer": [row]})
    for case, taken in ((CASE, "flashinfer"), (sized(headdim=16), "triton")):
        choice = dispatch.consider_problem(under_auto(problem_of(case)))
        assert choice.backend == taken
        assert [answer.backend for answer in choice.answers[:2]] == ["flashinfer", "triton"]
    assert "flashinfer  not supported: it supports headdim " in str(dispatch.Explanation((choice,)))


@pytest.mark.usefixtures("both_there")
def test_asked_for_by_name_it_raises_with_the_reason_and_who_can():
    problem = problem_of(sized(headdim=16))
    config = dataclasses.replace(problem.options.config, backend="flashinfer")
    problem = dataclasses.replace(problem, options=dataclasses.replace(problem.options, config=config))
    with pytest.raises(
        ssu_bridge.UnsupportedError, match=r"flashinfer: it supports headdim .*supported by backend='triton'"
    ):
        dispatch.load(problem)


def under_auto(problem):
    return dataclasses.replace(problem, options=dataclasses.replace(problem.options, config=SSUConfig()))


WORK = 3 * 4 * 64 * 64  # elements of state that CASE updates
FORMS = {"single": CASE, "multi": tokens(count=4), "packed": packed(lengths=(4, 4, 4))}
ROW = {"layout": "multi", "state": "float32", "tokens": [4, 8], "elements": [WORK, np.inf]}


def first_asked(case, row, monkeypatch):
    monkeypatch.setattr(dispatch, "measured", lambda name, capability: {"flashinfer": [row]})
    return dispatch.consider_problem(under_auto(problem_of(case))).answers[0].backend


@pytest.mark.parametrize("form", FORMS)
def test_auto_goes_by_a_table(form, monkeypatch):
    row = {**ROW, "layout": form, "tokens": [1, 4] if form == "single" else [4, 8]}
    assert first_asked(FORMS[form], row, monkeypatch) == "flashinfer"
    for change in (
        {"layout": "another"}, {"state": "bfloat16"}, {"tokens": [5, 8]}, {"tokens": [0, 0]}, {"elements": [WORK + 1, np.inf]},
        {"elements": [0, WORK - 1]},
    ):  # fmt: skip
        assert first_asked(FORMS[form], {**row, **change}, monkeypatch) == "triton"


@pytest.mark.parametrize(
    "fields", [{"disable_state_update": True}, {"steps": 4, "disable_state_update": True}, {"destinations": table(4)}]
)
def test_the_table_is_about_plain_calls(fields, monkeypatch):
    assert first_asked(sized(FORMS["multi"], slots=12, **fields), ROW, monkeypatch) == "triton"


@pytest.mark.parametrize("capability", [None, (8, 0), (9, 0), (12, 1)])
def test_the_committed_table(capability):
    """What was measured on 9.0: triton's kernels are the faster ones, since it has the matrix form."""
    slots = tuple(range(16))
    large = sized(sequences=16, slots=16, indices=slots, nheads=64, dstate=128, dtypes={"state": "bfloat16"})
    for case, first in (
        (CASE, "triton"),
        (large, "triton"),
        (tokens(large, 3), "triton"),
        (tokens(large, 4), "triton"),
        (tokens(large, 8), "triton"),
        (tokens(sized(large, nheads=32), 4), "triton"),
        (tokens(sized(large, dtypes={}), 4), "triton"),
        (packed(), "triton"),
    ):
        answers = dispatch.consider_problem(under_auto(problem_of(case, capability))).answers
        assert answers[0].backend == first, case
        assert {answer.backend for answer in answers[:2]} == {"triton", "flashinfer"}


@pytest.mark.parametrize(
    ("version", "to_zero"), [("", True), ("0.7.2", True), ("0.7.4", False)], ids=["none", "0.7.2", "0.7.4"]
)
def test_explain_says_how_it_would_run(monkeypatch, version, to_zero):
    monkeypatch.setattr("ssu_bridge.backends.flashinfer.module._version", lambda: version)
    said = flashinfer.settings(problem_of(CASE))
    assert said == "its single-token kernels, algorithm auto; checks no index but pad_slot_id"
    assert flashinfer.settings(problem_of(tokens(BARE))) == "its multi-token kernels, algorithm auto"
    said = flashinfer.settings(problem_of(sized(dtypes={"state": "float16"}, seed=1, destinations=(1, 5, 3))))
    assert said.startswith("its multi-token kernels, algorithm simple; ")
    assert said.endswith("; rounds with its own random numbers" + ", and to zero below 2**-14" * to_zero)
    assert "; sequences of at most 2 tokens" in flashinfer.settings(problem_of(sized(packed(), destinations=table(2))))


def test_auto_keeps_clear_of_kernels_that_err():
    assert flashinfer._algorithm(problem_of(THREE)) == "simple"
    assert flashinfer._algorithm(problem_of(CASE)) == "auto"
    assert flashinfer._algorithm(problem_of(tokens(), (10, 0))) == "auto"
    assert flashinfer._algorithm(problem_of(packed(), (10, 0))) == "simple"


@pytest.mark.parametrize(
    ("columns", "lengths", "longest"), [(0, (1, 1, 1), 4), (0, (3, 5, 3), 16), (2, (1, 0, 2), 2), (9, (1, 1, 0), 2)]
)
def test_the_longest_packed_sequence(columns, lengths, longest):
    case = packed(sized(indices=table(columns)) if columns else CASE, lengths)
    assert flashinfer._longest(problem_of(case)) == longest
