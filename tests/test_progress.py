"""What long runs show: a bar on a terminal, lines elsewhere, and how long a compilation takes."""

import contextlib
import io
import logging
import re
import sys
import time

import pytest

from ssu_bridge import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.1)


LINE = re.compile(r"(\d) of 2 done after \d s; now: ([ab])")


@pytest.mark.usefixtures("often")
def test_a_pipe_gets_lines_while_an_item_takes_its_time(capsys):
    done = []
    for item in progress.progress(["a", "b"]):
        time.sleep(0.35)
        done.append(item)
    assert done == ["a", "b"]
    told = [LINE.fullmatch(line).groups() for line in capsys.readouterr().err.splitlines()]
    assert len(told) >= 4
    assert set(told) == {("0", "a"), ("1", "b")}


@pytest.mark.usefixtures("often")
def test_a_run_that_is_left_stops_telling(capsys):
    with contextlib.closing(progress.progress(["a", "b"])) as run:
        next(run)
    time.sleep(0.25)
    assert capsys.readouterr().err == ""


def test_it_tells_every_few_seconds():
    assert progress.EVERY <= 10


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


@pytest.mark.usefixtures("often")
def test_a_terminal_without_tqdm_gets_lines(monkeypatch):
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "stderr", Terminal())
    for _ in progress.progress(["a", "b"]):
        time.sleep(0.15)
    assert all(LINE.fullmatch(line) for line in sys.stderr.getvalue().splitlines())
    assert sys.stderr.getvalue()


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
