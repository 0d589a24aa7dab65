"""Figures of a benchmark: kept, read and drawn; and those that the docs show are those of their tables."""

import re
from pathlib import Path

import pytest

from ssu_bridge.__main__ import main
from ssu_bridge.bench.cpu.report import Results
from ssu_bridge.bench.figures import Figures, Point

DOCS = Path(__file__).parents[2] / "docs"
RECORDED = sorted((DOCS / "data").glob("*.csv"))
FIGURES = Figures("A title, with a comma", "batch", (Point("p", "a, b", 1, 2.5), Point("p", "a, b", 4, 3.0)))


def test_what_is_saved_is_read(tmp_path):
    FIGURES.save(tmp_path / "figures.csv")
    assert Figures.read(tmp_path / "figures.csv") == FIGURES


def test_another_file_is_refused(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other\.csv: expected a title after '# '"):
        Figures.read(tmp_path / "other.csv")


def test_recorded_figures_are_drawn(tmp_path):
    FIGURES.save(tmp_path / "figures.csv")
    assert main(["bench", "--read", str(tmp_path / "figures.csv"), "--plot", str(tmp_path / "figures.png")]) == 0
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_measured_is_kept_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("ssu_bridge.bench.cpu.report.main", lambda: Results(FIGURES, {}))
    assert main(["bench", "--save", str(tmp_path / "f.csv"), "--plot", str(tmp_path / "f.png")]) == 0
    assert Figures.read(tmp_path / "f.csv") == FIGURES
    assert (tmp_path / "f.png").exists()


def test_a_part_without_times_over_the_batch_is_not_plotted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ssu_bridge.bench.cuda.command.main", lambda flags: None)
    assert main(["bench", "--tokens", "--plot", str(tmp_path / "f.png")]) == 1
    assert "nothing to save or plot" in capsys.readouterr().err
    assert not (tmp_path / "f.png").exists()


def test_reading_needs_a_place_for_the_picture(capsys):
    assert main(["bench", "--read", "figures.csv"]) == 2
    assert "--read: expected --plot with it" in capsys.readouterr().err


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_the_docs_have_the_figures_that_are_drawn(path):
    text = (DOCS / "benchmarks.md").read_text()
    cells = {cell.strip().split(" (")[0] for line in text.splitlines() for cell in line.split("|")}
    numbers = {cell.split(" ")[0] + cell.partition(" ")[2][:2] for cell in cells if re.match(r"[\d.]+( |$)", cell)}
    numbers |= {cell.split(" ")[0] for cell in cells}
    for point in Figures.read(path).points:
        spellings = (f"{point.microseconds:.2f}", f"{point.microseconds:.1f}us", f"{point.microseconds / 1e3:.1f}ms")
        assert any(spelling in numbers for spelling in spellings), point
    assert (DOCS / "images" / f"{path.stem}.png").exists()


def test_there_are_recorded_figures():
    assert len(RECORDED) >= 4
