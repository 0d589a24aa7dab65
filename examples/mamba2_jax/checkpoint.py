"""Checkpoint folders in the Hugging Face layout: config.json and model.safetensors, whole or in shards."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from mamba2_jax.config import Mamba2Config, read_json
from mamba2_jax.model import Layer, Weights

# The tensor of each weight, and its shape.
_OUTER: dict[str, tuple[str, Any]] = {
    "embedding": ("backbone.embeddings.weight", lambda c: (c.vocab_size, c.hidden_size)),
    "norm": ("backbone.norm_f.weight", lambda c: (c.hidden_size,)),
    "head": ("lm_head.weight", lambda c: None if c.tie_word_embeddings else (c.vocab_size, c.hidden_size)),
}
_INNER: dict[str, tuple[str, Any]] = {
    "norm": ("norm.weight", lambda c: (c.hidden_size,)),
    "in_proj": ("mixer.in_proj.weight", lambda c: (c.projection_size, c.hidden_size)),
    "in_proj_bias": ("mixer.in_proj.bias", lambda c: (c.projection_size,) if c.use_bias else None),
    "conv": ("mixer.conv1d.weight", lambda c: (c.conv_size, 1, c.conv_kernel)),
    "conv_bias": ("mixer.conv1d.bias", lambda c: (c.conv_size,) if c.use_conv_bias else None),
    "A_log": ("mixer.A_log", lambda c: (c.num_heads,)),
    "D": ("mixer.D", lambda c: (c.num_heads,)),
    "dt_bias": ("mixer.dt_bias", lambda c: (c.num_heads,)),
    "gated_norm": ("mixer.norm.weight", lambda c: (c.inner_size,)),
    "out_proj": ("mixer.out_proj.weight", lambda c: (c.hidden_size, c.inner_size)),
    "out_proj_bias": ("mixer.out_proj.bias", lambda c: (c.hidden_size,) if c.use_bias else None),
}
# Few numbers with much weight: they stay in float32 whatever the rest is in.
_FLOAT32 = {"A_log", "D", "dt_bias"}


def template(config: Mamba2Config, dtype: str) -> Weights:
    """Return the shape and dtype of each weight in its place; None: the configuration does without it.

    The dtype is that of all weights but A_log, D and dt_bias, which are always float32.
    """

    def describe(name: str, shape: tuple[int, ...] | None) -> Any:
        return shape and jax.ShapeDtypeStruct(shape, jnp.float32 if name in _FLOAT32 else dtype)

    layer = Layer(**{name: describe(name, shape(config)) for name, (_, shape) in _INNER.items()})
    outer = {name: describe(name, shape(config)) for name, (_, shape) in _OUTER.items()}
    return Weights(**outer, layers=(layer,) * config.num_hidden_layers)


def load(folder: str | Path, dtype: str = "float32") -> tuple[Mamba2Config, Weights]:
    """Load a checkpoint of the ``mamba2`` architecture.

    Args:
        folder: has ``config.json``, and ``model.safetensors`` or ``model.safetensors.index.json`` with its shards.
        dtype: what the weights are converted to, apart from A_log, D and dt_bias, which become float32.

    Raises:
        FileNotFoundError: a file is missing, or is one of PyTorch's own.
        ValueError: a file is cut short, or a key or tensor is missing, unknown, or has another shape than config.json
            asks for; the message names it.
    """
    folder = Path(folder)
    config = Mamba2Config.load(folder)
    expected = _by_key(template(config, dtype))
    tensors: dict[str, Any] = {}
    for path in files(folder):
        tensors |= _read(path)
    _drop_tied_head(config, tensors)
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ValueError(f"{folder}: missing tensors: {', '.join(missing)}")
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise ValueError(f"{folder}: tensors that this model does not have: {', '.join(unknown)}")
    for key, wanted in expected.items():
        if tensors[key].shape != wanted.shape:
            raise ValueError(f"{folder}: {key}: expected shape {wanted.shape}, got {tensors[key].shape}")
        tensors[key] = tensors[key].astype(wanted.dtype, copy=False)
    # All at once: jnp.array compiles a program for each shape.
    return config, _from_keys(config, jax.block_until_ready(jax.device_put(tensors)))


def save(folder: str | Path, config: Mamba2Config, weights: Weights, dtype: str) -> None:
    """Write a checkpoint that :func:`load` and transformers read, with weights of a dtype as ``load`` has them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.save(folder)
    wanted = _by_key(template(config, dtype))
    tensors = {key: array.astype(wanted[key].dtype) for key, array in _by_key(weights).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def files(folder: Path) -> list[Path]:
    """Return the files of a checkpoint that hold weights, all of which are there.

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: the index of shards is none.
    """
    paths = _shards(folder)
    for path in paths:
        if not path.exists():
            others = sorted(file.name for file in path.parent.glob("*.bin"))
            instead = (
                f"got {', '.join(others)}; load that with transformers and save it again with save_pretrained"
                if others
                else "got none; download it"
            )
            raise FileNotFoundError(f"{path}: expected weights in the safetensors format, {instead}")
    return paths


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise ValueError(f"{index}: expected a weight_map of tensors to files, got {names!r}")
    return [folder / name for name in sorted(set(names.values()))]


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="np") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); download it again") from None


def _drop_tied_head(config: Mamba2Config, tensors: dict[str, np.ndarray]) -> None:
    """Some checkpoints hold the embedding a second time as the head that it is tied to."""
    head, embedding = tensors.get("lm_head.weight"), tensors.get("backbone.embeddings.weight")
    if config.tie_word_embeddings and head is not None and embedding is not None and np.array_equal(head, embedding):
        del tensors["lm_head.weight"]


def _by_key(weights: Weights) -> dict[str, Any]:
    """Name each weight (or its shape) as its tensor."""
    named = {key: getattr(weights, name) for name, (key, _) in _OUTER.items()}
    for i, layer in enumerate(weights.layers):
        named |= {f"backbone.layers.{i}.{key}": getattr(layer, name) for name, (key, _) in _INNER.items()}
    return {key: value for key, value in named.items() if value is not None}


def _from_keys(config: Mamba2Config, tensors: dict[str, Any]) -> Weights:
    def fields(table: dict[str, tuple[str, Any]], prefix: str = "") -> dict[str, Any]:
        return {name: tensors.get(prefix + key) for name, (key, _) in table.items()}

    layers = tuple(Layer(**fields(_INNER, f"backbone.layers.{i}.")) for i in range(config.num_hidden_layers))
    return Weights(**fields(_OUTER), layers=layers)
