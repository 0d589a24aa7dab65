"""Pictures: how long a token takes over the batch, and how requests are served over the load."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mamba2_jax import measure, model
from mamba2_jax.config import Mamba2Config
from mamba2_jax.load import Served

BATCHES = (1, 4, 16, 64)
_TOKENS = 16  # of a run


def plot_latency(path: Path, config: Mamba2Config, weights: model.Weights, *, rounds: int) -> None:
    """Measure batches of 1 to 64 sequences and write a PNG: milliseconds a token over the batch, both logarithmic."""
    pyplot = _pyplot()
    latency: dict[str, list[float]] = {}
    for batch in BATCHES:
        backends = measure.backends_present(measure.example_step(config, weights, batch, "float32"))
        sizes = config, weights, batch, "float32"
        runs = {b: measure.whole_tokens(*sizes, tokens=_TOKENS, backend=b)[0] for b in backends}
        for backend, seconds in measure.seconds(runs, rounds).items():
            latency.setdefault(backend, []).append(1e3 * seconds / _TOKENS)

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for backend, milliseconds in latency.items():
        axes.plot(BATCHES, milliseconds, marker="o", label=backend)
    axes.set(xscale="log", yscale="log", xlabel="sequences decoded together", ylabel="milliseconds a token")
    axes.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
    axes.minorticks_off()
    axes.legend(title="backend")
    axes.set_title(f"{config.num_hidden_layers} layers of {config.hidden_size}, float32")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def plot_load(path: Path, found: Mapping[str, list[tuple[float, Served]]]) -> None:
    """Write a PNG of what ``load.compare`` returned: rate, first token and later ones, over requests per second."""
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for name, points in found.items():
        rates, served = zip(*points, strict=True)
        values = (
            [own.rate for own in served],
            [1e3 * statistics.median(own.first) for own in served],
            [1e3 * statistics.median(own.later) for own in served],
        )
        for panel, own in zip(panels, values, strict=True):
            panel.plot(rates, own, marker="o", label=name)
    labels = "tokens per second", "milliseconds to the first token, median", "milliseconds a later token, median"
    for panel, label, scale in zip(panels, labels, ("linear", "log", "linear"), strict=True):
        panel.set(xlabel="requests per second", ylabel=label, yscale=scale)
    panels[0].legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")  # which needs no display
    from matplotlib import pyplot

    return pyplot
