"""Mamba's selective_state_update for JAX, Torch and NumPy arrays, zero-copy and in place."""

from ssu_bridge.api import explain, update, warm_up
from ssu_bridge.config import Backend, SSUConfig, add_cli_args, get_config, set_config, using
from ssu_bridge.core.quantized import QuantizedState
from ssu_bridge.core.replay import ReplayCursor, ReplayState
from ssu_bridge.dlpack import after_torch, to_jax, to_torch
from ssu_bridge.errors import BackendNotAvailableError, NotInPlaceError, TooManyKernelsError, UnsupportedError
from ssu_bridge.export import export_checks, prepare
from ssu_bridge.replay import advance_replay, materialize, reset_replay, to_replay
from ssu_bridge.testing.check import Report, check

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "BackendNotAvailableError",
    "NotInPlaceError",
    "QuantizedState",
    "ReplayCursor",
    "ReplayState",
    "Report",
    "SSUConfig",
    "TooManyKernelsError",
    "UnsupportedError",
    "add_cli_args",
    "advance_replay",
    "after_torch",
    "check",
    "explain",
    "export_checks",
    "get_config",
    "materialize",
    "prepare",
    "reset_replay",
    "set_config",
    "to_jax",
    "to_replay",
    "to_torch",
    "update",
    "using",
    "warm_up",
]
