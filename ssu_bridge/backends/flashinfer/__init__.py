"""The flashinfer backend: FlashInfer's CUDA kernels, for JAX and Torch arrays on NVIDIA GPUs."""

from ssu_bridge.backends.flashinfer.backend import CONFIG_FIELDS, PLATFORM, load, missing, refusal, settings

__all__ = ["CONFIG_FIELDS", "PLATFORM", "load", "missing", "refusal", "settings"]
