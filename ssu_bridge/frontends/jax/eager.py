"""Eager calls of JAX: the step under a ``jax.jit`` that donates the state."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ssu_bridge.core.arguments import ARGUMENTS, STATE, WRITTEN
from ssu_bridge.core.problem import Options
from ssu_bridge.core.quantized import QuantizedState
from ssu_bridge.core.replay import ReplayState
from ssu_bridge.dispatch import program_options
from ssu_bridge.errors import NotInPlaceError
from ssu_bridge.frontends.base import SEED, Arrays, Launch, require_one_framework
from ssu_bridge.frontends.jax.metadata import (
    address,
    copied_from_host,
    explain_failure,
    platforms,
    refuse_out,
    unwrapped,
)
from ssu_bridge.frontends.jax.tracing import trace, trace_call, with_given
from ssu_bridge.frontends.jax.xla_errors import is_viewed, lost_its_state, memory_error_in, own_errors, refusal_in

# On a state that came out of a step.
_MARK = "_ssu_bridge_step"
# How many arrays a call has that neither quantises nor has several tokens.
_USUAL = list(ARGUMENTS).index("dst_state_batch_indices") + 1


def launcher(state_type: type, options: Options) -> Launch:
    """Return the jitted step: it checks its arguments once for each set of shapes and dtypes, when it is traced.

    What runs in each call besides is kept to the least: whether all arrays are of the state's type, and whether the new
    state has the memory of the old one. For a foreign state the addresses tell. A state that came out of a step is
    marked: XLA allocated its memory, and then an old handle that is deleted says the same in a quarter of the time.
    """
    usual, donated = _USUAL, _donated(options)
    donates_state = 0 in donated
    unseeded, seeded = (program_options(options, platforms(), seeded=seeded) for seeded in (False, True))
    compiled, output_last = _compiled(unseeded, donated), _compiled_output_last(unseeded, donated)
    output_last_seeded = _compiled_output_last(seeded, donated)

    def launch(arrays: Arrays, out: Any) -> tuple[Any, ...]:
        if out is not None:
            require_one_framework(arrays)
            refuse_out(out)
        for array in arrays:  # a set of their types would say so, too, but takes 0.2 us longer
            if type(array) is not state_type and array is not None:
                if _traced(arrays := unwrapped(arrays)):
                    return trace_call(options, arrays, out)
                arrays = copied_from_host(arrays, options.pad_slot_id)
                if jax.Ref in map(type, arrays):
                    return _launch_on_references(options, donated, arrays)
                break
        run = compiled if len(arrays) <= usual else output_last if arrays[SEED] is None else output_last_seeded
        state = arrays[0]
        try:
            before = None if hasattr(state, _MARK) else address(state)
            results = run(*arrays)
        except Exception as error:
            lost = lost_its_state(error, state)
            if no_memory := memory_error_in(error):
                raise no_memory from error
            if lost:
                raise
            explain_failure(arrays)
            if refusal := refusal_in(error):
                raise refusal from error
            if not is_viewed(error):
                raise
            # XLA on a GPU refuses what it copies on a CPU.
            results = run(*(a if i not in donated or a is None else jnp.copy(a) for i, a in enumerate(arrays)))
        if not donates_state:
            return with_given(arrays, results)
        new_state = results[1]
        if type(new_state) is ReplayState:
            new_state = new_state.checkpoint
        if type(new_state) is QuantizedState:
            new_state = new_state.values
        if state.is_deleted() if before is None else address(new_state) == before:
            new_state._ssu_bridge_step = True
        else:
            _report_copy(new_state, results, options)
        return results

    return launch


def _traced(arrays: Arrays) -> bool:
    """Return whether a transform maps, differentiates or traces some of the arrays; the state then is the caller's."""
    return any(isinstance(array, jax.core.Tracer) for array in arrays)


@functools.lru_cache(maxsize=64)
def _compiled(options: Options, donated: tuple[int, ...]) -> Callable[..., tuple[Any, ...]]:
    return jax.jit(functools.partial(trace, options), donate_argnums=donated)


@functools.lru_cache(maxsize=64)
def _compiled_output_last(options: Options, donated: tuple[int, ...]) -> Callable[..., tuple[Any, ...]]:
    """Return the step of a call that has more arrays than usual, maybe scales.

    JAX gives donated memory to the first result of its shape and dtype, and an output of the shape of the scales would
    take theirs if it came first.
    """

    @functools.partial(jax.jit, donate_argnums=donated)
    def step(*arrays: Any) -> tuple[Any, ...]:
        out, *written = trace(options, *arrays)
        return (*written, out)

    def run(*arrays: Any) -> tuple[Any, ...]:
        *written, out = step(*arrays)
        return (out, *written)

    return run


def launcher_on_references(options: Options) -> Launch:
    """Return the jitted step for a state that is a ``jax.Ref``."""
    donated = _donated(options)

    def launch(arrays: Arrays, out: Any) -> tuple[Any, ...]:
        require_one_framework(arrays)
        refuse_out(out)
        if _traced(arrays := unwrapped(arrays)):
            return trace_call(options, arrays, out)
        return _launch_on_references(options, donated, copied_from_host(arrays, options.pad_slot_id))

    return launch


def _launch_on_references(options: Options, donated: tuple[int, ...], arrays: Arrays) -> tuple[Any, ...]:
    """Run a call of which some arrays are references: the program updates them in place, and they are not donated."""
    written = [i for i in donated if i < len(arrays)]
    others = tuple(i for i in written if not isinstance(arrays[i], jax.Ref))
    seeded = len(arrays) > SEED and arrays[SEED] is not None
    run = _compiled_output_last(program_options(options, platforms(), seeded=seeded), others)
    with own_errors():
        try:
            return with_given(arrays, run(*arrays))
        except Exception as error:
            if not any(lost_its_state(error, arrays[i]) for i in written) and not refusal_in(error):
                explain_failure(arrays)
            raise


def _donated(options: Options) -> tuple[int, ...]:
    """Return the places of the arrays that a call gives up."""
    kept = STATE if options.disable_state_update else ()
    return tuple(i for i, name in enumerate(ARGUMENTS) if options.donate and name in WRITTEN and name not in kept)


_warned = False


def _report_copy(state: Any, results: tuple[Any, ...], options: Options) -> None:
    """Raise if the configuration is strict, else warn once: the new state has new memory."""
    global _warned
    if isinstance(state, jax.core.Tracer) or state.size == 0:  # no memory to speak of
        return
    message = (
        "the state was copied: JAX does not donate memory that somebody else still views (drop a live np.asarray, "
        "Torch or DLPack view) or, on the CPU, that it did not allocate (an array from DLPack)"
    )
    if options.config.strict_in_place:
        raise NotInPlaceError(f"state: {message}; the results are in this error's .results", results)
    if not _warned:
        _warned = True
        warnings.warn(f"ssu_bridge: {message}. This is said once.", RuntimeWarning, stacklevel=4)
