"""Errors of JAX and XLA that their text alone tells apart; each function names the versions it was seen on."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from ssu_bridge.errors import UnsupportedError


def is_viewed(error: Exception) -> bool:
    """Return whether XLA refused to donate an array on a GPU because somebody else still views its memory.

    Seen on jax 0.10.2 and 0.11.2.
    """
    return "external reference" in str(error)


def is_mapped_elsewhere(error: Exception) -> bool:
    """Return whether ``jax.shard_map`` was given a mesh axis that what ``jax.vmap`` maps around it is sharded over.

    Seen on jax 0.10.0, 0.10.2 and 0.11.2.
    """
    return isinstance(error, ValueError) and "must refer to an axis marked as manual" in str(error)


def lost_its_state(error: Exception, state: Any) -> bool:
    """Return whether a kernel failed while it ran, when the state had been donated to it; the error then says so.

    A state that was deleted before the call is an invalid argument. Seen on jax 0.10.2.
    """
    ran = isinstance(error, jax.errors.JaxRuntimeError) and not str(error).startswith("INVALID_ARGUMENT")
    failed = ran and _is_gone(state)
    if failed:
        error.add_note(_LOST)
    return failed


_LOST = "ssu_bridge: the kernel failed while it ran, and the state that was donated to it is lost."


def _is_gone(state: Any) -> bool:
    if not isinstance(state, jax.Ref):
        return isinstance(state, jax.Array) and state.is_deleted()
    try:
        state[...]
    except RuntimeError:  # "Array has been deleted": XLA was given the memory of the reference
        return True
    return False


def memory_error_in(error: Exception) -> MemoryError | None:
    """Return the MemoryError of the native code that XLA made an error of its own of, with what is noted; or None.

    XLA keeps the text of an error and not its type. Seen on jax 0.10.2.
    """
    if not isinstance(error, jax.errors.JaxRuntimeError):
        return None
    _, found, rest = str(error).partition("INTERNAL: no memory for the scratch")
    if not found:
        return None
    result = MemoryError(found.removeprefix("INTERNAL: ") + rest.partition("\n")[0])
    if _LOST in getattr(error, "__notes__", ()):
        result.add_note(_LOST)
    return result


def refusal_in(error: Exception) -> UnsupportedError | None:
    """Return the refusal that XLA met while it partitioned a program and made an error of its own of, or None.

    Seen on jax 0.10.0, 0.10.2 and 0.11.2.
    """
    if not isinstance(error, jax.errors.JaxRuntimeError):
        return None
    _, found, refusal = str(error).partition(f"{UnsupportedError.__name__}: ")
    return UnsupportedError(refusal.partition("\n")[0]) if found else None


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """Raise what :func:`refusal_in` or :func:`memory_error_in` finds in the place of XLA's error."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if own := refusal_in(error) or memory_error_in(error):
            raise own from error
        raise
