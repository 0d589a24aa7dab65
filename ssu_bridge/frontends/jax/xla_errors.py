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

    Seen on jax 0.9.1, 0.10.2 and 0.11.2.
    """
    return isinstance(error, ValueError) and "must refer to an axis marked as manual" in str(error)


def lost_its_state(error: Exception, state: Any) -> bool:
    """Return whether a kernel failed while it ran, when the state had been donated to it; the error then says so.

    A state that was deleted before the call is an invalid argument. Seen on jax 0.10.2.
    """
    ran = isinstance(error, jax.errors.JaxRuntimeError) and not str(error).startswith("INVALID_ARGUMENT")
    failed = ran and isinstance(state, jax.Array) and state.is_deleted()
    if failed:
        error.add_note("ssu_bridge: the kernel failed while it ran, and the state that was donated to it is lost.")
    return failed


def refusal_in(error: Exception) -> UnsupportedError | None:
    """Return the refusal that XLA met while it partitioned a program and made an error of its own of, or None.

    Seen on jax 0.9.1, 0.10.2 and 0.11.2.
    """
    if not isinstance(error, jax.errors.JaxRuntimeError):
        return None
    _, found, refusal = str(error).partition(f"{UnsupportedError.__name__}: ")
    return UnsupportedError(refusal.partition("\n")[0]) if found else None


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Raise such a refusal in the place of XLA's error."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if refusal := refusal_in(error):
            raise refusal from error
        raise
