"""JAX arrays: their metadata, platforms and addresses, and the errors for arrays that cannot be used."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.extend.backend
import numpy as np

from ssu_bridge.core.arguments import ARGUMENTS, SLOT_TABLES, WRITTEN
from ssu_bridge.core.arrays import ArrayInfo
from ssu_bridge.core.problem import Options, Problem
from ssu_bridge.core.validate import check_dtype, describe
from ssu_bridge.frontends.base import Arrays, named, require_one_framework

_COUNTS = ("num_accepted_tokens", "cu_seqlens")


def described(options: Options, arrays: dict[str, Any]) -> Problem:
    """Check a call, traced or not, and return its Problem on no platform yet."""
    traced = any(isinstance(array, jax.core.Tracer) for array in arrays.values())
    infos = {name: _info(name, array) for name, array in arrays.items()}
    return describe(infos, options, framework="jax", platform=None, traced=traced)


def _info(name: str, array: Any) -> ArrayInfo:
    if isinstance(array, int):
        raise TypeError(f"{name}: expected a uint32[2] array or a jax.random.key, got int {array}")
    if _is_key(array):
        data = jax.random.key_data(array)
        if name != "rand_seed":
            raise TypeError(
                f"{name}: expected dtype {' or '.join(ARGUMENTS[name].dtypes)}, got a JAX key of dtype {array.dtype}"
            )
        if data.shape != (2,):
            raise TypeError(
                f"{name}: expected one key of two uint32 words, got keys of dtype {array.dtype} with words of shape "
                f"{data.shape}"
            )
        array = data
    # NumPy arrays come as they are; JAX takes them in these dtypes.
    return ArrayInfo(array.shape, jax.dtypes.canonicalize_dtype(array.dtype).name)


def platforms() -> dict[str, tuple[int, int] | None]:
    """Return the platforms of this process, the default first, each with the compute capability of its devices.

    That is None where they differ: JAX may lower a program once for all of them, and it has one kernel then.
    """
    found: dict[str, tuple[int, int] | None] = {}
    for platform, capability in map(platform_of, _devices()):
        if found.setdefault(platform, capability) != capability:
            found[platform] = None
    return found


def _devices() -> list[Any]:
    """Return the devices of this process, those of the default platform first."""
    clients = jax.extend.backend.backends().values()
    return [*jax.local_devices(), *(device for client in clients for device in client.local_devices())]


def several_devices() -> bool:
    """Return whether the process has more than one device of some platform."""
    return any(len(jax.devices(name)) > 1 for name in platforms())


def platform_of(device: Any) -> tuple[str, tuple[int, int] | None]:
    """Return a device's platform by the name that lowering has for it, and its compute capability."""
    if device.platform != "gpu":
        return device.platform, None
    major, dot, minor = str(device.compute_capability).partition(".")
    return ("cuda", (int(major), int(minor))) if dot else ("rocm", None)


def words(seed: Any) -> Any:
    """Return the two words of a key."""
    return jax.random.key_data(seed) if _is_key(seed) else seed


def _is_key(array: Any) -> bool:
    return bool(jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key))  # type: ignore[attr-defined]


def wraps_array(kind: type) -> bool:
    """Return whether objects of a type stand for a JAX array, as the variables of flax do."""
    return hasattr(kind, "__jax_array__") and not issubclass(kind, jax.Array | jax.core.Tracer)


def unwrapped(arrays: Arrays) -> Arrays:
    """Return the arrays with the JAX array of each object that stands for one."""
    return tuple(array.__jax_array__() if wraps_array(type(array)) else array for array in arrays)


def copied_from_host(arrays: Arrays, pad_slot_id: int) -> Arrays:
    """Return the arrays with a copy of each NumPy array, as JAX may take it.

    JAX reads memory of the host when it runs a program, maybe after the call has returned and the caller has changed
    it. It also reads the bytes whatever their order, and of an int64 it keeps the low 32 bits, which would be another
    sequence's slot: here an index that 32 bits cannot hold becomes a pad, a count the largest or smallest that they
    can.

    Raises:
        TypeError, ValueError: a NumPy array is not what JAX would take it for.
    """
    result = list(arrays)
    for i, (name, array) in enumerate(zip(ARGUMENTS, arrays, strict=False)):
        if isinstance(array, np.ndarray):
            if type(array) is not np.ndarray:
                require_one_framework(arrays)
            _require_numbers(name, array)
            result[i] = _narrowed(name, array, pad_slot_id) if array.dtype == np.int64 else np.array(array)
    return tuple(result)


def _narrowed(name: str, array: np.ndarray, pad_slot_id: int) -> np.ndarray:
    if jax.dtypes.canonicalize_dtype(np.int64) == np.int64:
        return np.array(array)
    narrow = np.iinfo(np.int32)
    pad = pad_slot_id if narrow.min <= pad_slot_id <= narrow.max else -1
    inside = (array >= narrow.min) & (array <= narrow.max)
    beyond = np.clip(array, narrow.min, narrow.max) if name in _COUNTS else pad if name in SLOT_TABLES else -1
    return np.where(inside, array, beyond).astype(np.int32)


def _require_numbers(name: str, array: np.ndarray) -> None:
    """Check that a NumPy array has numbers in this machine's byte order; JAX looks at the dtype more closely."""
    if array.dtype.kind in "OSUMm" or array.dtype.fields is not None:  # bfloat16 is of kind V, as structures are
        check_dtype(name, array.dtype.name)
    if not array.dtype.isnative:
        raise ValueError(f"{name}: expected numbers in this machine's byte order, got dtype {array.dtype.str}")


def address(array: Any) -> Any:
    """Return where an array lies: a number, several for one that is sharded, None for a tracer."""
    if isinstance(array, jax.core.Tracer):
        return None
    if array.sharding.num_devices == 1:
        return array.unsafe_buffer_pointer()
    return [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]


def refuse_out(out: Any) -> None:
    """Raise the error for an ``out`` that was given."""
    if out is not None:
        raise TypeError("out: expected None with JAX arrays, whose results are always new arrays; got an array")


def require_live(arrays: Arrays) -> None:
    """Raise the error for an array that was deleted."""
    for name, array in named(arrays).items():
        if isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer) and array.is_deleted():
            raise ValueError(
                f"{name}: expected a live array, got one that was deleted (donated to an earlier call); go on with the "
                "state that update returned"
            )


def explain_failure(arrays: Arrays) -> None:
    """Raise the error that names the argument, if an argument is why a call failed."""
    require_one_framework(arrays)
    require_live(arrays)
    given = named(arrays)
    committed = {}
    for name, array in given.items():
        if isinstance(array, np.ndarray):
            _require_numbers(name, array)
        if isinstance(array, jax.Ref):
            _require_once(name, array, given)
        if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer):
            continue
        _require_own_memory(name, array, given)
        if array.committed:
            committed[name] = array
    for name, array in committed.items():
        first, other = next(iter(committed.items()))
        if array.devices() != other.devices():
            raise ValueError(
                f"{name}: expected an array on {_spell(other.devices())}, where {first} is, "
                f"got one on {_spell(array.devices())}"
            )


def _require_once(name: str, reference: Any, given: Mapping[str, Any]) -> None:
    for other, array in given.items():
        if other != name and array is reference:
            raise ValueError(f"{name}: expected a jax.Ref of its own, got the one that is passed as {other}")


def _require_own_memory(name: str, array: Any, given: Mapping[str, Any]) -> None:
    """Check that an array is none of those that are donated, nor views the memory of one."""
    for written in WRITTEN:
        other = given.get(written)
        if written == name or not isinstance(other, jax.Array) or not array.size:
            continue
        if array is other or address(array) == address(other):
            what = "the state" if written == "state" else written
            came = what if array is other else f"one with the memory of {what}"
            raise ValueError(f"{name}: expected an array of its own, got {came}, which is given up for the new one")


def _spell(devices: Any) -> str:
    return ", ".join(sorted(map(str, devices)))
