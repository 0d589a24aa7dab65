"""The triton backend: the project's own GPU kernels, for JAX and Torch arrays on NVIDIA GPUs."""

from ssu_bridge.backends.triton.backend import CONFIG_FIELDS, PLATFORM, load, missing, refusal, settings

__all__ = ["CONFIG_FIELDS", "PLATFORM", "load", "missing", "refusal", "settings"]
