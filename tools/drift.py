"""How far the outputs of a long decode are from those in float64, for each dtype of a state: figures and their plot."""

import argparse
import csv
import functools
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (gives NumPy the dtypes "bfloat16" and "float8_e4m3fn")
import numpy as np

import ssu_bridge

H, P, N, WINDOW = 8, 8, 32, 16
# What each curve stores the state as; stochastic rounding and replay are in its name.
CURVES = (
    "float32", "bfloat16", "bfloat16 stochastic", "float16", "float16 stochastic", "int16", "int8", "int8 stochastic",
    "float8_e4m3fn", "float8_e4m3fn stochastic", "float32 replay", "bfloat16 replay", "int8 replay",
)  # fmt: skip
# What a kernel does that computes in float32 and stores with NumPy's rounding: mamba_ssm's and vLLM's do.
PLAIN = ("float32 plain", "bfloat16 plain", "float16 plain")
BLOCK = 1000


def parameters() -> dict[str, np.ndarray]:
    """Return A, D and dt_bias as models are initialised, and about have them when they are trained."""
    rng = np.random.default_rng(0)
    steps = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), H))
    return {
        "A": -rng.uniform(1, 16, H).astype("float32"),
        "D": np.ones(H, "float32"),
        "dt_bias": (steps + np.log(-np.expm1(-steps))).astype("float32"),
    }


def blocks(steps: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield the inputs of a thousand tokens after another, (tokens, 1, ...)."""
    rng = np.random.default_rng(1)
    sizes = {"x": (H, P), "dt": (H,), "B": (1, N), "C": (1, N)}
    for first in range(0, steps, BLOCK):
        count = min(BLOCK, steps - first)
        drawn = {n: rng.standard_normal((count, 1, *size)).astype("float32") for n, size in sizes.items()}
        yield drawn | {"dt": drawn["dt"] * np.float32(0.5)}


class Plain:
    """The recurrence in NumPy, in one dtype, with the state stored in another."""

    def __init__(self, dtype: str, stored: str):
        self.stored = stored
        self.A, self.D, self.bias = (array.astype(dtype) for array in parameters().values())
        self.state = np.zeros((H, P, N), dtype)

    def outputs(self, block: dict[str, np.ndarray]) -> np.ndarray:
        """Return the outputs of a block."""
        outs = []
        for x, dt, B, C in zip(
            *(block[name][:, 0].astype(self.A.dtype) for name in ("x", "dt", "B", "C")), strict=True
        ):
            d = np.log1p(np.exp(dt + self.bias))
            state = self.state * np.exp(self.A * d)[:, None, None] + (d[:, None] * x)[..., None] * B[:, None]
            outs.append((state * C[:, None]).sum(-1) + self.D[:, None] * x)
            self.state = state.astype(self.stored).astype(self.A.dtype)
        return np.array(outs, "float64")


class Decode:
    """The same by ``update``, in NumPy or in Torch on a GPU."""

    def __init__(self, curve: str, backend: str):
        dtype, *more = curve.split()
        self.backend, self.on_gpu = backend, backend == "triton"
        state = np.zeros((1, H, P, N), "float32")
        quantised = dtype.startswith(("int", "float8"))
        self.given = {name: self._to(array) for name, array in parameters().items()} | {"dt_softplus": True}
        self.state: Any = (
            ssu_bridge.QuantizedState.quantize(self._to(state), dtype) if quantised else self._cast(state, dtype)
        )
        self.seed = 0 if "stochastic" in more else None
        self.cursor = None
        if "replay" in more:
            self.state = ssu_bridge.to_replay(self.state, WINDOW, 1, 1)
            self.cursor = ssu_bridge.ReplayCursor.empty(1, WINDOW, 1, like=self._to(state))

    def _to(self, array: np.ndarray) -> Any:
        if not self.on_gpu:
            return array
        import torch

        return torch.from_numpy(array).cuda()

    def _cast(self, array: np.ndarray, dtype: str) -> Any:
        if not self.on_gpu:
            return array.astype(dtype)
        import torch

        return torch.from_numpy(array).cuda().to(getattr(torch, dtype))

    def outputs(self, block: dict[str, np.ndarray]) -> np.ndarray:
        """Return the outputs of a block."""
        arrays = {name: self._to(array) for name, array in block.items()}
        outs = self._to(np.zeros_like(block["x"]))
        for t in range(len(block["x"])):
            given = {name: array[t] for name, array in arrays.items()} | self.given
            if self.seed is not None:
                given["rand_seed"] = self.seed = self.seed + 1
            if self.cursor is not None:
                given["replay"] = self.cursor
            ssu_bridge.update(self.state, **given, out=outs[t], backend=self.backend)
            if self.cursor is not None:
                ssu_bridge.advance_replay(self.cursor, None, tokens=1)
        return (outs.cpu().numpy() if self.on_gpu else outs)[:, 0].astype("float64")


class Peer:
    """The same by a function of mamba_ssm's signature in Torch on a GPU, with A, D, dt and dt_bias as it takes them."""

    def __init__(self, curve: str, function: Any):
        import torch

        self.function = function
        self.state = torch.zeros((1, H, P, N), dtype=getattr(torch, curve), device="cuda")
        self.given = {name: torch.from_numpy(array).cuda() for name, array in parameters().items()}
        self.given["A"] = self.given["A"][:, None, None].expand(H, P, N)
        for name in ("D", "dt_bias"):
            self.given[name] = self.given[name][:, None].expand(H, P)

    def outputs(self, block: dict[str, np.ndarray]) -> np.ndarray:
        """Return the outputs of a block."""
        import torch

        arrays = {name: torch.from_numpy(array).cuda() for name, array in block.items()}
        arrays["dt"] = arrays["dt"][..., None].expand(-1, 1, H, P)
        outs = []
        for t in range(len(block["x"])):
            given = {name: array[t] for name, array in arrays.items()} | self.given
            outs.append(self.function(self.state, **given, dt_softplus=True))
        return torch.cat(outs).cpu().numpy().astype("float64")


class Scan:
    """The same on the xla backend, in a scan over a block."""

    def __init__(self, curve: str, backend: str):
        import jax

        dtype, *more = curve.split()
        state = jax.numpy.zeros((1, H, P, N), dtype)
        self.carry = (state, None)
        if "replay" in more:
            cursor = ssu_bridge.ReplayCursor.empty(1, WINDOW, 1, like=state)
            self.carry = (ssu_bridge.to_replay(state, WINDOW, 1, 1), cursor)
        weights = parameters()

        def body(carry: Any, token: Any) -> Any:
            state, cursor = carry
            more = {} if cursor is None else {"replay": cursor}
            out, state = ssu_bridge.update(state, **token, **weights, dt_softplus=True, backend=backend, **more)
            if cursor is not None:
                cursor = ssu_bridge.advance_replay(cursor, None, tokens=1)
            return (state, cursor), out

        self.run = jax.jit(functools.partial(jax.lax.scan, body))

    def outputs(self, block: dict[str, np.ndarray]) -> np.ndarray:
        """Return the outputs of a block."""
        self.carry, outs = self.run(self.carry, block)
        return np.array(outs)[:, 0].astype("float64")


def curves_of(backend: str) -> dict[str, Any]:
    """Return what makes the outputs of each curve: of a backend, of NumPy's own arithmetic, "plain", or a peer's."""
    if ":" in backend:
        module, function = backend.split(":")
        peer = getattr(importlib.import_module(module), function)
        return {curve: Peer(curve, peer) for curve in ("float32", "bfloat16", "float16")}
    if backend == "plain":
        return {curve: Plain("float32", curve.split()[0]) for curve in PLAIN}
    if backend == "xla":
        floats = [c for c in CURVES if c.startswith(("float32", "bfloat16", "float16")) and "stochastic" not in c]
        return {curve: Scan(curve, backend) for curve in floats}
    return {curve: Decode(curve, backend) for curve in CURVES}


def measured(backend: str, steps: int, only: list[str]) -> list[tuple[str, str, int, float]]:
    """Return (backend, curve, step, error): the error of the outputs since half as many steps, relative to them."""
    exact = Plain("float64", "float64")
    curves = {curve: decode for curve, decode in curves_of(backend).items() if not only or curve in only}
    marks = sorted({steps, *(2**n for n in range(4, 30) if 2**n < steps)})
    wrong, size = {curve: np.zeros(len(marks)) for curve in curves}, np.zeros(len(marks))
    done = 0
    for block in blocks(steps):
        outs = exact.outputs(block)
        at = np.searchsorted(marks, np.arange(done, done + len(outs)), side="right")
        np.add.at(size, at, (outs**2).sum((1, 2)))
        for curve, decode in curves.items():
            np.add.at(wrong[curve], at, ((decode.outputs(block) - outs) ** 2).sum((1, 2)))
        done += len(outs)
    return [
        (backend, curve, mark, float(np.sqrt(wrong[curve][i] / size[i])))
        for curve in curves
        for i, mark in enumerate(marks)
    ]


def plot(rows: list[tuple[str, str, int, float]], path: Path) -> None:
    """Draw the error over the steps, a panel for each backend."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys(row[0] for row in rows if row[0] not in ("plain", "peer")))
    figure, grid = pyplot.subplots(
        1, len(panels), figsize=(4.6 * len(panels) + 2, 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, panel in zip(grid[0], panels, strict=True):
        for curve in dict.fromkeys(row[1] for row in rows if row[0] == panel):
            points = [(step, error) for backend, name, step, error in rows if (backend, name) == (panel, curve)]
            style = ":" if "stochastic" in curve else "--" if "replay" in curve else "-"
            color = f"C{[c.split()[0] for c in dict.fromkeys(c.split()[0] for c in CURVES)].index(curve.split()[0])}"
            axes.plot(*zip(*points, strict=True), style, color=color, label=curve)
        axes.set(xscale="log", yscale="log", xlabel="steps", title=panel)
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("error of the outputs, relative")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def main() -> None:
    """Measure, save, and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--backend",
        action="append",
        default=[],
        help="plain, cpu, xla, reference, triton, or on a GPU a peer: MODULE:FUNCTION, of mamba_ssm's signature",
    )
    parser.add_argument("--curve", action="append", default=[], choices=[*CURVES, *PLAIN], help="absent: all")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--read", type=Path, action="append", default=[], help="a CSV file that --save wrote")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    rows: list[tuple[str, str, int, float]] = []
    for path in options.read:
        with path.open() as file:
            rows += [
                (backend, curve, int(step), float(error)) for backend, curve, step, error in [*csv.reader(file)][1:]
            ]
    for backend in options.backend:
        measurements = measured(backend, options.steps, options.curve)
        rows += [("peer" if ":" in backend else backend, *rest) for _, *rest in measurements]  # type: ignore[misc]
    for backend, curve, step, error in rows:
        if step == max(row[2] for row in rows if row[0] == backend):
            print(f"{backend:<10} {curve:<26} {step:>7} steps: {error:.2e}")
    if options.save:
        with options.save.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(
                [("backend", "curve", "step", "error"), *((b, c, s, f"{e:.4g}") for b, c, s, e in rows)]
            )
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    sys.exit(main())
