"""Speculation in Torch: a transformers Mamba2 verifies several tokens in one call, in a CUDA graph or on a CPU.

Drafts are what followed the last time that the text had the same tokens as at its end. ``update`` stores the state
after each token in a slot of its own and starts from that of the last accepted one, so that nothing is copied when
drafts are rejected. How many were accepted stays on the device, where the next call reads it: one recorded graph serves
all calls.

    python examples/torch_speculation.py
    python examples/torch_speculation.py --checkpoint FOLDER --prompt "In the beginning"
"""

import argparse
import time
from collections.abc import Callable

import torch
from transformers import AutoTokenizer, Mamba2Config, Mamba2ForCausalLM

import ssu_bridge
from command_line import mistakes_in_one_line, positive

Call = Callable[[torch.Tensor], torch.Tensor]


class Verifier:
    """A model with the states of some sequences, of each of which a call takes a fixed number of tokens.

    Args:
        model: it; without limits of dt.
        batch, tokens: how many sequences, and how many tokens of each: the newest of its text, and drafts.

    Attributes:
        accepted: (batch,), how many drafts of the last call were.
    """

    def __init__(self, model: Mamba2ForCausalLM, batch: int, tokens: int):
        config, device = model.config, model.device
        if tuple(config.time_step_limit) != (0.0, float("inf")):
            raise ValueError(f"time_step_limit: expected none, got {config.time_step_limit}")
        self._model, self._tokens = model, tokens
        self._slots = torch.arange(batch * tokens, device=device).view(batch, tokens)
        mixers = [layer.mixer for layer in model.backbone.layers]
        sizes = config.num_heads, config.head_dim, config.state_size
        self._states = [torch.zeros(batch * tokens, *sizes, device=device) for _ in mixers]
        # The convolution's last inputs: as many as it sees, and those that may have to be taken back.
        self._length = config.conv_kernel - 1 + tokens - 1
        self._inputs = [
            torch.zeros(batch, mixer.conv_dim, self._length, dtype=model.dtype, device=device) for mixer in mixers
        ]
        self.accepted = torch.zeros(batch, dtype=torch.int64, device=device)
        self._rejected = torch.zeros(batch, dtype=torch.int64, device=device)

    def read(self, prompts: torch.Tensor) -> torch.Tensor:
        """Read prompts (batch, length) from their beginning; return the tokens (batch,) that follow."""
        for array in (*self._states, *self._inputs, self.accepted, self._rejected):
            array.zero_()
        return self._forward(prompts, {"state_batch_indices": self._slots[:, 0]})[:, -1]

    def verify(self, fed: torch.Tensor) -> torch.Tensor:
        """Take (batch, tokens) that go on after what was accepted; return what follows each, and accept drafts."""
        tables = {"state_batch_indices": self._slots, "dst_state_batch_indices": self._slots}
        drawn = self._forward(fed, tables | {"num_accepted_tokens": self.accepted + 1})
        right = (fed[:, 1:] == drawn[:, :-1]).long().cumprod(dim=1).sum(dim=1)
        self.accepted.copy_(right)
        self._rejected.copy_(self._tokens - 1 - right)
        return drawn

    def _forward(self, tokens: torch.Tensor, slots: dict[str, torch.Tensor]) -> torch.Tensor:
        backbone, dtype = self._model.backbone, self._model.dtype
        x = backbone.embeddings(tokens)
        for layer, state, inputs in zip(backbone.layers, self._states, self._inputs, strict=True):
            residual = x.float() if layer.residual_in_fp32 else x
            x = residual + self._mix(layer.mixer, layer.norm(x.to(dtype)), state, inputs, slots)
        return self._model.lm_head(backbone.norm_f(x).to(dtype)).argmax(dim=-1)

    def _mix(
        self,
        mixer: torch.nn.Module,
        x: torch.Tensor,
        state: torch.Tensor,
        inputs: torch.Tensor,
        slots: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        shared = mixer.n_groups * mixer.ssm_state_size
        z, xBC, dt = mixer.in_proj(x).split([mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], dim=-1)
        xBC = self._convolve(mixer.conv1d, xBC.transpose(1, 2), inputs).transpose(1, 2).contiguous()
        heads, B, C = xBC.split([mixer.intermediate_size, shared, shared], dim=-1)
        y, _ = ssu_bridge.update(
            state,
            heads.unflatten(-1, (mixer.num_heads, mixer.head_dim)),
            dt,
            -torch.exp(mixer.A_log.float()),
            B.unflatten(-1, (mixer.n_groups, mixer.ssm_state_size)),
            C.unflatten(-1, (mixer.n_groups, mixer.ssm_state_size)),
            mixer.D,
            dt_bias=mixer.dt_bias,
            dt_softplus=True,
            **slots,
        )
        return mixer.out_proj(mixer.norm(y.flatten(2), z))

    def _convolve(self, convolution: torch.nn.Conv1d, x: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Convolve (batch, channels, tokens) with the inputs before them, but for those that were rejected."""
        kept = torch.arange(self._length, device=x.device) - self._rejected[:, None]
        history = inputs.gather(2, kept.clamp(min=0)[:, None].expand_as(inputs))
        window = torch.cat([history, x], dim=2)
        inputs.copy_(window[:, :, -self._length :])
        seen = window[:, :, self._tokens - 1 :]
        convolved = torch.nn.functional.conv1d(seen, convolution.weight, convolution.bias, groups=len(x[0]))
        return torch.nn.functional.silu(convolved)


def recorded(verifier: Verifier, batch: int, tokens: int) -> Call:
    """Record a verification in a CUDA graph, and return what replays it; the states are whatever comes of that."""
    fed = torch.zeros(batch, tokens, dtype=torch.int64, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled at their first call, which cannot be recorded
        verifier.verify(fed)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        drawn = verifier.verify(fed)

    def verify(tokens: torch.Tensor) -> torch.Tensor:
        fed.copy_(tokens)
        graph.replay()
        return drawn

    return verify


def look_up(text: list[int], count: int) -> list[int]:
    """Return so many drafts: what followed the latest of the longest matches with the end of the text."""
    for length in range(min(8, len(text) - 1), 0, -1):
        for start in range(len(text) - length - 1, -1, -1):
            if text[start : start + length] == text[-length:]:
                return (text[start + length :] * count)[:count]
    return [text[-1]] * count


@torch.inference_mode()
def decode(
    model: Mamba2ForCausalLM,
    prompts: list[list[int]],
    count: int,
    tokens: int,
    draft: Callable[[list[int], int], list[int]] = look_up,
) -> tuple[list[list[int]], int]:
    """Decode so many greedy tokens after prompts of one length; return them, and the number of calls.

    ``draft`` returns so many tokens that may follow a text.
    """
    verifier = Verifier(model, len(prompts), tokens)
    verify = recorded(verifier, len(prompts), tokens) if model.device.type == "cuda" else verifier.verify
    first = verifier.read(torch.tensor(prompts, device=model.device)).tolist()
    texts, calls = [[*prompt, token] for prompt, token in zip(prompts, first, strict=True)], 0
    while min(map(len, texts)) < len(prompts[0]) + count:
        fed = [[text[-1], *draft(text, tokens - 1)] for text in texts]
        drawn = verify(torch.tensor(fed, device=model.device)).tolist()
        for text, own, accepted in zip(texts, drawn, verifier.accepted.tolist(), strict=True):
            text += own[: accepted + 1]
        calls += 1
    return [text[len(prompts[0]) :][:count] for text in texts], calls


def random_model() -> Mamba2ForCausalLM:
    """Return a small model with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "state_size": 32, "n_groups": 2, "num_hidden_layers": 2}
    return Mamba2ForCausalLM(Mamba2Config(vocab_size=64, eos_token_id=None, **sizes))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="of a Mamba2 with its tokenizer; random weights and numbers without")
    parser.add_argument("--prompt", default="In the beginning")
    parser.add_argument("--tokens", type=positive, default=64, help="how many to decode")
    parser.add_argument("--verify", type=positive, default=4, help="tokens of a call")
    ssu_bridge.add_cli_args(parser)
    arguments = parser.parse_args()
    ssu_bridge.set_config(ssu_bridge.SSUConfig.from_args(arguments))
    with mistakes_in_one_line(parser):
        compare(arguments.checkpoint, arguments.prompt, arguments.tokens, arguments.verify)


def compare(checkpoint: str | None, prompt: str, count: int, tokens: int) -> None:
    """Decode with one token in a call and with several, and compare."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = (Mamba2ForCausalLM.from_pretrained(checkpoint) if checkpoint else random_model()).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint) if checkpoint else None
    prompts = [tokenizer(prompt)["input_ids"] if tokenizer else [5, 33, 7, 5, 33]]
    texts = {}
    for length in (1, tokens):
        decode(model, prompts, 2, length)  # compiles what is compiled
        started = time.perf_counter()
        texts[length], calls = decode(model, prompts, count, length)
        seconds = time.perf_counter() - started
        print(f"{length} tokens a call on {device}: {count} tokens in {calls} calls, {count / seconds:.0f} tokens/s")
    assert texts[tokens] == texts[1], "drafts must change no greedy text, but where two tokens are as likely"
    print(tokenizer.decode(texts[1][0]) if tokenizer else f"both: {texts[1][0]}")


if __name__ == "__main__":
    main()
