"""A Mamba-2 language model in plain JAX whose state lives in ``ssu_bridge.update``."""
