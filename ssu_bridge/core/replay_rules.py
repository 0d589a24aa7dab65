"""What a call with a ReplayState must be, besides what every call must be."""

from collections.abc import Mapping

from ssu_bridge.core.arguments import CURSOR
from ssu_bridge.core.arrays import ArrayInfo
from ssu_bridge.core.problem import Options
from ssu_bridge.core.shapes import Shapes
from ssu_bridge.errors import UnsupportedError

_NOT_BESIDE = (
    "dst_state_batch_indices",
    "num_accepted_tokens",
    "intermediate_states",
    "intermediate_state_indices",
    "parent_tokens",
    "has_initial_state",
)


def check_arrays(arrays: Mapping[str, ArrayInfo], options: Options) -> None:
    """Check what is given alongside a ReplayState, its dtypes, and that its cursor is one for it.

    Raises:
        ValueError: naming the argument.
    """
    for name in _NOT_BESIDE:
        if name in arrays:
            raise ValueError(f"{name}: expected None with a ReplayState, got an array")
    flags = {"disable_state_update": options.disable_state_update, "round_each_token": options.config.round_each_token}
    for flag in (name for name, is_set in flags.items() if is_set):
        raise ValueError(f"{flag}: expected False with a ReplayState, got True")
    if len(came := arrays["state"].shape) != 4:
        raise ValueError(
            f"state: expected a checkpoint of shape (slots, nheads, headdim, dstate) in a ReplayState, got {came}"
        )
    if "state_batch_indices" in arrays and len(came := arrays["state_batch_indices"].shape) != 1:
        raise ValueError(f"state_batch_indices: expected shape (sequences,) with a ReplayState, got {came}")
    for ring, of in (("replay_x", "x"), ("replay_B", "B")):
        if arrays[ring].dtype != arrays[of].dtype:
            raise ValueError(
                f"{ring}: expected a ring of {of}'s dtype {arrays[of].dtype}, got {arrays[ring].dtype}; "
                "to_replay makes rings of a dtype"
            )
    _check_cursor(arrays, options)


def _check_cursor(arrays: Mapping[str, ArrayInfo], options: Options) -> None:
    slots = arrays["state"].shape[0]
    for name in CURSOR:
        if (came := arrays[name].shape) != (slots,):
            raise ValueError(
                f"{name}: expected a cursor of {slots} slots, as the state has, got shape {came}: it belongs to "
                "another state"
            )
    length = options.replay_window + options.replay_tokens
    for name in ("replay_x", "replay_B"):
        if len(shape := arrays[name].shape) == 4 and shape[2] != length:
            raise ValueError(
                f"{name}: expected a ring of {length} rows, the cursor's window {options.replay_window} and its tokens "
                f"{options.replay_tokens}, got {shape[2]} rows: the cursor belongs to another state"
            )


def check_sizes(arrays: Mapping[str, ArrayInfo], options: Options, shapes: Shapes, tied: tuple[str, ...]) -> None:
    """Check how many tokens a call has, and that the parameters that are replayed are one number a head.

    Raises:
        ValueError: there are too many tokens, or dt or dt_bias is not tied.
        UnsupportedError: A is not tied.
    """
    if (tokens := shapes.sizes.get("T", 1)) > options.replay_tokens:
        raise ValueError(
            f"x: expected at most {options.replay_tokens} tokens, which the cursor was made for, got {tokens}"
        )
    for name in ("dt", "dt_bias"):
        if name in arrays and name not in tied:
            raise ValueError(
                f"{name}: expected one number a head with a ReplayState, which keeps one step size a head, got shape "
                f"{arrays[name].shape}"
            )
    if "A" not in tied:
        raise UnsupportedError(
            f"A: a ReplayState replays tokens with one decay a head, and this A is not tied: shape {arrays['A'].shape}"
        )
