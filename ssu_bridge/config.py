"""The configuration: its fields, where the one in force comes from, and its command-line arguments."""

import argparse
import contextlib
import dataclasses
import enum
import functools
import operator
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

# How several tokens of a sequence are computed: one after the other, or in chunks by products of matrices.
FORMS = ("loop", "matrix")
# FlashInfer's kernels.
FLASHINFER_ALGORITHMS = ("simple", "vertical", "horizontal")
ALGORITHMS = ("auto", *FORMS, *FLASHINFER_ALGORITHMS)


class Backend(enum.StrEnum):
    """The backends by name. ``auto`` selects the best one that supports the call."""

    AUTO = "auto"
    TRITON = "triton"
    FLASHINFER = "flashinfer"
    CPU = "cpu"
    XLA = "xla"
    REFERENCE = "reference"

    # Enum's own hash is a Python function, and the configuration is hashed in every call.
    __hash__ = str.__hash__

    @classmethod
    def parse(cls, name: "str | Backend") -> "Backend":
        """Return the backend of that name, whatever its case.

        Raises:
            ValueError: there is none of that name; the message lists those there are.
            TypeError: ``name`` is not a string.
        """
        if not isinstance(name, str):
            raise TypeError(f"backend: expected a string or a Backend, got {type(name).__name__}")
        try:
            return cls(name.lower())
        except ValueError:
            raise ValueError(f"backend: expected one of {', '.join(cls)}; got {name!r}") from None


@dataclasses.dataclass(frozen=True)
class SSUConfig:
    """The settings of a call, apart from the arguments of the step itself.

    Attributes:
        backend: a ``Backend`` or its name in any case.
        algorithm: how several tokens in one call are computed: "loop" (one after the other), "matrix" (in chunks, by
            products of matrices) or "auto" (the faster of those that the backend has); a backend that lacks the one
            selected refuses the call. "simple", "vertical" and "horizontal" select FlashInfer's kernel, and the other
            backends ignore them.
        stochastic_rounding: round float16, bfloat16, int8 and float8 states stochastically.
        philox_rounds: rounds of the Philox generator; 0 means 10.
        strict_in_place: raise ``NotInPlaceError`` if an eager JAX call could not update the state in place,
            instead of warning once. Under ``jax.jit`` the outer donation decides, without a warning.
        triton_tile: (rows of headdim, warps) of a program of the Triton kernel, powers of two; None: as measured for
            the GPU. It does not change the results.
        round_each_token: in a call of several tokens, round the state after each of them to what it is stored in, as
            calls of one token do: with ``algorithm`` "loop" or "auto" the results are then those of such calls, to the
            bit. Serving engines call this exact speculative decoding.

    Raises:
        ValueError, TypeError: a field has an unknown or impossible value.
    """

    backend: Backend = Backend.AUTO
    algorithm: str = "auto"
    stochastic_rounding: bool = False
    philox_rounds: int = 10
    strict_in_place: bool = False
    triton_tile: tuple[int, int] | None = None
    round_each_token: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "backend", Backend.parse(self.backend))
        if not isinstance(self.algorithm, str) or self.algorithm.lower() not in ALGORITHMS:
            raise ValueError(f"algorithm: expected one of {', '.join(ALGORITHMS)}; got {self.algorithm!r}")
        object.__setattr__(self, "algorithm", self.algorithm.lower())
        for name in ("round_each_token", "stochastic_rounding", "strict_in_place"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {getattr(self, name)!r}")
        if type(self.philox_rounds) is not int or self.philox_rounds < 0:
            raise ValueError(f"philox_rounds: expected an int >= 0 (0 means 10), got {self.philox_rounds!r}")
        object.__setattr__(self, "philox_rounds", self.philox_rounds or 10)
        if self.triton_tile is not None:
            object.__setattr__(self, "triton_tile", _checked_tile(self.triton_tile))

    def __reduce__(self) -> tuple[Any, ...]:  # the hash of a string differs between processes and must not travel
        return type(self), self._values()

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:  # needed in every call, and so computed once
        return hash(self._values())

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @classmethod
    def from_args(cls, namespace: argparse.Namespace) -> "SSUConfig":
        """Return the configuration in force with the changes that parsed arguments of ``add_cli_args`` request."""
        return dataclasses.replace(
            get_config(),
            backend=namespace.mamba_backend,
            algorithm=namespace.mamba_ssu_algorithm,
            # Parsers of serving engines lack this flag.
            round_each_token=getattr(namespace, "mamba_round_each_token", get_config().round_each_token),
            stochastic_rounding=namespace.enable_mamba_cache_stochastic_rounding,
            philox_rounds=namespace.mamba_cache_philox_rounds,
        )


def _checked_tile(tile: Any) -> tuple[int, int]:
    try:
        rows, warps = map(operator.index, tile)
    except (TypeError, ValueError):
        raise TypeError(f"triton_tile: expected two ints (rows, warps), got {tile!r}") from None
    if rows < 1 or rows & (rows - 1) or warps not in (1, 2, 4, 8, 16, 32):
        raise ValueError(f"triton_tile: expected powers of two (rows, warps), at most 32 warps; got {tile!r}")
    return rows, warps


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that serving engines use for this step; ``SSUConfig.from_args`` reads them.

    Their defaults are those of the configuration in force when this is called. An environment variable with a wrong
    value ends the program as a wrong argument does, with status 2.
    """
    try:
        default = get_config()
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    group = add_flags(parser, [backend.value for backend in Backend], default)
    group.add_argument(
        "--mamba-round-each-token",
        action=argparse.BooleanOptionalAction,
        default=default.round_each_token,
        help="round the state after each of several tokens, so that they give the bits of calls of one token",
    )


def add_flags(parser: argparse.ArgumentParser, backends: Sequence[str], default: SSUConfig) -> argparse._ArgumentGroup:
    """Add the arguments that vLLM has too, for a choice of backends, by name, and return their group."""
    group = parser.add_argument_group("selective_state_update")
    group.add_argument(
        "--mamba-backend",
        type=str.lower,
        choices=backends,
        default=default.backend.value,
        help="the backend that computes the step",
    )
    group.add_argument(
        "--mamba-ssu-algorithm",
        type=str.lower,
        choices=ALGORITHMS,
        default=default.algorithm,
        help="how several tokens are computed (loop, matrix), or FlashInfer's kernel (simple, vertical, horizontal)",
    )
    group.add_argument(
        "--enable-mamba-cache-stochastic-rounding",
        action=argparse.BooleanOptionalAction,
        default=default.stochastic_rounding,
        help="round 16-bit and 8-bit states stochastically",
    )
    group.add_argument(
        "--mamba-cache-philox-rounds",
        type=_rounds,
        default=default.philox_rounds,
        metavar="ROUNDS",
        help="of the random generator of stochastic rounding; 0 means 10",
    )
    return group


def _rounds(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of at least 0 (0 means 10), got {text!r}")
    return int(text)


def _from_environment() -> SSUConfig:
    config = SSUConfig()
    for field, variable in (("backend", "SSU_BRIDGE_BACKEND"), ("algorithm", "SSU_BRIDGE_ALGORITHM")):
        if value := os.environ.get(variable):
            change: dict[str, Any] = {field: value}
            try:
                config = dataclasses.replace(config, **change)
            except ValueError as error:
                raise ValueError(f"environment variable {variable}: {error}") from None
    return config


# Read once: looking up two environment variables in every call would cost more than the rest of the configuration.
_process_config: SSUConfig | None = None
_local_config: ContextVar[SSUConfig | None] = ContextVar("ssu_bridge_config", default=None)


def get_config() -> SSUConfig:
    """Return the configuration in force here.

    It is that of the innermost ``using``, else that of ``set_config``, else what the environment variables
    ``SSU_BRIDGE_BACKEND`` and ``SSU_BRIDGE_ALGORITHM`` contained when the process first read them, else the default.
    """
    global _process_config
    local = _local_config.get()
    if local is not None:
        return local
    if _process_config is None:
        _process_config = _from_environment()
    return _process_config


def set_config(config: SSUConfig) -> None:
    """Put a configuration in force for the whole process, all threads included."""
    global _process_config
    if not isinstance(config, SSUConfig):
        raise TypeError(f"config: expected an SSUConfig, got {type(config).__name__}")
    _process_config = config


@contextlib.contextmanager
def using(config: SSUConfig | None = None, /, **fields: Any) -> Iterator[SSUConfig]:
    """Put a configuration in force inside a ``with`` block, for this thread (or asyncio task) only.

    Args:
        config: the configuration; absent: the one in force.
        **fields: fields of ``SSUConfig`` to replace in it, as in ``using(backend="xla")``.

    Under ``jax.jit`` the configuration counts that is in force while the function is traced.
    """
    base = get_config() if config is None else config
    if not isinstance(base, SSUConfig):
        raise TypeError(f"config: expected an SSUConfig, got {type(base).__name__}")
    token = _local_config.set(dataclasses.replace(base, **fields) if fields else base)
    try:
        yield get_config()
    finally:
        _local_config.reset(token)


def replaced(config: SSUConfig, backend: str | None, algorithm: str | None, round_each_token: bool | None) -> SSUConfig:
    """Return a configuration with the fields replaced that a call was given arguments for (None: not given)."""
    fields: dict[str, Any] = {"backend": backend, "algorithm": algorithm, "round_each_token": round_each_token}
    return dataclasses.replace(config, **{k: v for k, v in fields.items() if v is not None})
