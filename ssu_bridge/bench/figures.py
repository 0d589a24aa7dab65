"""The figures of a benchmark: kept as a CSV file, drawn as curves of time over batch or tokens."""

import csv
from pathlib import Path
from typing import Any, NamedTuple

from ssu_bridge.bench.timing import Timing


class Point(NamedTuple):
    """One measurement: the panel and the curve it belongs to, its place on the horizontal axis, and the time."""

    panel: str
    curve: str
    at: int
    microseconds: float

    @classmethod
    def of(cls, panel: str, curve: str, at: int, timing: Timing) -> "Point":
        """Return the point of a measured timing."""
        return cls(panel, curve, at, round(timing.median * 1e6, 3))


class Figures(NamedTuple):
    """The points of one plot; ``axis`` names what its horizontal axis counts."""

    title: str
    axis: str
    points: tuple[Point, ...]

    @classmethod
    def read(cls, path: Path) -> "Figures":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is none of this kind.
        """
        title, header, *lines = [*path.read_text().splitlines(), "", ""]
        columns = header.split(",")
        if not title.startswith("# ") or columns[:2] + columns[3:] != ["panel", "curve", "microseconds"]:
            raise ValueError(f"{path}: expected a title after '# ', then panel,curve,AXIS,microseconds; got {header!r}")
        rows = [row for row in csv.reader(lines) if row]
        try:
            points = tuple(Point(panel, curve, int(at), float(time)) for panel, curve, at, time in rows)
        except ValueError as error:
            raise ValueError(f"{path}: expected lines of panel,curve,{columns[2]},microseconds; {error}") from None
        return cls(title.removeprefix("# "), columns[2], points)

    def as_dict(self) -> dict[str, Any]:
        """Return everything by name, for JSON."""
        return {"title": self.title, "axis": self.axis, "points": [point._asdict() for point in self.points]}

    def save(self, path: Path) -> None:
        """Write a CSV file: a title, a header, a line for each point."""
        with path.open("w", newline="") as file:
            file.write(f"# {self.title}\n")
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("panel", "curve", self.axis, "microseconds"))
            writer.writerows(self.points)

    def draw(self, path: Path) -> None:
        """Write a PNG file with a panel for each name, both axes logarithmic.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            import matplotlib
        except ImportError:
            raise ImportError("plotting needs matplotlib: pip install matplotlib") from None
        matplotlib.use("Agg")  # which needs no display
        from matplotlib import pyplot

        panels = list(dict.fromkeys(point.panel for point in self.points))
        size = (4.2 * len(panels), 3.6)
        figure, grid = pyplot.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
        for axes, panel in zip(grid[0], panels, strict=True):
            points = [point for point in self.points if point.panel == panel]
            for curve in dict.fromkeys(point.curve for point in points):
                of_curve = [(point.at, point.microseconds) for point in points if point.curve == curve]
                axes.plot(*zip(*of_curve, strict=True), marker="o", markersize=4, label=curve)
            axes.set(xscale="log", yscale="log", xlabel=self.axis, title=panel)
            places = sorted({point.at for point in points})
            axes.set_xticks(places, [str(place) for place in places])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        grid[0][0].set_ylabel("microseconds")
        grid[0][0].legend()
        figure.suptitle(self.title)
        figure.savefig(path, dpi=110, metadata={"Software": None})
        pyplot.close(figure)
