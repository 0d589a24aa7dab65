"""The checker passes what is right, fails what is wrong, and says where; and the command line runs it."""

import jax
import numpy as np
import pytest
import tiny
from copied import copied
from modes import bits, to_mode

import ssu_bridge
from ssu_bridge import api
from ssu_bridge.__main__ import main
from ssu_bridge.api import explain
from ssu_bridge.backends import cpu, reference
from ssu_bridge.core import rounding
from ssu_bridge.core.quantized import paired
from ssu_bridge.testing import tolerances
from ssu_bridge.testing.cases import CASES, Case

CASE = Case("check", headdim=8, dstate=16)


@pytest.mark.parametrize("mode", ["numpy", "torch", "jax"])
def test_a_right_backend_passes_and_nothing_of_the_callers_changes(mode):
    arrays = CASE.arrays(seed=1)
    given = to_mode(arrays, mode)
    report = ssu_bridge.check(**given, **CASE.flags, backend="cpu")
    assert report
    assert report.passed
    assert [row.name for row in report.rows] == ["out", "state", "rest of state"]
    assert 0 < report.rows[0].absolute < 1e-4
    assert 0 <= report.rows[0].used <= 1
    for name, array in arrays.items():
        np.testing.assert_array_equal(bits(np.asarray(given[name])), bits(array))
    table = str(report)
    assert "backend cpu against the float64 reference" in table
    assert table.count("pass") == 3


def spoiled(monkeypatch, spoil, backend=cpu):
    """Make a backend do something wrong after the right thing."""
    right = reference.load

    def load(problem):
        kernel = right(problem)

        def function(arrays, out):
            kernel.function(arrays, out)
            spoil(arrays, out)

        return kernel._replace(function=function)

    put_in_place(monkeypatch, backend, load)


def put_in_place(monkeypatch, backend, load):
    """Have a backend load other kernels, for calls that were checked before, too."""
    monkeypatch.setattr(backend, "load", load)
    monkeypatch.setattr(api, "_launchers", {})


@pytest.mark.parametrize(
    ("spoil", "row", "where"),
    [
        (lambda arrays, out: out.__setitem__((1, 2, 3), out[1, 2, 3] + 0.01), 0, (1, 2, 3)),
        (lambda arrays, out: out.__setitem__((2, 0, 0), np.nan), 0, (2, 0, 0)),
        (lambda arrays, out: arrays["state"].__setitem__((0, 1, 2, 3), 9.0), 1, (0, 1, 2, 3)),
        (lambda arrays, out: arrays["state"].__setitem__((5, 0, 0, 0), 1e-30), 2, (5,)),
    ],
)
def test_a_wrong_backend_fails_and_the_place_is_named(monkeypatch, spoil, row, where):
    arrays = {**CASE.arrays(seed=2), "state_batch_indices": np.array([4, 0, 2], "int32")}
    spoiled(monkeypatch, spoil)
    report = ssu_bridge.check(**arrays, **CASE.flags, backend="cpu")
    assert not report
    assert [r.passed for r in report.rows] == [i != row for i in range(3)]
    assert report.rows[row].where == where
    assert "FAIL" in str(report)


ALL = Case(
    "all",
    headdim=4,
    dstate=8,
    tokens=7,
    cu_seqlens=(1, 3, 4, 6),
    steps=2,
    spare_entries=1,
    entries=(6, 1, 3),
    dtypes={"state": "int8"},
    seed=5,
)


@pytest.mark.parametrize(
    ("name", "place", "row"),
    [
        ("out", (6, 0, 0), "rest of out"),
        ("state", (2, 3, 1, 5), "state"),
        ("state", (5, 0, 0, 0), "rest of state"),
        ("state_scale", (2, 3, 1), "state_scale"),
        ("state_scale", (1, 0, 0), "rest of state"),
        ("intermediate_states", (6, 1, 2, 3, 4), "intermediate_states"),
        ("intermediate_states", (1, 1, 0, 0, 0), "rest of intermediate_states"),
        ("intermediate_state_scales", (3, 0, 2, 1), "intermediate_state_scales"),
        ("intermediate_state_scales", (0, 0, 0, 0), "rest of intermediate_states"),
    ],
)
def test_every_part_of_every_result_is_looked_at(monkeypatch, name, place, row):
    arrays = paired(ALL.arrays(seed=2))
    rows = ssu_bridge.check(**arrays, **ALL.flags, backend="reference").rows
    assert all(r.passed for r in rows)

    def spoil(arrays, out):
        array = arrays.get(name, out) if name != "out" else out
        array[place] = 1.0 if np.isnan(array[place]) else array[place] + np.array(1.5).astype(array.dtype)

    spoiled(monkeypatch, spoil, backend=reference)
    spoilt = ssu_bridge.check(**arrays, **ALL.flags, backend="reference").rows
    assert [r.name for r in spoilt] == [r.name for r in rows]
    (failed,) = (r for r in spoilt if r.name == row)
    assert not failed.passed
    assert failed.where == place[: len(failed.where)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "float8_e4m3fn"])
def test_the_random_numbers_are_looked_at(dtype):
    """A state that is rounded to nearest, or with the numbers of another token, is within a unit and yet wrong.

    A backend with random numbers of its own is given that unit, and no more.
    """
    case = Case("random", dtypes={"state": dtype}, seed=5)
    arrays = case.arrays(seed=2)
    exact = reference.compute(explain(**paired(arrays), **case.flags).choices[0].problem, arrays)
    after = {name: array.copy() for name, array in arrays.items()} | {"out": arrays["x"]}
    store, scaled = exact.stores["state"], exact.stores["state"].states.astype(np.float32)
    if dtype in rounding.LARGEST:
        scaled, after["state_scale"][store.places] = rounding.scale_rows(np, scaled, dtype)

    def passes(words, coarse_rounding, of=scaled):
        after["state"][store.places] = rounding.rounded(of, dtype, words)
        rows = tolerances.compare(exact, arrays, after, coarse_rounding=coarse_rounding)
        return next(row for row in rows if row.name == "state").passed

    others = {"right": store.words, "nearest": None, "shifted": np.roll(store.words, 1)}
    assert {name: passes(words, False) for name, words in others.items()} == dict.fromkeys(others, False) | {"right": 1}
    assert all(passes(words, True) for words in others.values())
    assert not passes(store.words, True, of=scaled * np.float32(1.5))


def test_an_output_that_is_not_written_fails(monkeypatch):
    put_in_place(monkeypatch, cpu, lambda problem: reference.load(problem)._replace(function=lambda arrays, out: None))
    report = ssu_bridge.check(**CASE.arrays(seed=3), **CASE.flags, backend="cpu")
    assert not report.rows[0].passed
    assert np.isnan(report.rows[0].absolute)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_error_of_one_unit_in_the_last_place_is_seen(dtype):
    """The tolerance is about the dtype's own rounding: twice that where nothing was lost before must fail."""
    case = Case("ulp", dtypes={"state": dtype, "*": dtype, "A": "float32"}, dt_softplus=False)
    arrays = case.arrays(seed=4)
    problem = explain(**arrays, **case.flags).choices[0].problem
    _, states, bounds, _ = reference.compute(problem, arrays).stores["state"]
    right = states.astype(np.float32).astype(dtype)
    up = np.nextafter(right, np.array(np.inf, dtype)) if dtype != "bfloat16" else (right.view("u2") + 1).view(dtype)
    up = np.nextafter(up, np.array(np.inf, dtype)) if dtype != "bfloat16" else (up.view("u2") + 1).view(dtype)
    places = (np.arange(3),)
    assert not tolerances._rounded_row("state", places, up, states, bounds * 0).passed
    row = tolerances._rounded_row("state", places, right, states, bounds)
    assert row.passed
    assert row.used == 0


def test_check_raises_what_update_raises():
    with pytest.raises(ssu_bridge.UnsupportedError, match="xla"):
        ssu_bridge.check(**CASE.arrays(seed=1), backend="xla")
    with pytest.raises(ssu_bridge.UnsupportedError, match="matrix form"):
        ssu_bridge.check(**Case("tokens", tokens=2).arrays(seed=1), algorithm="matrix")
    with pytest.raises(TypeError, match="B: expected"):
        ssu_bridge.check(**{**CASE.arrays(seed=1), "B": None})


def test_what_is_infinite_or_no_number_by_rights_passes():
    case = Case("overflow", dtypes={"state": "float16", "x": "float16"}, headdim=4, dstate=8, dt_softplus=False)
    arrays = case.arrays(seed=6)
    arrays["state"][4, 0] = 6e4
    arrays["x"][1] *= 1e4
    arrays["x"][0, 0, 0] = np.nan
    for mode in ("numpy", "torch", "jax"):
        assert ssu_bridge.check(**to_mode(arrays, mode), **case.flags, backend="cpu")


@pytest.mark.parametrize("dtype", rounding.LARGEST)
@pytest.mark.parametrize("seed", [None, 3])
def test_odd_rows_of_quantised_states_pass(dtype, seed):
    case = Case("odd rows", dtypes={"state": dtype}, seed=None if dtype == "int16" else seed, headdim=4, dstate=8)
    arrays = case.arrays(seed=6)
    arrays["state"][2, 3], arrays["x"][2, 3] = 0, 0  # zeros
    arrays["state"][4, 1], arrays["x"][0, 1] = 0, 1e-37  # subnormal scales
    arrays["x"][0, 0, 0], arrays["x"][1, 1, 2] = np.nan, np.inf
    report = ssu_bridge.check(**paired(arrays), **case.flags, backend="reference")
    assert report.passed, report


@pytest.mark.parametrize("dtype", rounding.LARGEST)
def test_the_scale_of_a_tiny_row(dtype):
    states = tiny.rows(dtype).astype(np.float64)
    places, exact = (np.arange(len(states)),), tiny.stored_scales(dtype)

    def passes(scales):
        row = tolerances._scale_row("state_scale", places, scales, states, np.zeros_like(states), dtype)
        return row.passed

    assert passes(exact)
    for number, scale in enumerate(exact):
        # What has no inverse is no scale, and 1 is none where the row is not at the edge of having another.
        for wrong in (0, -1, 2.0**-128, *([1] if 1.2 * 2.0**-128 < scale < 1 else [])):
            assert not passes(np.where(np.arange(len(exact)) == number, np.float32(wrong), exact)), (scale, wrong)


def test_check_is_not_for_tracers():
    arrays = to_mode(CASE.arrays(seed=1), "jax")
    with pytest.raises(ValueError, match="check: expected concrete arrays"):
        jax.jit(lambda arrays: ssu_bridge.check(**arrays).passed)(arrays)


def test_check_works_on_what_jax_holds_elsewhere():
    arrays = copied(CASE.arrays(seed=5))
    assert ssu_bridge.check(**arrays, **CASE.flags)
    assert not arrays["state"].is_deleted()


def test_the_command_info(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "ssu-bridge" in printed
    assert "jax arrays on" in printed
    assert "xla         it runs on JAX arrays only, and these are numpy arrays" in printed


def test_the_command_check(capsys):
    assert main(["check", "--case", "odd sizes, untied", "-v"]) == 0
    printed = capsys.readouterr().out
    cases = sum("odd sizes, untied" in case.name for case in CASES)
    assert f"{7 * cases} passed, 0 failed" in printed
    assert f"unsupported there, {cases} times: backend xla" in printed


def test_the_command_check_fails_with_a_wrong_backend(capsys, monkeypatch):
    spoiled(monkeypatch, lambda arrays, out: out.__setitem__(..., 0))
    monkeypatch.setattr("ssu_bridge.commands.check.frameworks", lambda: ["numpy"])
    assert main(["check", "--case", "one group", "--backend", "cpu"]) == 1
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        (["--tune"], ["--tune"]),
        (["--device", "cuda"], []),
        (["--device", "cuda", "--devices", "2"], ["--devices", "2"]),
    ],
)
def test_the_gpu_benchmark_has_flags_of_its_own(monkeypatch, given, flags):
    calls = []
    monkeypatch.setattr("ssu_bridge.bench.cuda.command.main", calls.append)
    assert main(["bench", *given]) == 0
    assert calls == [flags]


@pytest.mark.parametrize("arguments", (["bench", "--device", "cpu", "--tokens"], ["info", "--tokens"]))
def test_no_other_command_has_them(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert "unrecognized arguments: --tokens" in capsys.readouterr().err
