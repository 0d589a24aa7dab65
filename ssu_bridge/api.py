"""The public calls: ``update``, ``explain`` and ``warm_up``."""

import inspect
from typing import Any

from ssu_bridge.config import get_config
from ssu_bridge.core.arguments import ARGUMENTS, CURSOR, RINGS
from ssu_bridge.core.bounded import Bounded
from ssu_bridge.core.problem import Options, options_of
from ssu_bridge.core.quantized import SCALES, QuantizedState, unpaired
from ssu_bridge.core.replay import ReplayCursor, ReplayState
from ssu_bridge.dispatch import Explanation, load
from ssu_bridge.frontends import dynamo
from ssu_bridge.frontends.base import Arrays, Launch, frontend_of, launcher_of

# The default of intermediate_stride.
_EVERY_TOKEN = 1


def update(
    state: Any,
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    dt_bias: Any = None,
    dt_softplus: bool = False,
    state_batch_indices: Any = None,
    *,
    dst_state_batch_indices: Any = None,
    pad_slot_id: int = -1,
    num_accepted_tokens: Any = None,
    cu_seqlens: Any = None,
    intermediate_states: Any = None,
    intermediate_state_indices: Any = None,
    intermediate_stride: int = _EVERY_TOKEN,
    parent_tokens: Any = None,
    has_initial_state: Any = None,
    disable_state_update: bool = False,
    rand_seed: Any = None,
    out: Any = None,
    donate: bool = True,
    check_indices: bool = False,
    backend: str | None = None,
    algorithm: str | None = None,
    round_each_token: bool | None = None,
    replay: ReplayCursor | None = None,
) -> tuple[Any, ...]:
    """Advance the states of a batch of Mamba sequences in place, by one token or several (``selective_state_update``).

    For each token of each sequence, in float32, with S the sequence's state:

        d = dt + dt_bias;  if dt_softplus: d = softplus(d)
        S = S * exp(A * d) + (d * x) B
        y = S . C + D * x;  with z: y = y * z * sigmoid(z)

    This is the recurrence of Mamba-2 (arXiv:2405.21060), and of Mamba-1 (arXiv:2312.00752) where the arrays have no
    axis of heads. Sizes: b sequences, T tokens, H nheads, P headdim, N dstate, G ngroups (a divisor of H; head h reads
    group h // (H/G)), and ``slots`` slots of the state cache. The arrays are all of JAX (concrete or traced), all of
    Torch, or all of NumPy; NumPy arrays may be passed along with JAX arrays, except for the state. Each float array is
    float32, bfloat16 or float16; tables are int32 or int64.

    Args:
        state: (slots, H, P, N), or (slots, P, N) for Mamba-1. The state cache, updated in place. A
            ``QuantizedState`` for a state stored in few bits. A ``ReplayState``, with ``replay``, for one that most
            calls only read.
        x: (b, H, P), or (b, P) for Mamba-1; (b, T, H, P) for several tokens; (rows, H, P) with ``cu_seqlens``. The
            leading axes of dt, B, C and z are those of x.
        dt: as x, or tied (b, H).
        A: (H, P, N), or tied (H,); (P, N) for Mamba-1.
        B, C: (b, G, N), or (b, N) for one group.
        D, dt_bias: (H, P), or tied (H,); (P,) for Mamba-1. Optional.
        z: as x. Optional.
        dt_softplus: apply softplus to dt + dt_bias.
        state_batch_indices: (b,), the slot of each sequence, or (b, at least T), of which ``num_accepted_tokens``
            selects a column. None: sequence i has slot i. An index that is ``pad_slot_id`` or outside 0..slots-1 is a
            padding index: that sequence starts from zeros and stores nothing.
        dst_state_batch_indices: (b,), the slot that the final state goes to, if it is another, or (b, at least T), the
            slot that the state after each token goes to; nothing is stored for a padding index.
        pad_slot_id: the padding index.
        num_accepted_tokens: (b,), the column of ``state_batch_indices`` to start from, plus 1.
        cu_seqlens: (b + 1,), where the sequences begin and end among the rows of x. If sequences share rows, because
            they decrease, the output of those rows is undefined; on the xla backend, all results of those sequences.
        intermediate_states: (E, steps, H, P, N), of the state's dtype, or a QuantizedState: where the state after each
            token goes, or after every k-th one, updated in place.
        intermediate_state_indices: (b,), the entry of each sequence in it. None: the slot that it starts from.
        intermediate_stride: k >= 1: step i of the intermediate states gets the state after token (i+1)*k - 1, counted
            from the first token that the call has of a sequence. They have at least T // k steps.
        parent_tokens: (b, T), or (rows,) with ``cu_seqlens``: trees of draft tokens. Entry t names the token of the
            same sequence whose state token t continues; a number outside 0..t-1 stands for the state that the sequence
            starts from. -1, 0, 1, ... is a chain. A tree has no last state: its states go to a
            ``dst_state_batch_indices`` with a column for each token and to intermediate states, and the slot that the
            sequence starts from is only read. At most 64 tokens; packed rows of a sequence after its 64th belong to
            no sequence.
        has_initial_state: (b,) bool: False makes a sequence start from zeros, whatever its slot holds, and still store
            there. None: all True.
        disable_state_update: read the state and do not write it.
        rand_seed: round the state stochastically. Torch, NumPy: an int, or one int64 in an array. JAX: a uint32[2]
            array or a key of it. Configured without a seed, Torch and NumPy draw one in each call.
        out: Torch and NumPy: where to put the output, shape and dtype of x; it may be strided on its leading axes. It
            may be x or z itself, and may overlap what else is only read: then, as x or z with ``cu_seqlens`` and x with
            ``parent_tokens``, the output is computed in memory of its own and copied. The states that are updated share
            memory with no other array.
        donate: JAX, eager: give the memory of what is written to the results; False copies it first.
        check_indices: for debugging: check the tables on the host before anything is launched.
        backend, algorithm, round_each_token: for this call, instead of those of the configuration in force. With
            ``round_each_token`` the state is rounded to what it is stored in after each of several tokens, as in calls
            of one token, whose bits the loop then gives.
        replay: the ``ReplayCursor`` of a ReplayState, which is only read: ``advance_replay`` moves it on, once for all
            layers of a model. dt, dt_bias and A are tied then, and there are at most ``replay.tokens`` tokens; rows of
            a packed sequence after those belong to no sequence. It excludes destinations, intermediate states, slot
            tables with a column for each token, ``parent_tokens``, ``has_initial_state``, ``round_each_token`` and
            ``disable_state_update``.

    A Torch or NumPy array with stride 0 along the axes that a tied parameter lacks is tied. Torch and NumPy arrays may
    be strided along the axes of sequences, tokens, slots and entries; their trailing axes are dense.

    Returns:
        ``(out, state)``, and the intermediate states as a third element if they were passed. ``out`` has the shape and
        dtype of x and is computed from the states before they are rounded. Torch, NumPy: the states are the objects
        that were passed. JAX, eager: the old states are deleted, the new ones have their memory. JAX, traced: the
        donation of the outer ``jax.jit`` decides. A state that was not updated is returned unchanged.

    Raises:
        ValueError, TypeError: an argument is wrong, or with ``check_indices`` a number in a table, or two sequences
            meet in a slot; the message names it, what was expected and what came.
        UnsupportedError: the requested backend, or with ``auto`` every backend, refuses the call; or Torch's grad mode
            is on and an argument other than A, D and dt_bias requires grad.
        BackendNotAvailableError: the requested backend is not installed.
        TooManyKernelsError: JAX: the process has no room for another kernel, after 1,024 that differ in their
            optional arguments or flags.
        NotInPlaceError: ``strict_in_place`` is configured and JAX could not donate the state; the step was computed.

        MemoryError: the cpu backend found no memory for its scratch. Nothing was written; an eager JAX call has lost
            the state that it donated, and a note of the error says so. Where its arguments were not computed yet,
            JAX raises an error of its own with that text when the results are used.

    When one of the others is raised, nothing has been written or donated, and no seed was drawn. Where a JAX kernel
    fails for another reason while it runs, as for want of a launch, JAX's error has that note too.
    """
    arrays: Arrays = (state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, dst_state_batch_indices)
    pairs: tuple[Any, ...] = ()
    static: tuple[int, ...] = ()
    if not (
        num_accepted_tokens is cu_seqlens is intermediate_states is intermediate_state_indices is parent_tokens
        and parent_tokens is has_initial_state is rand_seed is replay is None
        and type(state) is not QuantizedState
        and type(state) is not ReplayState
    ):
        several = (num_accepted_tokens, cu_seqlens, intermediate_states, intermediate_state_indices, parent_tokens)
        arrays = (*arrays, *several, has_initial_state, None, None, rand_seed)
        disable_state_update = _keeps_state(parent_tokens, dst_state_batch_indices, disable_state_update)
        static = _static(state, replay)
        if static or isinstance(state, QuantizedState) or isinstance(intermediate_states, QuantizedState):
            pairs, arrays = (state, intermediate_states), _split(arrays, replay)
    if dynamo.tracing():
        from ssu_bridge.frontends.torch.custom_op import trace

        flags = (dt_softplus, pad_slot_id, disable_state_update, donate, check_indices, intermediate_stride)
        options = dynamo.options_in_graph(*flags, backend, algorithm, round_each_token, replay=static)
        results = trace(options, arrays, out)
        return _same_pairs(results, pairs) if pairs else results
    launch = _launcher(
        arrays, out, dt_softplus, pad_slot_id, disable_state_update, donate, check_indices, intermediate_stride,
        backend, algorithm, round_each_token, static,
    )  # fmt: skip
    return _same_pairs(launch(arrays, out), pairs) if pairs else launch(arrays, out)


def _same_pairs(results: tuple[Any, ...], given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Put a QuantizedState or ReplayState that was given in the place of one of the same arrays."""
    same = (pair if _is_same(pair, result) else result for result, pair in zip(results[1:], given, strict=False))
    return results[0], *same


def _is_same(given: Any, result: Any) -> bool:
    """Return whether two states are the same arrays."""
    return all(map(_is_same, given, result)) if isinstance(given, tuple) else given is result


# The launcher of each kind of call, by the type of its state, its flags and the configuration: the only look-up of a
# repeated call. At most 64, because each may keep compiled programs.
_launchers: Bounded[tuple[Any, ...], Launch] = Bounded(64)


def _launcher(
    arrays: Arrays,
    out: Any,
    dt_softplus: Any,
    pad_slot_id: Any,
    disable_state_update: Any,
    donate: Any,
    check_indices: Any,
    intermediate_stride: Any,
    backend: Any,
    algorithm: Any,
    round_each_token: Any,
    replay: tuple[int, ...],
) -> Launch:
    """Return what launches a call, whose flags come in the order of ``options_of``; a repeated call looks it up."""
    # Flags count with their types, because 1 equals True but is no bool.
    kind: tuple[Any, ...]
    softplus_type, pad_type, config = type(dt_softplus), type(pad_slot_id), get_config()
    kind = (type(arrays[0]), dt_softplus, softplus_type, pad_slot_id, pad_type, backend, algorithm, config)
    if not (
        donate is True
        and disable_state_update is check_indices is False
        and intermediate_stride is _EVERY_TOKEN
        and round_each_token is None
        and not replay
    ):
        rare = (disable_state_update, donate, check_indices, intermediate_stride, round_each_token, *replay)
        kind += (*rare, *map(type, rare))
    try:
        return _launchers[kind]
    except (KeyError, TypeError):  # the first call of its kind, or a flag that is not hashable and so is no flag
        flags = (dt_softplus, pad_slot_id, disable_state_update, donate, check_indices, intermediate_stride)
        launch = _launchers[kind] = launcher_of(
            arrays, out, options_of(*flags, backend, algorithm, round_each_token, config, *replay)
        )
        return launch


def _keeps_state(parent_tokens: Any, dst_state_batch_indices: Any, disable_state_update: Any) -> Any:
    """Return the flag for a call: a tree has no last state, and writes to slots by destinations alone."""
    is_tree = parent_tokens is not None and dst_state_batch_indices is None
    return True if is_tree and disable_state_update is False else disable_state_update


def explain(*args: Any, **kwargs: Any) -> Explanation:
    """Return which backend ``update`` would select for these arguments, and why; run nothing.

    Args:
        *args, **kwargs: those of ``update``. For a traced state the answer covers each platform of the process.

    Returns:
        An ``Explanation``: the answers of the backends. It prints as a table.

    Raises:
        ValueError, TypeError: an argument is wrong. A backend's refusal is part of the result.
    """
    arrays, out, options = bind(*args, **kwargs)
    return Explanation(frontend_of(arrays, out).consider(arrays, out, options))


def warm_up(*args: Any, **kwargs: Any) -> Explanation:
    """Compile and load what ``update`` needs for these arguments, ahead of the first call; run nothing.

    Triton compiles a kernel in about a second, FlashInfer in 25 to 70; loading one from disk takes a fraction of that.
    A CUDA graph can capture a call after it, or after a first call; ``torch.compile`` needs neither. JAX's own
    compilation of a program is not included.

    Args:
        *args, **kwargs: those of ``update``. None of them is changed or donated.

    Returns:
        What ``explain`` returns.

    Raises:
        ValueError, TypeError, UnsupportedError, BackendNotAvailableError: as ``update``.
    """
    explanation = explain(*args, **kwargs)
    able = [choice for choice in explanation.choices if choice.backend is not None]
    if not able:
        raise explanation.choices[0].error()
    for choice in able:
        load(choice.problem)
    arrays, out, flags, static = _bound(*args, **kwargs)
    _launcher(arrays, out, *(*flags, static))  # so that the first call finds it
    return explanation


def bind(*args: Any, **kwargs: Any) -> tuple[Arrays, Any, Options]:
    """Return the arrays, ``out`` and options that ``update`` passes to a frontend."""
    arrays, out, flags, static = _bound(*args, **kwargs)
    return arrays, out, options_of(*(*flags, get_config(), *static))


def _bound(*args: Any, **kwargs: Any) -> tuple[Arrays, Any, tuple[Any, ...], tuple[int, ...]]:
    """Return the arrays, out, the flags in the order of ``options_of``, and the numbers of a cursor."""
    bound = inspect.signature(update).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    tree = (given["parent_tokens"], given["dst_state_batch_indices"])
    given["disable_state_update"] = _keeps_state(*tree, given["disable_state_update"])
    static = _static(given["state"], given["replay"])
    arrays = _split(tuple(given.get(name) for name in ARGUMENTS if name != "out"), given["replay"])
    flags = tuple(given[n] for n in inspect.signature(options_of).parameters if n in given)
    return arrays, given["out"], flags, static


def _static(state: Any, replay: Any) -> tuple[int, ...]:
    """Return the window and the tokens of a cursor; () without one."""
    if replay is None and not isinstance(state, ReplayState):
        return ()
    if replay is None:
        raise ValueError("replay: expected a ReplayCursor with a ReplayState, got None")
    if not isinstance(replay, ReplayCursor):
        raise TypeError(f"replay: expected a ReplayCursor, got {type(replay).__name__}")
    if not isinstance(state, ReplayState):
        raise TypeError(f"state: expected a ReplayState with replay, got {type(state).__name__}; to_replay makes one")
    return replay.window, replay.tokens


def _split(arrays: Arrays, replay: Any) -> Arrays:
    """Put the arrays of a quantised state, and those of a ReplayState and its cursor, where kernels take them."""
    given = dict(zip(ARGUMENTS, arrays, strict=False))
    if replay is not None:
        given["replay"] = replay
    for name in SCALES:
        _require_whole(name, given.get(name))
    given = unpaired(given)
    for name in (*RINGS, *CURSOR):
        if replay is not None and given[name] is None:
            raise TypeError(f"{name}: expected an array, got None")
    return tuple(given.get(name) for name in ARGUMENTS if name != "out")


def _require_whole(name: str, state: Any) -> None:
    pair = state.checkpoint if isinstance(state, ReplayState) else state
    if isinstance(pair, QuantizedState) and (pair.values is None or pair.scale is None):
        raise TypeError(f"{name}: expected a QuantizedState of two arrays, values and scale, got None in it")
