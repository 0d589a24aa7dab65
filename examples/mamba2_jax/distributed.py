"""Decode on several hosts, their devices in one mesh: each has its part of the heads and of the weights.

python -m mamba2_jax.distributed --hosts 2                                   # two processes on this machine
python -m mamba2_jax.distributed --hosts 2 --host 0 --coordinator HOST:PORT  # on the first of two hosts

Every host runs this program and gets the whole text.
"""

import argparse
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ssu_bridge
from command_line import mistakes_in_one_line, positive
from mamba2_jax import checkpoint, model
from mamba2_jax.config import Mamba2Config
from mamba2_jax.generate import KJV, decode, prefill
from mamba2_jax.sampling import Sampling
from mamba2_jax.text import tokenizer_of


def place(config: Mamba2Config, tree: Any) -> Any:
    """Return weights or states of one device with their heads shared by those of ``config.mesh``.

    What a device needs of an array lies together: of ``in_proj`` its channels of z and x, B and C of the groups that
    its heads read, and its heads' dt. A device then computes what one alone would that has no other heads. Every host
    passes the same arrays.
    """
    orders = _orders(config)

    def put(name: str, array: Any, spec: PartitionSpec) -> jax.Array:
        array = np.asarray(array)
        if name in orders:
            array = array.take(orders[name], axis=spec.index("heads"))
        placed: jax.Array = jax.device_put(array, NamedSharding(config.mesh, spec))
        return placed

    def put_part(part: Any) -> Any:
        if isinstance(part, model.Layer | model.State):
            specs = model.LAYER_SPECS if isinstance(part, model.Layer) else model.STATE_SPECS
            return type(part)(*map(put_field, part._fields, part, specs))
        return put("", part, PartitionSpec())

    def put_field(name: str, field: Any, spec: PartitionSpec) -> Any:
        """Put an array, or all those of a state that is quantised or replayed; their axes are the same."""
        return jax.tree_util.tree_map_with_path(
            lambda path, array: put(path[-1].name if path else name, array, spec), field
        )

    return jax.tree.map(put_part, tree, is_leaf=lambda part: isinstance(part, model.Layer | model.State))


def _orders(config: Mamba2Config) -> dict[str, np.ndarray]:
    """Return in which order arrays of these names have their rows, or what else is sharded, for devices to share."""
    heads, channels = np.arange(config.num_heads), np.arange(config.inner_size)
    groups = np.repeat(np.arange(config.n_groups), config.devices * config.of_a_device.n_groups // config.n_groups)
    B = (groups[:, None] * config.state_size + np.arange(config.state_size)).ravel()
    C = config.n_groups * config.state_size + B
    conv = [channels, *(config.inner_size + part for part in (B, C))]
    # z, the convolution's inputs, and dt.
    in_proj = [channels, *(config.inner_size + part for part in conv), config.inner_size + config.conv_size + heads]

    def together(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([part.reshape(config.devices, -1) for part in parts], axis=1).ravel()

    orders = {"in_proj": together(in_proj), "conv": together(conv), "B": groups}
    return orders | {f"{name}_bias": orders[name] for name in ("in_proj", "conv")}


def decoded(folder: Path, prompt: str, count: int) -> str:
    """Decode so many greedy tokens; each host gets all."""
    config, weights = checkpoint.load(folder)
    tokenizer = tokenizer_of(folder, config)
    mesh = jax.make_mesh((len(jax.devices()),), ("heads",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    config = config.over(mesh)
    states = model.zero_states(config, 1, weights.embedding.dtype.name, "float32")
    weights = place(config, weights)
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
