"""What verification costs a model, and what drafts gain: measurements for ``benchmark``."""

import functools
import statistics
from collections.abc import Callable

import ssu_bridge
from mamba2_jax import checkpoint, measure, model, speculate
from mamba2_jax.config import Mamba2Config
from mamba2_jax.generate import KJV, stream
from mamba2_jax.sampling import Sampling
from mamba2_jax.speculate import Speculation
from mamba2_jax.text import tokenizer_of


def compare_calls(
    config: Mamba2Config,
    weights: model.Weights,
    *,
    batch: int,
    length: int,
    tokens: int,
    rounds: int,
    state_dtype: str = "float32",
    replay: int | None = None,
) -> None:
    """Print how long a call of the model takes that verifies so many tokens, over one with a single token in place.

    On the configured backend, or on each that is present.
    """
    sizes = config, weights, batch, state_dtype
    step, configured = measure.example_step(*sizes), ssu_bridge.get_config().backend
    present = measure.backends_present(step)
    for backend in present if configured == ssu_bridge.Backend.AUTO else [str(configured)]:
        verified = functools.partial(measure.whole_verifications, *sizes, length=length, count=tokens, backend=backend)
        runs = {"one token": measure.whole_tokens(*sizes, tokens=tokens, backend=backend)[0]}
        runs[f"{length} tokens, a slot for each"] = verified()
        if replay and measure.replays(config, weights, step, replay, backend, tokens=length):
            runs[f"{length} tokens, replay of {replay}"] = verified(replay=replay)
        times = measure.seconds(runs, rounds)
        for name, time in times.items():
            ratio = time / times["one token"]
            print(f"  {backend:<12}{name:<28}{1e3 * time / tokens:9.2f} ms  {ratio:.2f} times one token", flush=True)
        del runs


def compare_texts(speculation: Speculation, *, tokens: int, rounds: int) -> None:
    """Print what drafts gain for the trained model, greedy, after each of the prompts that come with it."""
    config, weights = checkpoint.load(KJV)
    tokenizer, greedy = tokenizer_of(KJV, config), Sampling(temperature=0)
    gains, counts = [], []
    for line in (KJV / "prompts.txt").read_text().splitlines():
        prompt = tokenizer.encode(line)
        reports: list[speculate.Counts] = []

        def plain(prompt: list[int] = prompt) -> None:
            list(stream(config, weights, prompt, tokens, sampling=greedy))

        def drafted(prompt: list[int] = prompt, report: Callable[[speculate.Counts], None] = reports.append) -> None:
            how = functools.partial(speculate.stream, speculation=speculation, sampling=greedy, report=report)
            list(how(config, weights, prompt, tokens))

        times = measure.seconds({"plain": plain, "drafts": drafted}, rounds)
        gains.append(times["plain"] / times["drafts"])
        counts.append(reports[-1])
        rates = ", ".join(f"{name} {tokens / time:.0f} tokens/s" for name, time in times.items())
        print(f"  {line[:24]:<26}{rates}, {gains[-1]:.2f} times; {counts[-1]}", flush=True)
    total = speculate.Counts(*map(sum, zip(*counts, strict=True)))
    print(f"median of {len(gains)} prompts: {statistics.median(gains):.2f} times the tokens per second; {total}")
