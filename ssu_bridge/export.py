"""``jax.export`` of programs that call ``update``."""

from collections.abc import Sequence
from typing import Any


def export_checks() -> Sequence[Any]:
    """Return the ``disabled_checks`` that ``jax.export.export`` needs for a program that calls ``ssu_bridge.update``.

    They allow calls of this package's kernels: all that are known when JAX looks at them, after it has lowered the
    program. Programs for one device can be exported; not those whose arrays are sharded.

    Returns:
        A sequence of ``jax.export.DisabledSafetyCheck``.
    """
    from ssu_bridge.frontends.jax.export import Checks

    return Checks()


def prepare(exported: Any) -> tuple[str, ...]:
    """Load the kernels that an exported program calls, compiling them if need be, so that this process can call it.

    Args:
        exported: a ``jax.export.Exported``, such as ``jax.export.deserialize`` returns.

    Returns:
        The names of the kernels.

    Raises:
        TypeError: ``exported`` is something else.
        UnsupportedError: the program was exported for another platform, another GPU architecture, or by a version of
            this package that had other kernels, or for symbolic sizes of a head; the message says which.
        BackendNotAvailableError: what loads a kernel is not installed.
    """
    from ssu_bridge.frontends.jax.export import prepare as prepare_kernels

    return prepare_kernels(exported)
