"""Programs that run in several processes at once, as on several hosts."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from without_torch import WITHOUT_TORCH

# What each process of JAX begins with: its devices are those of all processes.
JAX = (
    WITHOUT_TORCH
    + """
import jax
jax.distributed.initialize(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
from sharded import *
rank = jax.process_index()
assert len(jax.devices()) == jax.process_count() * jax.local_device_count()


def same_here(got, expected):
    assert got.keys() == expected.keys()
    for name, array in got.items():
        for shard in array.addressable_shards:
            here = np.array(expected[name])[shard.index]
            assert np.array(shard.data).tobytes() == here.tobytes(), (name, shard.index)
"""
)
TORCH = """
import sys
import torch
torch.distributed.init_process_group("gloo", f"tcp://{sys.argv[1]}", world_size=int(sys.argv[2]), rank=int(sys.argv[3]))
torch.set_num_threads(1)
rank = torch.distributed.get_rank()
"""


def run(program, processes, *arguments, local_devices=2, timeout=300):
    """Run a program in so many processes, with arguments after its rank; return what each printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={local_devices}",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        "SSU_BRIDGE_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", program, where, str(processes)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [
        subprocess.Popen([*command, str(rank), *arguments], env=environment, **streams) for rank in range(processes)
    ]
    try:
        shown = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, shown, strict=True):
        assert process.returncode == 0, errors[-4000:]
    return [printed for printed, _ in shown]
