"""What long runs show: a bar on a terminal, a line a minute elsewhere, and how long a compilation takes."""

import io
import logging
import sys
import time

import pytest

from ssu_bridge import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances by 25 s each time it is read."""
    now = [0.0]

    def monotonic():
        now[0] += 25
        return now[0]

    monkeypatch.setattr(progress.time, "monotonic", monotonic)


def test_a_pipe_gets_a_line_a_minute(clock, capsys):
    assert list(progress.progress(["a", "b", "c", "d", "e", "f"])) == ["a", "b", "c", "d", "e", "f"]
    # Item i is reached after 25 * (i + 1) s: lines at 75 s and 150 s.
    assert capsys.readouterr().err.splitlines() == [
        "2 of 6 done after 75 s; next: c",
        "5 of 6 done after 150 s; next: f",
    ]


def test_a_short_run_says_nothing(capsys):
    assert list(progress.progress(range(3))) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_and_lines_go_above_it(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    for item in progress.progress(["first", "second"], label=str.upper):
        progress.say(f"result of {item}")
    assert capsys.readouterr().out == "result of first\nresult of second\n"
    shown = sys.stderr.getvalue()
    assert "FIRST" in shown
    assert "/2 [" in shown


def test_a_terminal_without_tqdm_gets_a_line_a_minute(clock, monkeypatch):
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress.progress(range(3))) == [0, 1, 2]
    assert sys.stderr.getvalue() == "2 of 3 done after 75 s; next: 2\n"


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.0, []), (0.3, ["compiling x (a while)", "so far", "compiled x in"])]
)
def test_a_long_compilation_is_reported(monkeypatch, caplog, seconds, expected):
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    monkeypatch.setattr(progress, "INTERVAL", 0.2)
    with caplog.at_level(logging.INFO, logger="ssu_bridge"), progress.compiling("x", "a while"):
        time.sleep(seconds)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(expected)
    assert all(part in message for part, message in zip(expected, messages, strict=True))
