"""The sizes of a Mamba-2 model, by the names of Hugging Face's config.json."""

import dataclasses
import json
from pathlib import Path
from typing import Any

# What the model computes in one way only, and a config.json may ask for in others.
_FIXED: dict[str, Any] = {"model_type": "mamba2", "hidden_act": "silu"}


@dataclasses.dataclass(frozen=True)
class Mamba2Config:
    """The sizes of a model; the fields are those of ``transformers.Mamba2Config``.

    Attributes:
        vocab_size: number of tokens.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of layers.
        num_heads, head_dim, state_size, n_groups: H, P, N and G of the SSM step.
        conv_kernel: inputs that the causal convolution sees.
        layer_norm_epsilon: what the norms add to the mean square.
        use_bias: whether in_proj and out_proj have a bias.
        use_conv_bias: whether the convolution has one.
        tie_word_embeddings: whether the head is the embedding.
        residual_in_fp32: whether the residual stream is float32 alongside narrower weights.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_heads: int
    head_dim: int
    state_size: int
    n_groups: int = 1
    conv_kernel: int = 4
    layer_norm_epsilon: float = 1e-5
    use_bias: bool = False
    use_conv_bias: bool = True
    tie_word_embeddings: bool = True
    residual_in_fp32: bool = True

    @property
    def inner_size(self) -> int:
        """Channels of all heads."""
        return self.num_heads * self.head_dim

    @property
    def conv_size(self) -> int:
        """Channels that go through the convolution: x, B and C."""
        return self.inner_size + 2 * self.n_groups * self.state_size

    @property
    def projection_size(self) -> int:
        """What in_proj makes of a token: z, x, B, C and dt."""
        return self.inner_size + self.conv_size + self.num_heads

    @classmethod
    def load(cls, folder: Path) -> "Mamba2Config":
        """Read ``config.json``.

        Raises:
            FileNotFoundError: there is none in the folder.
            ValueError: a key is missing or has a value that this model does not compute; the message names it.
        """
        path = folder / "config.json"
        found = json.loads(path.read_text())
        for key, expected in _FIXED.items():
            if found.get(key) != expected:
                raise ValueError(f"{path}: {key}: expected {expected!r}, got {found.get(key)!r}")
        if not _is_unlimited(found.get("time_step_limit")):
            raise ValueError(f"{path}: time_step_limit: expected no limits, got {found['time_step_limit']!r}")
        # transformers writes all of them, so that one that is absent is an accident and not a default.
        names = [field.name for field in dataclasses.fields(cls)]
        if missing := [name for name in names if name not in found]:
            raise ValueError(f"{path}: missing {', '.join(missing)}")
        config = cls(**{name: found[name] for name in names})
        if config.num_heads % config.n_groups:
            raise ValueError(f"{path}: n_groups: expected a divisor of {config.num_heads} heads, got {config.n_groups}")
        return config

    def save(self, folder: Path) -> None:
        """Write a ``config.json`` that transformers reads too."""
        derived = {"architectures": ["Mamba2ForCausalLM"], "expand": self.inner_size // self.hidden_size}
        content = {**_FIXED, **derived, **dataclasses.asdict(self)}
        (folder / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _is_unlimited(limit: Any) -> bool:
    """Say whether dt may be anything: JSON has no infinity, and transformers spells it in two ways."""
    return limit is None or (limit[0] == 0 and limit[1] in (float("inf"), {"__float__": "Infinity"}))
