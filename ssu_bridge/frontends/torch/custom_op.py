"""``update`` as an operator of Torch: it declares what it writes, and is opaque to Dynamo and to dispatch modes."""

from collections.abc import Sequence
from typing import Any

import torch

from ssu_bridge.config import SSUConfig
from ssu_bridge.core.arguments import ARGUMENTS, REQUIRED, WRITTEN
from ssu_bridge.core.problem import Options
from ssu_bridge.dispatch import consider_problem
from ssu_bridge.errors import UnsupportedError
from ssu_bridge.frontends.base import Arrays, draws_seed, launcher_of, named, refuse_copy, returned
from ssu_bridge.frontends.torch import transforms
from ssu_bridge.frontends.torch.metadata import Key, problem_of, traced_key_of
from ssu_bridge.frontends.torch.seeds import placed

_WRITTEN = (*WRITTEN, "out")


def trace(options: Options, arrays: Arrays, out: torch.Tensor | None) -> tuple[Any, ...]:
    """Put the step into the graph that is being traced.

    Raises:
        UnsupportedError: a transform or a gradient would be lost; the message names it.
        TypeError, ValueError: ``donate`` or ``check_indices`` is set.
    """
    refuse_copy(options)
    if options.check_indices:
        raise ValueError("check_indices: expected False while Torch traces, where indices have no values yet, got True")
    if refusal := transforms.functorch_refusal():
        raise UnsupportedError(refusal)
    flat = _flat(options)
    transforms.require_no_grad(named(arrays, out), lambda: _selected(traced_key_of(placed(arrays, options), out), flat))
    if not draws_seed(arrays, options):  # the operator draws one, when it has checked its tensors
        arrays = placed(arrays, options)
    x = arrays[1]
    result = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    _step(*arrays, *[None] * (len(ARGUMENTS) - 1 - len(arrays)), result, *flat)
    return returned(named(arrays, result))


def _flat(options: Options) -> tuple[Any, ...]:
    """Spell options in the values that an operator takes, which Dynamo knows as constants."""
    config = options.config
    return (
        options.dt_softplus,
        options.pad_slot_id,
        options.disable_state_update,
        options.intermediate_stride,
        config.backend.value,
        config.algorithm,
        config.philox_rounds,
        config.triton_tile or (),
        config.stochastic_rounding,
        config.round_each_token,
        options.replay_window,
        options.replay_tokens,
    )


def _options(
    dt_softplus: bool,
    pad: int,
    keeps_state: bool,
    stride: int,
    backend: Any,
    algorithm: str,
    rounds: int,
    tile: Sequence[int],
    # Torch leaves out what is as it is by default.
    stochastic: bool = False,
    round_each: bool = False,
    window: int = 0,
    most: int = 0,
) -> Options:
    """Return the options that ``_flat`` spells."""
    triton_tile: Any = tuple(tile) or None
    config = SSUConfig(backend, algorithm, stochastic, rounds, triton_tile=triton_tile, round_each_token=round_each)
    return Options(dt_softplus, pad, keeps_state, True, False, stride, config, window, most)


def _selected(key: Key, flat: tuple[Any, ...]) -> str:
    return str(consider_problem(problem_of(key, _options(*flat))).backend)


# Dynamo calls it while it traces.
_selected._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _spell(place: int, name: str) -> str:
    """Spell an argument of the operator's schema; what is written has a number of its own for its memory."""
    kind = f"Tensor(a{place}!)" if name in _WRITTEN else "Tensor"
    return f"{kind}{'' if name in (*REQUIRED, 'out') else '?'} {name}"


_FLAGS = "bool dt_softplus, SymInt pad_slot_id, bool disable_state_update, SymInt intermediate_stride"
_CONFIG = "str backend, str algorithm, SymInt philox_rounds, SymInt[] triton_tile"
_LATER = "bool stochastic_rounding=False, bool round_each_token=False, SymInt replay_window=0, SymInt replay_tokens=0"
_SCHEMA = f"({', '.join(_spell(*argument) for argument in enumerate(ARGUMENTS))}, {_FLAGS}, {_CONFIG}, {_LATER}) -> ()"


@torch.library.custom_op("ssu_bridge::update", mutates_args=_WRITTEN, schema=_SCHEMA)
def _step(*arguments: Any) -> None:
    *arrays, out = arguments[: len(ARGUMENTS)]
    options = _options(*arguments[len(ARGUMENTS) :])
    launcher_of(tuple(arrays), out, options)(tuple(arrays), out)
