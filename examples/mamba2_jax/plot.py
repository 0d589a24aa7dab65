"""A picture of how long a token takes, over the batch, with each backend present."""

from pathlib import Path

from mamba2_jax import measure, model
from mamba2_jax.config import Mamba2Config

BATCHES = (1, 4, 16, 64)
_TOKENS = 16  # of a run


def plot_latency(path: Path, config: Mamba2Config, weights: model.Weights, *, rounds: int) -> None:
    """Measure batches of 1 to 64 sequences and write a PNG: milliseconds a token over the batch, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")  # which needs no display
    from matplotlib import pyplot

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
