"""Decode with random weights of a well-known model's sizes, with each backend present, and compare.

    python -m mamba2_jax.benchmark
    python -m mamba2_jax.benchmark --sizes mamba2-2.7b --batch 64 --dtype bfloat16 --state-dtype bfloat16
    python -m mamba2_jax.benchmark --sizes mamba2-2.7b --batch 256 --dtype bfloat16 --state-dtype bfloat16 --replay 16
    python -m mamba2_jax.benchmark --prompt 512
    python -m mamba2_jax.benchmark --verify 4
    python -m mamba2_jax.benchmark --speculate 8
    python -m mamba2_jax.benchmark --serve --one-row --rounds 1 --plot load.png
    python -m mamba2_jax.benchmark --sizes mamba2-2.7b --batch 256 --dtype bfloat16 --state-dtype bfloat16 --devices 2

The first is mamba2-130m with one sequence in float32. Each of the others measures something else instead: how prompts
are read, calls that verify several tokens, how much faster the trained model writes with drafts, how its scheduler
serves requests that arrive at random, and how much faster several devices decode that share the heads and the weights.
With ``--replay`` whole tokens and verifications are also measured with states that are written once in so many tokens,
and drafts are verified with such states.
"""

import argparse
import dataclasses
import functools

import jax
from jax.sharding import AxisType

import ssu_bridge
from command_line import mistakes_in_one_line, new_file, positive, positive_number
from mamba2_jax import checkpoint, drafts, load, measure, model, plot
from mamba2_jax.config import Mamba2Config
from mamba2_jax.generate import KJV
from mamba2_jax.initial import random_weights
from mamba2_jax.speculate import Speculation
from mamba2_jax.text import tokenizer_of

SIZES = {
    "mamba2-130m": Mamba2Config(50288, 768, 24, num_heads=24, head_dim=64, state_size=128),
    "mamba2-2.7b": Mamba2Config(50288, 2560, 64, num_heads=80, head_dim=64, state_size=128),
}
_DTYPES = ["float32", "bfloat16", "float16"]
_STATE_DTYPES = [*_DTYPES, *model.QUANTIZED]


def compare(
    config: Mamba2Config,
    weights: model.Weights,
    *,
    batch: int,
    tokens: int,
    rounds: int,
    state_dtype: str = "float32",
    replay: int | None = None,
) -> bool:
    """Print who runs and why, the speed of each backend present, that no state is copied, the checker's verdict."""
    step = measure.example_step(config, weights, batch, state_dtype)
    print(f"which backend runs, and why:\n{ssu_bridge.warm_up(**step)}")
    backends = measure.backends_present(step)
    steps = {b: measure.ssm_steps(weights, step, tokens=tokens, backend=b) for b in backends}
    _print_speeds("SSM step", measure.seconds(steps, rounds), 1e6 / (tokens * config.num_hidden_layers), "us")
    del steps  # and their states

    sizes, state = (config, weights, batch, state_dtype), jax.tree.leaves(step["state"])[0]
    whole = {b: measure.whole_tokens(*sizes, tokens=tokens, backend=b) for b in backends}
    runs = {backend: run for backend, (run, _) in whole.items()}
    windows = [(b, replay) for b in backends if replay and measure.replays(config, weights, step, replay, b)]
    replayed = {f"{b}, replay": measure.whole_tokens(*sizes, tokens=tokens, backend=b, replay=w) for b, w in windows}
    runs |= {name: run for name, (run, _) in replayed.items()}
    _print_speeds("whole token", measure.seconds(runs, rounds), 1e3 / tokens, "ms", tokens * batch)
    for backend, (_, compiled) in whole.items():
        if backend != "xla":  # whose arithmetic makes a new state before it is written to its slot
            measure.assert_no_copy_of_a_state(compiled, state)
            temporary = compiled.memory_analysis().temp_size_in_bytes
            print(
                f"  {backend}: the compiled program copies no state: {temporary / 1e6:.1f} MB of temporaries, "
                f"{config.num_hidden_layers} states of {state.nbytes / 1e6:.1f} MB"
            )

    report = ssu_bridge.check(**step)
    print(f"{report}\nverdict: {'pass' if report else 'FAIL'}")
    return bool(report)


def compare_prompts(
    config: Mamba2Config,
    weights: model.Weights,
    *,
    batch: int,
    length: int,
    rounds: int,
    state_dtype: str = "float32",
) -> None:
    """Print how fast each backend present reads prompts, in the SSM alone and in all, and how fast a scan of steps is.

    The scan takes as many times as long as the prompt has tokens: it is measured once, with the fastest backend.
    """
    step = measure.example_step(config, weights, batch, state_dtype, prompt=length)
    backends = measure.backends_present(step)
    calls = {b: measure.ssm_steps(weights, step, tokens=1, backend=b) for b in backends}
    _print_speeds("SSM, prompt", measure.seconds(calls, rounds), 1e6 / config.num_hidden_layers, "us")
    del calls
    sizes = config, weights, batch, state_dtype
    whole = {b: measure.whole_prompts(*sizes, length=length, backend=b) for b in backends}
    times = measure.seconds(whole, rounds)
    _print_speeds("prompt", times, 1e3, "ms", batch * length)
    del whole
    steps = measure.seconds({backends[0]: measure.prompts_by_steps(*sizes, length=length, backend=backends[0])}, 1)
    for backend, time in steps.items():
        print(f"  by steps    {backend:<12}{1e3 * time:9.2f} ms, {time / times[backend]:.1f} times one pass")


def compare_devices(
    config: Mamba2Config,
    weights: model.Weights,
    *,
    devices: int,
    batch: int,
    tokens: int,
    rounds: int,
    state_dtype: str = "float32",
) -> None:
    """Print how fast one device decodes, and several with heads and weights sharded over them."""
    mesh = jax.make_mesh((devices,), ("heads",), axis_types=(AxisType.Auto,))
    places = {"one device": None, f"{devices} devices": mesh}
    backend = measure.backends_present(measure.example_step(config, weights, batch, state_dtype))[0]
    whole = functools.partial(measure.whole_tokens, config, weights, batch, state_dtype, tokens=tokens, backend=backend)
    times = measure.seconds({name: whole(mesh=mesh)[0] for name, mesh in places.items()}, rounds)
    one = times["one device"]
    for name, time in times.items():
        rate = batch * tokens / time
        print(
            f"  {name:<12}{backend:<12}{1e3 * time / tokens:9.2f} ms{rate:10.1f} tokens/s  {one / time:.2f} times one"
        )


def _print_speeds(what: str, seconds: dict[str, float], scale: float, unit: str, tokens: int = 0) -> None:
    reference = "xla" if "xla" in seconds else next(iter(seconds))  # xla has no quantised states
    for backend, time in seconds.items():
        rate = f"{tokens / time:10.1f} tokens/s" if tokens else ""
        ratio = f"{seconds[reference] / time:.2f} times {reference}"
        print(f"  {what:<12}{backend:<20}{time * scale:9.2f} {unit}{rate}  {ratio}")


def main() -> None:
    """Compare the backends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", choices=SIZES, default="mamba2-130m", help="of which model")
    parser.add_argument("--layers", type=positive, help="so many instead of all")
    parser.add_argument("--batch", type=positive, default=1, help="sequences decoded together")
    parser.add_argument("--tokens", type=positive, default=32, help="tokens of each sequence in a run")
    parser.add_argument("--replay", type=positive, metavar="TOKENS", help="write states once in so many tokens, too")
    parser.add_argument("--prompt", type=positive, metavar="LENGTH", help="measure prompts of so many tokens instead")
    parser.add_argument(
        "--devices", type=positive, metavar="COUNT", help="measure heads and weights sharded over so many"
    )
    parser.add_argument("--verify", type=positive, metavar="TOKENS", help="measure calls that verify so many instead")
    parser.add_argument("--speculate", type=int, metavar="TOKENS", help="measure texts with drafts: see speculate.py")
    parser.add_argument("--branches", type=int, default=1, help="continuations that are verified, with --speculate")
    parser.add_argument("--serve", action="store_true", help="measure requests at random, in a batch of 8: see load.py")
    parser.add_argument("--one-row", action="store_true", help="with --serve, compare with a row for each prompt")
    parser.add_argument("--rows", type=positive, default=64, help="with --serve, tokens of a step that reads prompts")
    parser.add_argument("--requests", type=positive, default=64, help="with --serve, how many")
    parser.add_argument("--loads", type=positive_number, nargs="*", default=[0.3, 0.5, 0.7, 0.9], help="with --serve")
    parser.add_argument("--plot", type=new_file, metavar="PNG", help="with --serve, draw what was measured")
    parser.add_argument("--rounds", type=positive, default=5, help="of each measurement; medians are shown")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="of the weights")
    parser.add_argument("--state-dtype", choices=_STATE_DTYPES, default="float32")
    ssu_bridge.add_cli_args(parser)
    arguments = parser.parse_args()
    ssu_bridge.set_config(ssu_bridge.SSUConfig.from_args(arguments))
    if arguments.serve or arguments.speculate is not None:
        with mistakes_in_one_line(parser):
            _measure_the_trained_model(arguments)
        return
    config = SIZES[arguments.sizes]
    config = dataclasses.replace(config, num_hidden_layers=arguments.layers or config.num_hidden_layers)
    weights = random_weights(config, jax.random.key(0), arguments.dtype)
    print(f"{arguments.sizes}, {arguments.dtype} weights, batch {arguments.batch}, {arguments.state_dtype} states")
    options = {name: getattr(arguments, name) for name in ("batch", "rounds", "state_dtype")}
    passed = True
    with mistakes_in_one_line(parser):
        if arguments.prompt:
            compare_prompts(config, weights, length=arguments.prompt, **options)
        elif arguments.verify:
            options |= {"length": arguments.verify, "tokens": arguments.tokens, "replay": arguments.replay}
            drafts.compare_calls(config, weights, **options)
        elif arguments.devices:
            compare_devices(config, weights, devices=arguments.devices, tokens=arguments.tokens, **options)
        else:
            passed = compare(config, weights, tokens=arguments.tokens, replay=arguments.replay, **options)
    raise SystemExit(0 if passed else 1)


def _measure_the_trained_model(arguments: argparse.Namespace) -> None:
    number = arguments.speculate
    speculation = None if number is None else Speculation(number, arguments.branches, replay=arguments.replay)
    if arguments.serve:
        config, weights = checkpoint.load(KJV)
        sizes = {"width": 8, "rows": arguments.rows}
        schedulers = load.schedulers_of(config, weights, **sizes, one_row=arguments.one_row, speculation=speculation)
        text = tokenizer_of(KJV, config).encode((KJV / "prompts.txt").read_text())
        how = {"count": arguments.requests, "loads": arguments.loads, "rounds": arguments.rounds}
        found = load.compare(schedulers, text, **how)
        if arguments.plot:
            plot.plot_load(arguments.plot, found)
    elif speculation:
        drafts.compare_texts(speculation, tokens=arguments.tokens, rounds=arguments.rounds)


if __name__ == "__main__":
    main()
