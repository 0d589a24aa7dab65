"""Problem: the one description of a call, without its arrays."""

import dataclasses
from typing import Any

import numpy as np

from ssu_bridge.config import SSUConfig, replaced
from ssu_bridge.core.arguments import MOST_TOKENS_OF_A_TREE, STATE, WRITTEN, pattern_of


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """The arguments of a call that are not arrays, checked; a window of 0 tokens stands for no replay."""

    dt_softplus: bool
    pad_slot_id: int
    disable_state_update: bool
    donate: bool
    check_indices: bool
    intermediate_stride: int
    config: SSUConfig
    replay_window: int = 0
    replay_tokens: int = 0


def options_of(
    dt_softplus: Any,
    pad_slot_id: Any,
    disable_state_update: Any,
    donate: Any,
    check_indices: Any,
    intermediate_stride: Any,
    backend: Any,
    algorithm: Any,
    round_each_token: Any,
    config: SSUConfig,
    replay_window: int = 0,
    replay_tokens: int = 0,
) -> Options:
    """Check the arguments of a call that are not arrays, and put the configuration in force with them.

    Raises:
        ValueError, TypeError: one is wrong; the message names it, what was expected and what came.
    """
    flags = {"dt_softplus": dt_softplus, "disable_state_update": disable_state_update}
    for name, flag in {**flags, "donate": donate, "check_indices": check_indices}.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected a Python bool, got {_described(flag)}")
    for name, number in {"pad_slot_id": pad_slot_id, "intermediate_stride": intermediate_stride}.items():
        if isinstance(number, bool) or not isinstance(number, int | np.integer):
            raise TypeError(f"{name}: expected a Python int, got {_described(number)}")
    if not 1 <= intermediate_stride < 2**31:
        raise ValueError(f"intermediate_stride: expected an int from 1 to 2**31 - 1, got {intermediate_stride}")
    if not -(2**63) <= pad_slot_id < 2**63:
        raise ValueError(f"pad_slot_id: expected an int of 64 bits, got {pad_slot_id}")
    in_force = replaced(config, backend, algorithm, round_each_token)
    pad, stride = int(pad_slot_id), int(intermediate_stride)
    flags_in_order = (dt_softplus, pad, disable_state_update, donate, check_indices, stride)
    return Options(*flags_in_order, in_force, replay_window, replay_tokens)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One call of ``update`` without its arrays: what a backend needs to refuse it or to load a kernel for it.

    Attributes:
        framework: "jax", "torch" or "numpy".
        platform: "cpu", "cuda" or what else the framework calls it; None while JAX traces and has not lowered.
        capability: of a CUDA device, such as (9, 0).
        traced: JAX is tracing, so there are no values.
        layout: "single" token, x (b, H, P); "multi", x (b, T, H, P); or "packed", x (rows, H, P) and cu_seqlens.
        sequences, tokens, slots, nheads, headdim, dstate, ngroups: sizes; tokens is the number of packed rows when
            packed. A state without a head axis has nheads = ngroups = 1.
        heads_axis: the arrays have an axis of heads.
        dtypes: (name, dtype) of every array that was given, in the order of ``ARGUMENTS``.
        tied: names of the parameters that are one number a head.
        tables: names of the slot tables that have a column for each token. How many columns they have, how many steps
            the intermediate states, a kernel reads from the arrays: a token past the last one stores nothing there.
        columns: how many columns the slot tables have, the fewest of them; 0 without tables.
        entries: how many entries the intermediate states have.
        stochastic_rounding: the state is to be rounded stochastically, by ``options.config.philox_rounds`` rounds of
            Philox with the key in ``rand_seed``: 8 bytes, the low word first, whatever its dtype and shape.
        unaligned: names of the arrays, out included, that do not lie so that all that a kernel reads of them in
            vectors begins at a multiple of VECTOR_BYTES.
        strided: names of the arrays that have gaps between their entries.
        options: the arguments that are not arrays.
    """

    framework: str
    platform: str | None
    capability: tuple[int, int] | None = None
    traced: bool = False
    layout: str
    sequences: int
    tokens: int
    slots: int
    nheads: int
    headdim: int
    dstate: int
    ngroups: int
    heads_axis: bool
    dtypes: tuple[tuple[str, str], ...]
    tied: tuple[str, ...]
    tables: tuple[str, ...]
    columns: int
    entries: int
    stochastic_rounding: bool
    unaligned: tuple[str, ...]
    strided: tuple[str, ...]
    options: Options

    @property
    def names(self) -> tuple[str, ...]:
        """The arrays that were given, in the order in which kernels take them, without ``out``."""
        return tuple(name for name, _ in self.dtypes if name != "out")

    @property
    def rounds_each_token(self) -> bool:
        """Whether rounding the state after each token makes a difference: not to one token, nor in float32."""
        is_exact = dict(self.dtypes)["state"] == "float32"
        return self.options.config.round_each_token and not is_exact and self.layout != "single"

    @property
    def replays(self) -> bool:
        """Whether the state is a ReplayState: a checkpoint that is read, and rings that tokens are stored to."""
        return self.options.replay_window > 0

    @property
    def longest(self) -> int:
        """The most tokens of a packed sequence: rows beyond them belong to no sequence."""
        if self.replays:
            return self.options.replay_tokens
        return MOST_TOKENS_OF_A_TREE if "parent_tokens" in self.names else self.tokens

    @property
    def results(self) -> tuple[str, ...]:
        """What the call computes, in the order in which kernels take it: "out", then the arrays it writes in place."""
        kept = STATE if self.options.disable_state_update else ()
        return ("out", *(name for name in self.names if name in WRITTEN and name not in kept))

    def axes(self, name: str, count: int) -> str:
        """Return the symbols of an array's axes, as ``ARGUMENTS`` has them, for an array of so many."""
        return pattern_of(name, self.layout, self.heads_axis, count)

    def on(self, platform: str, capability: tuple[int, int] | None = None) -> "Problem":
        """Return the same problem on a platform."""
        return dataclasses.replace(self, platform=platform, capability=capability)


def _described(value: object) -> str:
    """Spell what came where a Python scalar was expected; a tracer by its type alone, because it prints badly."""
    return repr(value) if isinstance(value, (int, float, str, type(None), np.generic)) else type(value).__name__
