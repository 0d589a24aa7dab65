"""The sizes of a Mamba-2 model, by the names of Hugging Face's config.json."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

# What the model computes in one way only, and a config.json may ask for in others.
_FIXED: dict[str, tuple[str, ...]] = {"model_type": ("mamba2",), "hidden_act": ("silu", "swish")}
_UNLIMITED = (0.0, math.inf)


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
        time_step_limit: the least and the largest dt.
        eos_token_ids: the tokens that end a text.
        mesh: the ``jax.sharding.Mesh`` of devices that share the heads, along its axis "heads"; None: one has them all.
        devices_of_a_group: how many of them have heads of one group.
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
    time_step_limit: tuple[float, float] = _UNLIMITED
    eos_token_ids: tuple[int, ...] = ()
    mesh: Any = None
    devices_of_a_group: int = 1

    @property
    def has_unlimited_steps(self) -> bool:
        """Whether dt may be anything."""
        return self.time_step_limit == _UNLIMITED

    @property
    def inner_size(self) -> int:
        """Channels of all heads."""
        return self.num_heads * self.head_dim

    @property
    def expand(self) -> int:
        """How many times as wide as the residual stream that is: a whole number in transformers, else a ValueError."""
        expand, rest = divmod(self.inner_size, self.hidden_size)
        if rest:
            raise ValueError(
                f"num_heads * head_dim: expected a multiple of hidden_size {self.hidden_size}, because transformers "
                f"reads no other, got {self.inner_size}"
            )
        return expand

    @property
    def conv_size(self) -> int:
        """Channels that go through the convolution: x, B and C."""
        return self.inner_size + 2 * self.n_groups * self.state_size

    @property
    def devices(self) -> int:
        """How many devices share the heads."""
        return 1 if self.mesh is None else self.mesh.shape["heads"]

    def over(self, mesh: Any) -> "Mamba2Config":
        """Return the same model with its heads shared by the devices of a mesh with an axis "heads".

        Raises:
            ValueError: a device would have a part of a head, or parts of groups.
        """
        devices = mesh.shape["heads"]
        if self.num_heads % devices:
            raise ValueError(f"num_heads: expected a multiple of {devices} devices, got {self.num_heads}")
        if self.n_groups > 1 and self.n_groups % devices:
            raise ValueError(f"n_groups: expected 1 or a multiple of {devices} devices, got {self.n_groups}")
        return dataclasses.replace(self, mesh=mesh)

    @property
    def of_a_device(self) -> "Mamba2Config":
        """The sizes of the layers that each device has: those of its heads and of the groups that these read."""
        return dataclasses.replace(
            self,
            num_heads=self.num_heads // self.devices,
            n_groups=max(self.n_groups // self.devices, 1),
            devices_of_a_group=self.devices if self.n_groups == 1 else 1,
        )

    @property
    def projection_size(self) -> int:
        """What in_proj makes of a token: z, x, B, C and dt."""
        return self.inner_size + self.conv_size + self.num_heads

    @classmethod
    def load(cls, folder: Path) -> "Mamba2Config":
        """Read ``config.json``, and the end tokens of ``generation_config.json`` where there is one.

        Raises:
            FileNotFoundError: there is no ``config.json`` in the folder.
            ValueError: a key is missing or has a value that this model does not compute; the message names it.
        """
        path = folder / "config.json"
        found = read_json(path)
        if "d_model" in found and "ssm_cfg" in found:
            raise ValueError(
                f"{path}: expected a checkpoint in the Hugging Face layout, got one of the original state-spaces code; "
                "convert it with transformers' convert_mamba2_ssm_checkpoint_to_pytorch.py"
            )
        for key, allowed in _FIXED.items():
            if found.get(key) not in allowed:
                raise ValueError(f"{path}: {key}: expected {' or '.join(map(repr, allowed))}, got {found.get(key)!r}")
        # transformers writes all of them, so that one that is absent is an accident and not a default.
        names = [field.name for field in dataclasses.fields(cls) if field.name not in _OWN_FORMS]
        if missing := [name for name in names if name not in found]:
            raise ValueError(f"{path}: missing {', '.join(missing)}")
        try:
            generation = folder / "generation_config.json"
            ends = read_json(generation).get("eos_token_id") if generation.exists() else None
            return cls(
                **{name: found[name] for name in names},
                time_step_limit=_limits(found.get("time_step_limit")),
                eos_token_ids=_token_ids(found.get("eos_token_id") if ends is None else ends),
            )._checked()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def _checked(self) -> "Mamba2Config":
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name}: expected an int of 1 or more, got {value!r}")
            if field.type is bool and type(value) is not bool:
                raise ValueError(f"{field.name}: expected true or false, got {value!r}")
        epsilon = self.layer_norm_epsilon
        if type(epsilon) not in (int, float) or not 0 <= epsilon < math.inf:
            raise ValueError(f"layer_norm_epsilon: expected a number of 0 or more, got {epsilon!r}")
        if self.num_heads % self.n_groups:
            raise ValueError(f"n_groups: expected a divisor of {self.num_heads} heads, got {self.n_groups}")
        return self

    def save(self, folder: Path) -> None:
        """Write a ``config.json`` that transformers reads too.

        Raises:
            ValueError: transformers has no such model: see ``expand``.
        """
        content: dict[str, Any] = {name: allowed[0] for name, allowed in _FIXED.items()}
        content |= {
            "architectures": ["Mamba2ForCausalLM"],
            "expand": self.expand,
            "eos_token_id": list(self.eos_token_ids) or None,
        }
        content |= {name: value for name, value in dataclasses.asdict(self).items() if name not in _OWN_FORMS}
        if not self.has_unlimited_steps:
            content["time_step_limit"] = [_INFINITY if n == math.inf else n for n in self.time_step_limit]
        (folder / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


# What a config.json has in other forms, or not at all.
_OWN_FORMS = ("time_step_limit", "eos_token_ids", "mesh", "devices_of_a_group")
# JSON has no infinity; Python writes one of its own, and transformers this.
_INFINITY = {"__float__": "Infinity"}


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; expected a checkpoint folder in the Hugging Face layout")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got a file that is not ({error}); download it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def _limits(found: Any) -> tuple[float, float]:
    if found is None:
        return _UNLIMITED
    numbers = [math.inf if n == _INFINITY else n for n in found] if isinstance(found, list) else []
    if len(numbers) != 2 or any(type(n) not in (int, float) for n in numbers) or not 0 <= numbers[0] <= numbers[1]:
        raise ValueError(f"time_step_limit: expected the least and the largest dt, got {found!r}")
    return float(numbers[0]), float(numbers[1])


def _token_ids(found: Any) -> tuple[int, ...]:
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if any(type(token) is not int for token in ids):
        raise ValueError(f"eos_token_id: expected an int or a list of them, got {found!r}")
    return tuple(ids)
