"""vLLM's choice of a backend for its Mamba layers: ``vllm.config.mamba`` and ``...mamba.ops.ssu_dispatch``.

The names, arguments and defaults are vLLM's; each backend is this package's one of that name. For tensors of Torch.
"""

import abc
import argparse
import dataclasses
import enum
from typing import Any, ClassVar

from ssu_bridge.compat import vllm
from ssu_bridge.compat.vllm import NULL_BLOCK_ID
from ssu_bridge.config import Backend, SSUConfig, add_flags, using
from ssu_bridge.dispatch import module
from ssu_bridge.errors import BackendNotAvailableError


class _ByName(enum.EnumMeta):
    def __getitem__(cls, name: str) -> Any:
        return cls(name)


class MambaBackendEnum(enum.Enum, metaclass=_ByName):
    """The backends that vLLM has, by name in any case: ``MambaBackendEnum["Triton"]``, ``MambaBackendEnum("triton")``.

    Raises:
        ValueError: there is none of that name; the message lists those there are.
    """

    TRITON = "triton"
    FLASHINFER = "flashinfer"
    CPU = "cpu"

    @classmethod
    def _missing_(cls, value: object) -> "MambaBackendEnum":
        for backend in cls:
            if isinstance(value, str) and value.lower() == backend.value:
                return backend
        names = ", ".join(backend.value for backend in cls)
        raise ValueError(f"Unknown Mamba SSU backend {value!r}; expected one of {names}")


# The fields of MambaConfig by those of SSUConfig, which checks them.
_FIELDS = {
    "algorithm": "ssu_algorithm",
    "stochastic_rounding": "enable_stochastic_rounding",
    "philox_rounds": "stochastic_rounding_philox_rounds",
}


@dataclasses.dataclass(frozen=True)
class MambaConfig:
    """vLLM's settings of the step.

    Attributes:
        backend: a ``MambaBackendEnum`` or its name.
        enable_stochastic_rounding: round float16 and bfloat16 states stochastically, on every backend and GPU.
        stochastic_rounding_philox_rounds: rounds of the random generator; 0 means 10.
        ssu_algorithm: as ``SSUConfig.algorithm``; None means "auto".

    Raises:
        ValueError, TypeError: a field has an unknown or impossible value.
    """

    backend: MambaBackendEnum = MambaBackendEnum.TRITON
    enable_stochastic_rounding: bool = False
    stochastic_rounding_philox_rounds: int = 0
    ssu_algorithm: str | None = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "backend", MambaBackendEnum(self.backend))
        if self.ssu_algorithm is None:
            object.__setattr__(self, "ssu_algorithm", "auto")
        for theirs, field in _FIELDS.items():
            value: dict[str, Any] = {theirs: getattr(self, field)}
            try:
                SSUConfig(**value)
            except (ValueError, TypeError) as error:
                raise type(error)(str(error).replace(theirs, field, 1)) from None

    @classmethod
    def from_args(cls, namespace: argparse.Namespace) -> "MambaConfig":
        """Return the configuration that parsed arguments of ``add_cli_args`` request."""
        return cls(
            backend=namespace.mamba_backend,
            enable_stochastic_rounding=namespace.enable_mamba_cache_stochastic_rounding,
            stochastic_rounding_philox_rounds=namespace.mamba_cache_philox_rounds,
            ssu_algorithm=namespace.mamba_ssu_algorithm,
        )

    def ssu_config(self) -> SSUConfig:
        """Return the same as this package's configuration."""
        values: dict[str, Any] = {theirs: getattr(self, field) for theirs, field in _FIELDS.items()}
        return SSUConfig(backend=Backend(self.backend.value), **values)


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """Add vLLM's arguments for this step, with vLLM's defaults; ``MambaConfig.from_args`` reads them."""
    add_flags(parser, [backend.value for backend in MambaBackendEnum], MambaConfig().ssu_config())


class MambaSSUBackend(abc.ABC):
    """A backend as vLLM's layers call it.

    Raises:
        BackendNotAvailableError: the package that it needs is not installed; an ImportError.
    """

    def __init__(self, mamba_config: MambaConfig):
        self._mamba_config = mamba_config

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The name of the backend, for logs."""

    @abc.abstractmethod
    def __call__(
        self,
        state: Any,
        x: Any,
        dt: Any,
        A: Any,
        B: Any,
        C: Any,
        D: Any,
        dt_bias: Any,
        z: Any = None,
        dt_softplus: bool = False,
        state_batch_indices: Any = None,
        dst_state_batch_indices: Any = None,
        null_block_id: int = NULL_BLOCK_ID,
        out: Any = None,
        num_accepted_tokens: Any = None,
        cu_seqlens: Any = None,
        is_blackwell: bool = False,
    ) -> None:
        """Advance states in place and write the output to ``out``, as ``ssu_bridge.compat.vllm`` does.

        Raises:
            UnsupportedError: this backend does not support the call; the message says why.
        """


class _Own(MambaSSUBackend):
    """One of this package's backends."""

    _backend: ClassVar[MambaBackendEnum]
    _package: ClassVar[str]

    def __init__(self, mamba_config: MambaConfig):
        super().__init__(mamba_config)
        if reason := module(Backend(self.name)).missing("torch"):
            raise BackendNotAvailableError(
                f"{self._package} is required for the {self.name} Mamba SSU backend: {reason}"
            )
        self._config = dataclasses.replace(mamba_config.ssu_config(), backend=Backend(self.name))

    @property
    def name(self) -> str:
        return self._backend.value

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        with using(self._config):
            vllm.selective_state_update(*args, **kwargs)


class TritonSSUBackend(_Own):
    """The triton backend, for tensors on NVIDIA GPUs."""

    _backend, _package = MambaBackendEnum.TRITON, "Triton"


class FlashInferSSUBackend(_Own):
    """The flashinfer backend, for tensors on NVIDIA GPUs."""

    _backend, _package = MambaBackendEnum.FLASHINFER, "FlashInfer"


class CPUSSUBackend(_Own):
    """The cpu backend, for tensors on the CPU."""

    _backend, _package = MambaBackendEnum.CPU, "ssu_bridge's native library"


_CLASSES: dict[MambaBackendEnum, type[MambaSSUBackend]] = {
    MambaBackendEnum.TRITON: TritonSSUBackend,
    MambaBackendEnum.FLASHINFER: FlashInferSSUBackend,
    MambaBackendEnum.CPU: CPUSSUBackend,
}
_mamba_ssu_backend: MambaSSUBackend | None = None


def initialize_mamba_ssu_backend(mamba_config: MambaConfig, kv_cache_config: Any = None) -> None:
    """Put a backend in force for the process, in place of an earlier one.

    Args:
        mamba_config: the backend and its settings.
        kv_cache_config: ignored; vLLM looks there whether a model has Mamba layers.

    Raises:
        BackendNotAvailableError: a package that the backend needs is not installed; an ImportError.
    """
    global _mamba_ssu_backend
    _mamba_ssu_backend = _CLASSES[mamba_config.backend](mamba_config)


def get_mamba_ssu_backend() -> MambaSSUBackend:
    """Return the backend in force.

    Raises:
        RuntimeError: ``initialize_mamba_ssu_backend`` was not called.
    """
    if _mamba_ssu_backend is None:
        raise RuntimeError(
            "The Mamba SSU backend has not been initialized; call initialize_mamba_ssu_backend(MambaConfig(...)) first"
        )
    return _mamba_ssu_backend


def selective_state_update(
    state: Any,
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    dt_bias: Any,
    z: Any = None,
    dt_softplus: bool = False,
    state_batch_indices: Any = None,
    dst_state_batch_indices: Any = None,
    null_block_id: int = NULL_BLOCK_ID,
    out: Any = None,
    num_accepted_tokens: Any = None,
    cu_seqlens: Any = None,
    is_blackwell: bool = False,
) -> None:
    """Advance states in place and write the output to ``out``, on the backend in force.

    The arguments are those of ``ssu_bridge.compat.vllm.selective_state_update``, without those for stochastic rounding.

    Raises:
        RuntimeError: no backend was initialized.
        UnsupportedError: the backend does not support the call; nothing was written.
        ValueError, TypeError: as ``ssu_bridge.update``; TypeError also without ``out``.
    """
    get_mamba_ssu_backend()(
        state,
        x,
        dt,
        A,
        B,
        C,
        D,
        dt_bias,
        z,
        dt_softplus,
        state_batch_indices,
        dst_state_batch_indices,
        null_block_id,
        out,
        num_accepted_tokens,
        cu_seqlens,
        is_blackwell,
    )
