"""How far the outputs of a long decode are from those in float64, for each dtype of a state: figures and their plot."""

import argparse
import csv
import functools
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (gives NumPy the dtypes "bfloat16" and "float8_e4m3fn")
import numpy as np

import ssu_bridge

WINDOW = 16


class Sizes(NamedTuple):
    """The numbers of heads, of channels and of elements of a channel's state."""

    H: int
    P: int
    N: int


# FlashInfer has kernels for no smaller ones, and for no others with int8 checkpoints.
ON_A_CPU, ON_A_GPU = Sizes(8, 8, 32), Sizes(8, 64, 128)
# What each curve stores the state as; stochastic rounding and replay are in its name.
CURVES = (
    "float32", "bfloat16", "bfloat16 stochastic", "float16", "float16 stochastic", "int16", "int8", "int8 stochastic",
    "float8_e4m3fn", "float8_e4m3fn stochastic", "float32 replay", "bfloat16 replay", "int8 replay",
)  # fmt: skip
# Those that a backend supports; absent: all.
SUPPORTED = {
    "xla": ("float32", "bfloat16", "float16", "float32 replay", "bfloat16 replay"),
    "flashinfer": (
        "float32", "bfloat16", "float16", "float16 stochastic", "int16",
        "float32 replay", "bfloat16 replay", "int8 replay",
    ),
}  # fmt: skip
PANELS = ("cpu", "xla", "reference", "triton", "flashinfer")
# What a kernel does that computes in float32 and stores with NumPy's rounding: mamba_ssm's and vLLM's do.
PLAIN = ("float32 plain", "bfloat16 plain", "float16 plain")
BLOCK = 1000
LIKE_X = ("x", "B", "C")


def on_a_gpu(backend: str) -> bool:
    """Return whether a backend, or a peer, needs one."""
    return backend in ("triton", "flashinfer") or ":" in backend


def sizes_of(backend: str) -> Sizes:
    """Return the sizes with which it is measured."""
    return ON_A_GPU if on_a_gpu(backend) or backend == "plain-gpu" else ON_A_CPU


def parameters(H: int) -> dict[str, np.ndarray]:
    """Return A, D and dt_bias as models are initialised, and about have them when they are trained."""
    rng = np.random.default_rng(0)
    steps = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), H))
    return {
        "A": -rng.uniform(1, 16, H).astype("float32"),
        "D": np.ones(H, "float32"),
        "dt_bias": (steps + np.log(-np.expm1(-steps))).astype("float32"),
    }


def blocks(steps: int, sizes: Sizes) -> Iterator[dict[str, np.ndarray]]:
    """Yield the inputs of a thousand tokens after another, (tokens, 1, ...).

    On a GPU x, B and C are numbers of bfloat16, which FlashInfer's kernel for replay requires.
    """
    rng = np.random.default_rng(1)
    H, P, N = sizes
    shapes = {"x": (H, P), "dt": (H,), "B": (1, N), "C": (1, N)}
    for first in range(0, steps, BLOCK):
        count = min(BLOCK, steps - first)
        drawn = {n: rng.standard_normal((count, 1, *shape)).astype("float32") for n, shape in shapes.items()}
        if sizes == ON_A_GPU:
            drawn |= {name: drawn[name].astype("bfloat16").astype("float32") for name in LIKE_X}
        yield drawn | {"dt": drawn["dt"] * np.float32(0.5)}


class Plain:
    """The recurrence in NumPy, in one dtype, with the state stored in another."""

    def __init__(self, dtype: str, stored: str, sizes: Sizes):
        self.stored = stored
        self.A, self.D, self.bias = (array.astype(dtype) for array in parameters(sizes.H).values())
        self.state = np.zeros(sizes, dtype)

    def outputs(self, block: dict[str, np.ndarray]) -> np.ndarray:
        """Return the outputs of a block."""
        outs = []
        for x, dt, B, C in zip(
            *(block[name][:, 0].astype(self.A.dtype) for name in ("x", "dt", "B", "C")), strict=True
        ):
            d = np.log1p(np.exp(dt + self.bias))
            state = self.state * np.exp(self.A * d)[:, None, None] + (d[:, None] * x)[..., None] * B[:, None]
            outs.append((state * C[:, None]).sum(-1) + self.D[:, None] * x)
            self.state = state.astype(self.stored, copy=False).astype(self.A.dtype, copy=False)
        return np.array(outs, "float64")


class Decode:
    """The same by ``update``, in NumPy or in Torch on a GPU."""

    def __init__(self, curve: str, backend: str, sizes: Sizes):
        dtype, *more = curve.split()
        self.backend, self.on_gpu = backend, on_a_gpu(backend)
        # FlashInfer's kernel for replay takes and returns nothing else.
        self.like_x = "bfloat16" if "replay" in more and backend == "flashinfer" else "float32"
        state = np.zeros((1, *sizes), "float32")
        quantised = dtype.startswith(("int", "float8"))
        self.given = {name: self._to(array) for name, array in parameters(sizes.H).items()} | {"dt_softplus": True}
        self.state: Any = (
            ssu_bridge.QuantizedState.quantize(self._to(state), dtype) if quantised else self._to(state, dtype)
        )
        self.seed = 0 if "stochastic" in more else None
        self.cursor = None
        if "replay" in more:
            self.state = ssu_bridge.to_replay(self.state, WINDOW, 1, 1, self.like_x, self.like_x)
            self.cursor = ssu_bridge.ReplayCursor.empty(1, WINDOW, 1, like=self._to(state))

    def _to(self, array: np.ndarray, dtype: str = "float32") -> Any:
        if not self.on_gpu:
            return array.astype(dtype, copy=False)
        import torch

        return torch.from_numpy(array).cuda().to(getattr(torch, dtype))

    def outputs(self, block: dict[str, np.ndarray]) -> np.ndarray:
        """Return the outputs of a block."""
        arrays = self.converted(block)
        outs = self._to(np.zeros_like(block["x"]), self.like_x)
        for t in range(len(block["x"])):
            ssu_bridge.update(self.state, **self.token(arrays, t), out=outs[t], backend=self.backend)
            if self.cursor is not None:
                ssu_bridge.advance_replay(self.cursor, None, tokens=1)
        return (outs.float().cpu().numpy() if self.on_gpu else outs)[:, 0].astype("float64")

    def converted(self, block: dict[str, np.ndarray]) -> dict[str, Any]:
        """Return the arrays of a block as ``update`` gets them."""
        return {n: self._to(array, self.like_x if n in LIKE_X else "float32") for n, array in block.items()}

    def token(self, arrays: dict[str, Any], t: int) -> dict[str, Any]:
        """Return the arguments of a token's call."""
        given = {name: array[t] for name, array in arrays.items()} | self.given
        if self.seed is not None:
            given["rand_seed"] = self.seed = self.seed + 1
        if self.cursor is not None:
            given["replay"] = self.cursor
        return given


class Peer:
    """The same by a function of mamba_ssm's signature in Torch on a GPU, with A, D, dt and dt_bias as it takes them."""

    def __init__(self, curve: str, function: Any, sizes: Sizes):
        import torch

        self.function, (H, P, N) = function, sizes
        self.state = torch.zeros((1, H, P, N), dtype=getattr(torch, curve), device="cuda")
        self.given = {name: torch.from_numpy(array).cuda() for name, array in parameters(H).items()}
        self.given["A"] = self.given["A"][:, None, None].expand(H, P, N)
        for name in ("D", "dt_bias"):
            self.given[name] = self.given[name][:, None].expand(H, P)

    def outputs(self, block: dict[str, np.ndarray]) -> np.ndarray:
        """Return the outputs of a block."""
        import torch

        arrays = {name: torch.from_numpy(array).cuda() for name, array in block.items()}
        arrays["dt"] = arrays["dt"][..., None].expand_as(arrays["x"])
        outs = []
        for t in range(len(block["x"])):
            given = {name: array[t] for name, array in arrays.items()} | self.given
            outs.append(self.function(self.state, **given, dt_softplus=True))
        return torch.cat(outs).cpu().numpy().astype("float64")


class Scan:
    """The same on the xla backend, in a scan over a block."""

    def __init__(self, curve: str, backend: str, sizes: Sizes):
        import jax

        dtype, *more = curve.split()
        state = jax.numpy.zeros((1, *sizes), dtype)
        self.carry = (state, None)
        if "replay" in more:
            cursor = ssu_bridge.ReplayCursor.empty(1, WINDOW, 1, like=state)
            self.carry = (ssu_bridge.to_replay(state, WINDOW, 1, 1), cursor)
        weights = parameters(sizes.H)

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
    sizes = sizes_of(backend)
    if ":" in backend:
        module, function = backend.split(":")
        peer = getattr(importlib.import_module(module), function)
        return {curve: functools.partial(Peer, curve, peer, sizes) for curve in ("float32", "bfloat16", "float16")}
    if backend.startswith("plain"):
        return {curve: functools.partial(Plain, "float32", curve.split()[0], sizes) for curve in PLAIN}
    decode = Scan if backend == "xla" else Decode
    return {curve: functools.partial(decode, curve, backend, sizes) for curve in SUPPORTED.get(backend, CURVES)}


def measured(backend: str, steps: int, only: list[str]) -> list[tuple[str, str, int, float]]:
    """Return (backend, curve, step, error): the error of the outputs since half as many steps, relative to them."""
    sizes = sizes_of(backend)
    exact = Plain("float64", "float64", sizes)
    curves = {curve: make() for curve, make in curves_of(backend).items() if not only or curve in only}
    marks = sorted({steps, *(2**n for n in range(4, 30) if 2**n < steps)})
    wrong, size = {curve: np.zeros(len(marks)) for curve in curves}, np.zeros(len(marks))
    done = 0
    for block in blocks(steps, sizes):
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

    panels = [name for name in PANELS if name in {row[0] for row in rows}]
    columns, lines = min(len(panels), 3), -(-len(panels) // 3)
    figure, grid = pyplot.subplots(
        lines, columns, figsize=(4.6 * columns + 2, 4.2 * lines), sharey=True, squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for axes, panel in zip(grid.flat, panels, strict=False):
        for curve in dict.fromkeys(row[1] for row in rows if row[0] == panel):
            points = [(step, error) for backend, name, step, error in rows if (backend, name) == (panel, curve)]
            style = ":" if "stochastic" in curve else "--" if "replay" in curve else "-"
            color = f"C{[c.split()[0] for c in dict.fromkeys(c.split()[0] for c in CURVES)].index(curve.split()[0])}"
            axes.plot(*zip(*points, strict=True), style, color=color, label=curve)
        axes.set(xscale="log", yscale="log", xlabel="steps", title=panel)
        axes.grid(alpha=0.3)
    for axes in grid[:, 0]:
        axes.set_ylabel("error of the outputs, relative")
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
        help=f"{', '.join(PANELS)}; plain: NumPy, plain-gpu: with the sizes of a GPU; or there a peer: MODULE:FUNCTION",
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
