"""The command line: mistakes in one line with status 2, JSON, and frameworks that are not installed."""

import contextlib
import io
import json
import subprocess
import sys

import pytest
from without_torch import WITHOUT_TORCH

import ssu_bridge
from ssu_bridge import config
from ssu_bridge.__main__ import main
from ssu_bridge.bench.cpu import report
from ssu_bridge.bench.figures import Figures, Point
from ssu_bridge.bench.timing import Timing
from ssu_bridge.testing.cases import CASES


def mistake(capsys, *argv):
    """Run a command with a mistake; return the line that it prints."""
    try:
        status = main([*map(str, argv)])
    except SystemExit as end:  # argparse prints the usage before the line
        status = end.code
    assert status == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    usage, line, rest = shown.err.rpartition("python -m ssu_bridge")
    assert usage == "" or usage.startswith("usage:")
    assert rest.endswith("\n")
    assert rest.count("\n") == 1
    return line + rest


def test_a_case_that_there_is_not_lists_those_there_are(capsys):
    line = mistake(capsys, "check", "--case", "nope")
    assert "got 'nope'" in line
    assert all(case.name in line for case in CASES)


@pytest.mark.parametrize("argv", [["check", "--backend", "nope"], ["bench", "--device", "nope"]])
def test_an_unknown_choice_lists_names(capsys, argv):
    line = mistake(capsys, *argv)
    assert "invalid choice: 'nope'" in line
    assert "<" not in line


@pytest.mark.parametrize(("name", "value"), [("SSU_BRIDGE_BACKEND", "nope"), ("SSU_BRIDGE_ALGORITHM", "nope")])
def test_a_wrong_environment_variable_is_named(capsys, monkeypatch, name, value):
    monkeypatch.setattr(config, "_process_config", None)
    monkeypatch.setenv(name, value)
    assert f"environment variable {name}:" in mistake(capsys, "info")


def test_a_wrong_number_of_threads_is_named():
    program = WITHOUT_TORCH + "from ssu_bridge.__main__ import main; sys.exit(main(['check']))"
    shown = subprocess.run(
        [sys.executable, "-c", program],
        env={"SSU_BRIDGE_NUM_THREADS": "many"},
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 2
    line = "python -m ssu_bridge: error: SSU_BRIDGE_NUM_THREADS must be a number from 1 to 4096, got 'many'\n"
    assert (shown.stdout, shown.stderr) == ("", line)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "No such file"),
        ("", "expected a title"),
        ("a,b\n1,2\n", "expected a title"),
        ("# t\npanel,curve,batch,microseconds\na,b,c,d\n", "expected lines of panel,curve,batch,microseconds"),
        ("# t\npanel,curve,batch,microseconds\na,b\n", "expected lines of panel,curve,batch,microseconds"),
    ],
)
def test_a_wrong_file_of_figures_is_named(capsys, tmp_path, content, expected):
    path = tmp_path / "figures.csv"
    if content is not None:
        path.write_text(content)
    line = mistake(capsys, "bench", "--read", path, "--plot", tmp_path / "f.png")
    assert str(path) in line
    assert expected in line


@pytest.mark.parametrize("flag", ["--save", "--plot"])
def test_a_place_that_cannot_be_written_is_known_before_measuring(capsys, tmp_path, monkeypatch, flag):
    monkeypatch.setattr(report, "main", lambda: pytest.fail("measured"))
    for path in (tmp_path / "nowhere" / "f", tmp_path):
        assert f"{flag}: expected a file in a folder that can be written, got {path}" in mistake(
            capsys, "bench", flag, path
        )


def test_plotting_without_matplotlib_is_known_before_measuring(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "main", lambda: pytest.fail("measured"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install matplotlib" in mistake(capsys, "bench", "--plot", tmp_path / "f.png")


@pytest.mark.parametrize("argv", [["--devices", "0"], ["--batches", "-1"], ["--dtypes", "int4"]])
def test_wrong_flags_of_the_gpu_benchmark(capsys, argv):
    line = mistake(capsys, "bench", *argv)
    assert f"argument {argv[0]}: " in line


def test_the_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"ssu_bridge {ssu_bridge.__version__}\n"


def test_the_list_of_cases(capsys):
    assert main(["check", "--list", "--case", "odd sizes"]) == 0
    expected = [case.name for case in CASES if "odd sizes" in case.name]
    assert 0 < len(expected) < len(CASES)
    assert capsys.readouterr().out.splitlines() == expected


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["ssu-bridge"] == ssu_bridge.__version__
    assert found["cpu"]["threads"] >= 1
    places = {place["framework"]: place["refusals"] for place in found["devices"]}
    assert places["numpy"]["cpu"] is None
    assert "JAX arrays only" in places["numpy"]["xla"]


def test_check_as_json(capsys):
    assert main(["check", "--case", "one group", "--backend", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["failed"] == 0
    assert found["passed"] == len(found["reports"]) >= 3
    one = found["reports"][0]
    assert one["backend"] == "cpu"
    assert {"name", "absolute", "used", "passed"} <= one["rows"][0].keys()


def test_bench_as_json(capsys, monkeypatch):
    figures = Figures("title", "batch", (Point("p", "cpu", 1, 2.5),))

    def measured():
        print("a table for people")
        return report.Results(figures, {"calls": {"update": Timing(2e-6, 1e-6, 3e-6)}})

    monkeypatch.setattr(report, "main", measured)
    assert main(["bench", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"figures": figures.as_dict(), "tables": {"calls": {"update": [2.0, 1.0, 3.0]}}}
    assert shown.err == "a table for people\n"


HELP = """
import sys
sys.modules |= {"torch": None, "jax": None}
import contextlib, ssu_bridge.__main__, ssu_bridge.bench.cuda.command as gpu
for argv in ([], ["info"], ["check"], ["bench"]):
    with contextlib.suppress(SystemExit):
        ssu_bridge.__main__.main([*argv, "--help"])
with contextlib.suppress(SystemExit):
    gpu.main(["--help"])
with contextlib.suppress(SystemExit):
    gpu.main([])
"""


def test_help_needs_no_framework():
    shown = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    assert shown.stdout.count("show this help message and exit") == 5
    assert "error: the GPU benchmark needs torch, which is not installed: pip install torch" in shown.stderr


# The whole benchmark with one framework, each measurement as short as can be.
SHORT = """
import sys
sys.modules |= dict.fromkeys({hidden!r})
from ssu_bridge.bench import timing
whole = timing.interleaved
timing.interleaved = lambda functions, **_: whole(functions, rounds=2, seconds=0)
from ssu_bridge.bench.cpu import replay, report, steps
steps.BATCHES, replay._CHECKPOINTS = (1,), ("int8",)
if "jax" not in {hidden!r}:
    from ssu_bridge.bench.cpu import prompts
    prompts.TOKENS, prompts.SCANNED = (16,), 16
report.SECTIONS = [section for section in report.SECTIONS if "sharded" not in section.title]
from ssu_bridge.__main__ import main
sys.exit(main(["bench", "--json"]))
"""


@pytest.mark.parametrize(
    ("hidden", "curves", "missing"),
    [
        (("torch",), {"cpu", "xla", "copy of the state"}, "needs torch: pip install torch"),
        (("jax", "jaxlib", "jax_tvm_ffi"), {"cpu", "copy of the state"}, "needs jax: pip install jax"),
    ],
)
def test_bench_with_one_framework(hidden, curves, missing):
    shown = subprocess.run([sys.executable, "-c", SHORT.format(hidden=hidden)], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert {point["curve"] for point in found["figures"]["points"]} == curves
    assert missing in shown.stderr
    rows = found["tables"]["host time of calls with NumPy arrays, ten arrays, a tiny problem"]
    assert any(name.startswith("NumPy arrays") for name in rows)
    assert any(hidden[0] not in title.lower() and "eager" in title for title in found["tables"])


def test_lines_are_printed_at_once_in_a_pipe(monkeypatch):
    """A title that stays in a buffer says nothing while its table is measured."""
    shown = io.TextIOWrapper(io.BufferedWriter(raw := io.BytesIO()), write_through=False)
    seen = []
    monkeypatch.setattr(
        report, "SECTIONS", (report.Section("a title", None, lambda: seen.append(raw.getvalue()) or {}),)
    )
    monkeypatch.setattr(report.steps, "measure", lambda: None)
    with contextlib.redirect_stdout(shown):
        report.main()
    assert seen[0].endswith(b"a title\n")
