"""The step from Torch: eager, inside torch.compile, and captured in a CUDA graph.

A toy layer projects a token, takes the SSM step and projects its output back; weights and tokens are random. On a
machine without CUDA the graph is left out.

    python examples/torch_caller.py
"""

import argparse
from collections.abc import Callable

import torch

import ssu_bridge
from command_line import mistakes_in_one_line, positive

BATCH, SLOTS, HIDDEN, NHEADS, HEADDIM, DSTATE, NGROUPS = 4, 6, 256, 8, 64, 128, 1
INNER, SHARED = NHEADS * HEADDIM, NGROUPS * DSTATE


class Layer(torch.nn.Module):
    """A Mamba-2 layer without its convolution and gate, with a slotted state cache of its own."""

    def __init__(self, device: str):
        super().__init__()
        self.in_proj = torch.nn.Linear(HIDDEN, INNER + 2 * SHARED + NHEADS, bias=False, device=device)
        self.out_proj = torch.nn.Linear(INNER, HIDDEN, bias=False, device=device)
        self.A = torch.nn.Parameter(-torch.linspace(1, 16, NHEADS, device=device))
        self.D = torch.nn.Parameter(torch.ones(NHEADS, device=device))
        self.dt_bias = torch.nn.Parameter(torch.linspace(-4, -1, NHEADS, device=device))
        self.register_buffer("state", torch.zeros(SLOTS, NHEADS, HEADDIM, DSTATE, device=device))

    def forward(self, token: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Take one token of each sequence, (batch, HIDDEN); the state in ``slots`` is updated in place."""
        x, B, C, dt = self.in_proj(token).split([INNER, SHARED, SHARED, NHEADS], dim=-1)
        # Slices of one projection are strided along the batch, and may be passed as they are.
        y, _ = ssu_bridge.update(
            self.state,
            x.unflatten(-1, (NHEADS, HEADDIM)),
            dt,
            self.A,
            B.unflatten(-1, (NGROUPS, DSTATE)),
            C.unflatten(-1, (NGROUPS, DSTATE)),
            self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            state_batch_indices=slots,
        )
        return token + self.out_proj(y.flatten(1))


def decode(step: Callable[[torch.Tensor], torch.Tensor], token: torch.Tensor, count: int) -> torch.Tensor:
    """Feed each output back as the next token, so many times."""
    for _ in range(count):
        token = torch.nn.functional.normalize(step(token), dim=-1)
    return token


def captured(layer: Layer, token: torch.Tensor, slots: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Record a step in a CUDA graph, and return a step that replays it on tokens copied into its input."""
    static_token = token.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is first needed, such as compiled kernels, must not be made while recording
        layer(static_token, slots)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        static_out = layer(static_token, slots)

    def step(token: torch.Tensor) -> torch.Tensor:
        static_token.copy_(token)
        graph.replay()
        return static_out.clone()

    return step


def steps(layer: Layer, token: torch.Tensor, slots: torch.Tensor) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Return the ways to take a step that this machine has."""
    compiled = torch.compile(layer, fullgraph=True)
    compiled(token, slots)
    ways = {"eager": lambda token: layer(token, slots), "torch.compile": lambda token: compiled(token, slots)}
    if token.is_cuda:
        ways["CUDA graph"] = captured(layer, token, slots)
    return ways


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=positive, default=32, help="how many to decode")
    ssu_bridge.add_cli_args(parser)
    arguments = parser.parse_args()
    ssu_bridge.set_config(ssu_bridge.SSUConfig.from_args(arguments))
    with mistakes_in_one_line(parser):
        compare(arguments.tokens)


@torch.inference_mode()
def compare(count: int) -> None:
    """Decode in each way from the same state, and compare."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = Layer(device)
    token = torch.randn(BATCH, HIDDEN, device=device)
    slots = torch.tensor([5, 0, 3, 2], device=device)
    layer(token, slots)  # if the backend cannot run it, an eager call says so in fewer words
    results = {}
    for name, step in steps(layer, token, slots).items():
        layer.state.zero_()
        results[name] = decode(step, token, count), layer.state.clone()
    for name, (out, state) in results.items():
        # The step has the same bits in all of them; torch.compile may add and multiply around it in another order.
        torch.testing.assert_close(out, results["eager"][0])
        torch.testing.assert_close(state, results["eager"][1])
        assert not state[[1, 4]].any(), "slots that were not named must stay as they are"
        print(f"{name:<14}{count} tokens on {device}, as eager")


if __name__ == "__main__":
    main()
