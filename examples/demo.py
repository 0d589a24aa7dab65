"""A small Mamba-2 model writes text; then how fast each backend is, and the checker's verdict.

This is what ``make demo`` shows. The text comes from a byte-level model that was trained on the King James Bible, the
figures from that model and from random weights of mamba2-130m's sizes.

    python examples/demo.py --plot latency.png
"""

import argparse
import dataclasses
import time

import jax

import ssu_bridge
from command_line import mistakes_in_one_line, new_file, positive
from mamba2_jax import checkpoint
from mamba2_jax.benchmark import SIZES, compare
from mamba2_jax.generate import KJV, print_text
from mamba2_jax.initial import random_weights


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="And God said, ", help="what the text begins with")
    parser.add_argument("--tokens", type=positive, default=400, help="bytes of text")
    parser.add_argument("--rounds", type=positive, default=5, help="of each measurement")
    parser.add_argument("--layers", type=positive, default=24, help="of the model with random weights")
    parser.add_argument("--plot", type=new_file, metavar="PNG", help="also draw the latency of a token over the batch")
    ssu_bridge.add_cli_args(parser)
    arguments = parser.parse_args()
    ssu_bridge.set_config(ssu_bridge.SSUConfig.from_args(arguments))
    with mistakes_in_one_line(parser):
        passed = show(arguments)
    raise SystemExit(0 if passed else 1)


def show(arguments: argparse.Namespace) -> bool:
    """Print text, figures and verdicts; return whether all checks passed."""
    started = time.perf_counter()
    print_text(KJV, arguments.prompt, arguments.tokens)
    print(f"({arguments.tokens} bytes in {time.perf_counter() - started:.1f} s, with loading and compiling)\n")

    config, weights = checkpoint.load(KJV)
    print("The model that wrote this, one sequence:")
    passed = compare(config, weights, batch=1, tokens=64, rounds=arguments.rounds)
    if arguments.plot:
        from mamba2_jax.plot import plot_latency

        plot_latency(arguments.plot, config, weights, rounds=arguments.rounds)
        print(f"latency over batch: {arguments.plot}")

    config = dataclasses.replace(SIZES["mamba2-130m"], num_hidden_layers=arguments.layers)
    print(f"\nRandom weights of mamba2-130m's sizes, {arguments.layers} layers, one sequence:")
    weights = random_weights(config, jax.random.key(0))
    return compare(config, weights, batch=1, tokens=8, rounds=arguments.rounds) and passed


if __name__ == "__main__":
    main()
