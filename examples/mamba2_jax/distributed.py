"""Decode on several hosts, their devices in one mesh: each has its part of the heads and of the weights.

python -m mamba2_jax.distributed --hosts 2                                   # two processes on this machine
python -m mamba2_jax.distributed --hosts 2 --host 0 --coordinator HOST:PORT  # on the first of two hosts

Every host runs this program and gets the whole text.
"""

import argparse
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import ssu_bridge
from command_line import mistakes_in_one_line, positive
from mamba2_jax import checkpoint, model
from mamba2_jax.config import Mamba2Config
from mamba2_jax.generate import KJV, decode, prefill
from mamba2_jax.sampling import Sampling
from mamba2_jax.text import tokenizer_of

# Which axis of each part of an array goes with the heads; None: every device has all of it, as B and C. Each device
# computes what its heads need, and XLA sums what leaves a layer over the devices.
_WEIGHTS: dict[str, Sequence[int | None]] = {
    "in_proj": (0, 0, None, 0), "in_proj_bias": (0, 0, None, 0), "conv": (0, None), "conv_bias": (0, None),
    "A_log": (0,), "D": (0,), "dt_bias": (0,), "gated_norm": (0,), "out_proj": (1,),
}  # fmt: skip
_STATES: dict[str, Sequence[int | None]] = {"ssm": (1,), "conv": (2, None)}


def place(tree: Any, mesh: Mesh) -> Any:
    """Return weights or states with their heads spread over the mesh; every host passes the same arrays."""

    def put(array: Any, axis: int | None) -> jax.Array:
        if axis is None or array.shape[axis] % mesh.size:  # what does not divide is on every device
            spec = PartitionSpec()
        else:
            spec = PartitionSpec(*[None] * axis, "heads")
        placed: jax.Array = jax.device_put(np.asarray(array), NamedSharding(mesh, spec))
        return placed

    def put_field(array: Any, axes: Sequence[int | None]) -> Any:
        if len(axes) == 1:  # a quantised state and one that is replayed consist of arrays with the same axes
            return jax.tree.map(lambda leaf: put(leaf, axes[0]), array)
        return array and tuple(map(put, array, axes))

    def put_fields(part: Any, axes: dict[str, Sequence[int | None]]) -> dict[str, Any]:
        return {name: put_field(array, axes.get(name, (None,))) for name, array in part._asdict().items()}

    def put_all(part: Any) -> Any:
        if not isinstance(part, model.Layer | model.State):
            return put(part, None)
        if isinstance(part, model.State):
            return model.State(**put_fields(model.state_in_parts(part), _STATES))
        return model.Layer(**put_fields(model.in_parts(part), _WEIGHTS))

    return jax.tree.map(put_all, tree, is_leaf=lambda part: isinstance(part, model.Layer | model.State))


def decoded(folder: Path, prompt: str, count: int) -> str:
    """Decode so many greedy tokens; each host gets all."""
    config, weights = checkpoint.load(folder)
    tokenizer = tokenizer_of(folder, config)
    mesh = jax.make_mesh((len(jax.devices()),), ("heads",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    states = place(model.zero_states(config, 1, weights.embedding.dtype.name, "float32"), mesh)
    weights = place(weights, mesh)
    keys = jax.jit(lambda: jax.random.key(0)[None], out_shardings=everywhere)()
    slots = np.zeros(1, np.int32)
    progress = prefill(config, weights, states, [tokenizer.encode(prompt)], slots)
    greedy = Sampling(temperature=0)
    tokens, _ = decode(config, weights, progress, slots, keys, count=count, sampling=greedy)
    read = tokenizer.reader()
    tokens = jax.jit(jnp.copy, out_shardings=everywhere)(tokens)
    return "".join(map(read, np.asarray(tokens.addressable_data(0))[0].tolist())) + read.rest()


def check_files(folder: Path) -> None:
    """Raise what loading would for a missing file: before hosts wait for each other, and without JAX's devices."""
    tokenizer_of(folder, Mamba2Config.load(folder))
    checkpoint.files(folder)


def on_this_machine(arguments: list[str], hosts: int) -> int:
    """Run the program once for each host, on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "mamba2_jax.distributed", *arguments, "--coordinator", coordinator, "--host"]
    processes = [subprocess.Popen([*command, str(host)]) for host in range(hosts)]
    return max([process.wait() for process in processes])


def main(argv: list[str] | None = None) -> int:
    """Start a process for each host, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=positive, default=2, help="how many there are")
    parser.add_argument("--host", type=int, help="which one this is, from 0")
    parser.add_argument("--coordinator", help="HOST:PORT of the first one")
    parser.add_argument("--checkpoint", type=Path, default=KJV, help="a folder in the Hugging Face layout")
    parser.add_argument("--prompt", default="In the beginning")
    parser.add_argument("--tokens", type=positive, default=64, help="how many to generate")
    ssu_bridge.add_cli_args(parser)
    arguments = parser.parse_args(argv)
    if arguments.host is not None and not (arguments.coordinator and 0 <= arguments.host < arguments.hosts):
        parser.error("--host: expected a number from 0 to less than --hosts, with --coordinator")
    ssu_bridge.set_config(ssu_bridge.SSUConfig.from_args(arguments))
    with mistakes_in_one_line(parser):
        check_files(arguments.checkpoint)
        if arguments.host is None:
            return on_this_machine(sys.argv[1:] if argv is None else argv, arguments.hosts)
        jax.distributed.initialize(arguments.coordinator, arguments.hosts, arguments.host)
        text = decoded(arguments.checkpoint, arguments.prompt, arguments.tokens)
    if arguments.host == 0:
        print(f"{len(jax.devices())} devices of {arguments.hosts} hosts")
        print(arguments.prompt + text, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
